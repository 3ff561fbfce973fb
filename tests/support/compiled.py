"""Compile what hundreds of test processes import, and the CPU kernels, which they would otherwise compile at the same
time: `python -m tests.support.compiled`.
"""

import compileall
from pathlib import Path

import torch

from vimscale.model import VisionMamba
from vimscale.recipe import recipe

if __name__ == "__main__":
    for package in ("vimscale", "kernels", "launch"):
        compileall.compile_dir(Path(__file__).parents[2] / package, quiet=1)
    for changes in ([], ["model.directions=ssd*4", "model.d_head=32"]):
        model = VisionMamba(recipe.load("vim_digits_cpu", changes).model.shape(10))
        model(torch.randn(2, 3, 32, 32)).sum().backward()
