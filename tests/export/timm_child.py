"""Run by python -I -S, which finds the standard library alone: open the exports argv[1]/*/export with timm, as its
users do. Images and results are files next to them. argv[2:] are folders of packages.
"""

import importlib.util
import sys
from pathlib import Path

sys.path += sys.argv[2:]
assert importlib.util.find_spec("vimscale") is None

import timm  # noqa: E402
import timm.optim  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

for here in sorted(Path(sys.argv[1]).iterdir()):
    folder = here / "export"
    sys.path.insert(0, str(folder))
    import timm_vimscale  # noqa: F401

    images = load_file(here / "images.safetensors")["images"]
    model = timm.create_model("vimscale", checkpoint_path=str(folder / "model.safetensors")).eval()
    named = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.inner is None
    with torch.no_grad():
        tokens = model.forward_features(images)
        features = model.forward_head(tokens, pre_logits=True)
        logits = model(images)
        assert torch.equal(named(images), logits)
        assert tokens.shape[2] == model.num_features
        assert features.shape[1] == model.head_hidden_size
        found = {"tokens": tokens, "features": features, "logits": logits}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, here / "out.safetensors")
    data = timm.data.resolve_model_data_config(named)
    assert (*data["input_size"],) == (3, *images.shape[2:]), data
    assert (data["interpolation"], data["crop_pct"], (*data["mean"],)) == ("bicubic", 0.875, (0.5, 0.4, 0.3)), data
    transform = timm.data.create_transform(**data)
    from PIL import Image

    assert transform(Image.new("RGB", (90, 70))).shape == images.shape[1:]

    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3, drop_path_rate=0.2)
    assert torch.equal(other.norm.weight, model.norm.weight)
    assert other(images).shape == (2, 3)
    other.set_grad_checkpointing()
    optimizer = timm.optim.create_optimizer_v2(other.train(), opt="adamw", lr=1e-2, layer_decay=0.75)
    torch.nn.functional.cross_entropy(other(images), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert not torch.equal(other.norm.weight, model.norm.weight)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    with torch.no_grad():
        assert torch.equal(model(images), features)
    model.reset_classifier(2, "avg")
    assert model(images).shape == (2, 2)

    sys.path.remove(str(folder))
    for name in [each for each in sys.modules if each.partition(".")[0] == "timm_vimscale"]:
        del sys.modules[name]
