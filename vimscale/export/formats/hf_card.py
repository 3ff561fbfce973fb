"""The model card of a folder for transformers."""

from vimscale.export.formats.base import Source

_LOADING = """\
## Use

```python
import torch
from PIL import Image
from transformers import {imports}

folder = "path/to/this/folder"  # or the name of a repository that holds it
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = {kind}.from_pretrained(folder, trust_remote_code=True).eval()
inputs = processor(Image.open("image.jpg"), return_tensors="pt")
with torch.no_grad():
    {result}
```

The folder needs `torch` and `transformers`, nothing else: the code of the model is in `modeling.py`, `layers.py`,
`mixers.py` and `orders.py`, in plain torch. Where vimscale is installed, its kernels run the scans instead;
`model.model.inner = None` does without them.

- `trust_remote_code=True` runs the Python files of this folder: read them first.
- `last_hidden_state` has {tokens} in the order of the sequence{prefix}. `pooler_output` is
  what {read}.
- Images of other sizes work if patches of {patch} pixels fill them{positions}.
- Weights are {dtype}. With `dtype=torch.bfloat16`, products run in bf16; norms, convolutions and scans stay fp32.
- To fine-tune on other classes: `AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True,
  num_labels=..., ignore_mismatched_sizes=True)`. Drop-path of {drop} is active in training mode.
"""


def card(source: Source) -> str:
    """Return the text: what the model is, where its weights come from, how to load it. The licence is the user's."""
    config, manifest = source.model.config, source.manifest
    height, width = config.size
    kind = "AutoModelForImageClassification" if config.num_classes else "AutoModel"
    extra = config.cls_tokens + config.registers
    count = f"{config.tokens} normalized tokens" if not config.stages else "the normalized tokens of the last stage"
    prefix = (
        f": {config.cls_tokens} class token{'s' * (config.cls_tokens != 1)} ({config.cls_token}) and {config.registers}"
        " registers among the image's, where `model.model.encode(pixels)[1].slots` says"
    )
    loading = _LOADING.format(
        imports=f"AutoImageProcessor, {kind}",
        kind=kind,
        result="print(model.config.id2label[model(**inputs).logits.argmax().item()])"
        if config.num_classes
        else "features = model(**inputs).pooler_output",
        tokens=count,
        prefix=prefix if extra else "",
        read="the head reads" if config.num_classes else "a head would read",
        patch=config.patch_size,
        positions="; the position embedding is resized" if config.pos_embed is True else "",
        dtype="bf16 where they only enter products, and fp32 otherwise; they load as fp32" if source.half else "fp32",
        drop=config.drop_path,
    )
    facts = {
        "Layers": config.directions if not config.stages else " | ".join(s.directions or "bi" for s in config.stages),
        "Width": " ".join(dict.fromkeys(map(str, config.widths))),
        "Parameters": f"{sum(p.numel() for p in source.model.parameters()) / 1e6:.1f} M",
        "Image": f"{height} x {width} pixels, patches of {config.patch_size}",
        "Preprocessing": "resize to cover size / 0.875 (bicubic, antialiased), center crop; images of exactly this size"
        " stay as they are",
        "Mean, std": f"{_numbers(manifest.mean)}; {_numbers(manifest.std)}",
        "Classes": str(config.num_classes) if config.num_classes else "none: an encoder",
        "Data set": manifest.name or "unknown",
    }
    facts |= {f"Weights: {key}": _value(value) for key, value in source.about.items()}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    tag = "image-classification" if config.num_classes else "image-feature-extraction"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: {tag}\ntags: [vision-mamba, vimscale]\n---\n\n"
        "# Vision Mamba\n\nA Vision Mamba (arXiv:2401.09417): an image encoder of selective scans instead of attention,"
        " trained with vimscale.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n{loading}\n"
        "## Licence\n\nNot stated: whoever publishes these weights chooses their licence, and must check that the terms"
        " of the data allow it.\n"
    )


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _value(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
