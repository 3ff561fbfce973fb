"""vimscale: distributed large-scale pretraining of Vision Mamba."""

from pathlib import Path

__version__ = "0.1.0"

# In a source tree kernels/, launch/ and recipes/ stand beside this folder, in the wheel inside it.
# Looking into the tree's root as well makes `vimscale.kernels` mean the same in both.
_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / ".source-tree").exists():
    __path__.append(str(_root))
