"""Formats of exports, as their files tell them. Needs none of the code that writes or reads them."""

from pathlib import Path

from vimscale.storage import untrusted

READ_BACK = {
    "safetensors": True,
    "hf": True,
    "hustvl": False,
    "arm": False,
    "mambar": False,
    "timm": False,
    "onnx": False,
    "torch": False,
}
"""What --to takes -> whether a folder of it holds a model that is read back bit by bit."""
PROGRAMS = {".onnx": "a program of ONNX", ".pt2": "a program of torch.export"}
"""Suffixes of files that formats write and nothing reads back -> what they are."""


def written_in(folder: Path) -> str | None:
    """Which format the export in a folder has, whoever wrote it; None: none that says so."""
    for file, key in (("parity.json", "format"), ("config.json", "model_type"), ("config.json", "architecture")):
        try:
            tree = untrusted.loads(untrusted.read(folder / file))
        except (OSError, ValueError):
            continue
        found = tree.get(key) if isinstance(tree, dict) else None
        if not isinstance(found, str):
            continue
        if key == "format" and found in READ_BACK:
            return found
        if key == "model_type" and found.startswith("vimscale"):
            return "hf"  # saved again by transformers
        if key == "architecture" and found == "vimscale":
            return "timm"
    return None
