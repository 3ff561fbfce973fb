"""Distributed pretraining of Vision Mamba at scale."""

from pathlib import Path

__version__ = "0.1.0"

# kernels/, launch/ and recipes/ are next to this folder in a source tree, and inside it in the wheel.
# Searching the tree's root too makes `vimscale.kernels` mean the same in both.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / ".source-tree").exists():
    __path__.append(str(_root))
