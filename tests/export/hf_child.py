"""Run by python -I -S, which finds the standard library alone: load the exports argv[1]/*/export with transformers, as
its users do, and run the steps that argv[2] names with each. Images and results are files next to them. argv[3:] are
folders of packages, whose .pth files, through which vimscale would be found, are not read.
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
BLOCKED = ("triton", "numba")


class Blocker:
    """Refuses what the folders for packages have and exports must do without."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
sys.path += sys.argv[3:]
assert importlib.util.find_spec("vimscale") is None

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification  # noqa: E402


def load(folder: Path, kind: type = AutoModelForImageClassification, **options: object) -> torch.nn.Module:
    return kind.from_pretrained(folder, trust_remote_code=True, **options).eval()


def outputs(here: Path) -> None:
    """Write what the folder's models compute of images.safetensors."""
    images = load_file(here / "images.safetensors")["images"]
    found = {}
    with torch.no_grad():
        encoder = load(here / "export", AutoModel)
        assert encoder.model.inner is None
        out = encoder(images, output_hidden_states=True)
        found |= {"tokens": out.last_hidden_state, "features": out.pooler_output, "last": out.hidden_states[-1]}
        if encoder.config.model["num_classes"]:
            found["logits"] = load(here / "export")(images).logits
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, here / "out.safetensors")


def saves(here: Path) -> None:
    """Save the model with the classes that AutoModel made, and load it again."""
    model = load(here / "export")
    model.save_pretrained(here / "saved")
    AutoImageProcessor.from_pretrained(here / "export", trust_remote_code=True).save_pretrained(here / "saved")
    again = load(here / "saved")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    load(here / "saved", AutoModel)
    processor = AutoImageProcessor.from_pretrained(here / "saved", trust_remote_code=True)
    assert type(processor).__name__ == "VimscaleImageProcessor"
    load(here / "export", AutoModel).save_pretrained(here / "saved encoder")


class Images(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, size: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(8, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[i], "labels": torch.tensor(i % 3)}


def trains(here: Path) -> None:
    """Fine-tune on three classes for three steps, with recomputation; save, and load the result."""
    transformers.set_seed(0)
    model = load(here / "export", num_labels=3, ignore_mismatched_sizes=True)
    head = model.model.head.weight
    assert head.shape[0] == 3
    assert head.isfinite().all()
    assert 0.01 < head.std() < 0.03
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = Images(model.config.model["image_size"])
    batch = {"pixel_values": data.images, "labels": torch.arange(8) % 3}
    with torch.no_grad():
        first = model(**batch).loss
    arguments = transformers.TrainingArguments(
        output_dir=str(here / "trainer"),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    still = [name for name, tensor in model.state_dict().items() if torch.equal(before[name], tensor)]
    assert not still, still
    with torch.no_grad():
        assert model.eval()(**batch).loss < first
    again = load(here / "trainer/checkpoint-3")
    assert again.config.num_labels == 3
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def narrow(here: Path) -> None:
    """Load in bf16, where only products are narrow; and draw a new model from the config."""
    model = load(here / "export", dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    wide = (
        "A_log",
        ".D",
        "dt_bias",
        "norm.weight",
        "pos_embed",
        "cls_token",
        "registers",
        "conv_weight",
        "conv_bias",
        "layer_scale",
    )
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if name.endswith(wide) else torch.bfloat16), name
    images = load_file(here / "images.safetensors")["images"]
    with torch.no_grad():
        logits, wanted = model(images).logits, load(here / "export")(images).logits
    assert logits.dtype == torch.float32
    assert (logits - wanted).abs().max() < 0.05 * wanted.abs().max()
    new = AutoModelForImageClassification.from_config(model.config, trust_remote_code=True)
    assert all(tensor.isfinite().all() for tensor in new.state_dict().values())
    assert new(images, labels=torch.zeros(len(images), dtype=torch.long)).loss.isfinite()


STEPS = {"outputs": outputs, "saves": saves, "trains": trains, "narrow": narrow}
for case in sorted(Path(sys.argv[1]).iterdir()):
    for step in sys.argv[2].split(","):
        STEPS[step](case)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {*BLOCKED, "vimscale"}, loaded
