"""torch.export: a model as programs that torch alone runs, in Python and in C++.

Axes: b images, l tokens, e inner width, n state; images are (b, 3, h, w), already normalized.
"""

import copy
import io
import json
import operator
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vimscale.errors import CheckpointError
from vimscale.export.formats.base import Format, Outputs, Source, sides
from vimscale.export.portable import limits
from vimscale.export.portable.mixers import kernels
from vimscale.export.portable.modeling import Encoder
from vimscale.export.safetensors import preprocessing
from vimscale.model import VisionMamba
from vimscale.ops import AT_RUN_TIME
from vimscale.storage import files

PLAIN, KERNELS, COMPILED = "model.pt2", "kernels.pt2", "aoti.pt2"


class TorchProgram(Format):
    """Programs from images (b, 3, h, w) to `features` and `logits`, for any b: model.pt2 has only torch's own ops,
    kernels.pt2 vimscale's, for programs that import it; aoti.pt2 is compiled for this CPU, if `Source.aoti`.
    config.json says what their users need besides.
    """

    tolerance: ClassVar[float] = 1e-5

    def check(self, source: Source) -> None:
        """Raise CheckpointError for a model that `portable` does not have, or that cannot be compiled here."""
        limits.check(source.model, "torch")
        if source.aoti and source.any_size:
            raise CheckpointError("--aoti compiles for images of one size: leave out --any-size, or --aoti")
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if source.aoti and shutil.which(compiler) is None:
            raise CheckpointError(
                f"--aoti compiles C++, and there is no {compiler} here: install it (Debian: apt install g++), name"
                " another compiler in the environment variable CXX, or leave out --aoti"
            )

    def write(self, folder: Path, source: Source) -> None:
        """Write the programs and config.json into `folder`.

        Raises:
            OSError: names the file.
            CheckpointError: the C++ compiler failed.
        """
        config = source.model.config
        with torch.no_grad(), _quiet():
            plain = _exported(_encoder(source), source)
            _save(plain, folder / PLAIN)
            _save(_with_kernels(source), folder / KERNELS)
            if source.aoti:
                _compile(plain, folder / COMPILED)
        least, step = sides(config)
        about = {
            "format": 1,
            **preprocessing(source.manifest),
            "size": config.size,
            "any_size": {"least": least + step, "step": step} if source.any_size else None,
            "torch": torch.__version__,
            "about": source.about,
        }
        if config.num_classes == 0:
            about["classes"] = []
        files.write(folder / "config.json", json.dumps(about, indent=1) + "\n")

    def reopen(self, folder: Path, file: str = PLAIN) -> Callable[[Tensor], Outputs]:
        """Open one of the programs in `folder`."""
        if file == COMPILED:
            return torch._inductor.aoti_load_package(str(folder / file))
        with _quiet():
            program = torch.export.load(folder / file).module()

        def run(images: Tensor) -> Outputs:
            with torch.no_grad():
                return program(images)

        return run

    def others(self, folder: Path) -> dict[str, Callable[[Tensor], Outputs]]:
        """Open kernels.pt2, and aoti.pt2 if it is there."""
        return {file: self.reopen(folder, file) for file in (KERNELS, COMPILED) if (folder / file).is_file()}


# ---- models to programs


class _Program(nn.Module):
    """What is exported: it computes in fp32, whatever the dtype of its weights."""

    def __init__(self, model: nn.Module, half: set[str]):
        """`half`: names of the weights that are stored in bf16."""
        super().__init__()
        self.model = model
        self.rounded = half
        for name in half:
            weight = model.get_parameter(name)
            weight.data = weight.data.bfloat16()

    def forward(self, images: Tensor) -> Outputs:
        wide = {name: self.model.get_parameter(name).float() for name in self.rounded}
        outputs: Outputs = torch.func.functional_call(self.model, wide, (images,))
        return outputs


class _Outputs(nn.Module):
    """A VisionMamba with the outputs of the portable model."""

    def __init__(self, model: VisionMamba):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Outputs:
        features = self.model(images, features=True)
        head = self.model.head
        return {"features": features.float()} | ({} if head is None else {"logits": head(features).float()})


def _encoder(source: Source, **arguments: Any) -> Encoder:
    """The portable model with the weights of `source`."""
    encoder = Encoder(source.model.config.to_dict(), scan, backward=source.model.backward, **arguments)
    encoder.load_state_dict(source.model.state_dict())
    return encoder


def _exported(model: nn.Module, source: Source) -> ExportedProgram:
    """Trace a model, which becomes part of the program."""
    config, weights = source.model.config, source.model.product_weights() if source.half else set()
    if isinstance(model, _Outputs):
        weights = {f"model.{name}" for name in weights}
    shapes: dict[int, Any] = {0: Dim("batch")}
    height, width = config.size
    if source.any_size:  # any two different sides serve for tracing; torch specializes for one row or column
        least, step = sides(config)
        height, width = least + 2 * step, least + 4 * step
        shapes |= {at: step * Dim(name, min=2) + (least - step) for at, name in ((2, "i"), (3, "j"))}
    example = torch.zeros(2, 3, height, width)
    program = torch.export.export(
        _Program(model.eval(), weights), (example,), dynamic_shapes={"images": shapes}, strict=False
    )
    if source.any_size:  # with open sizes, some of torch's decompositions guard against a single image
        try:
            program.module()(example[:1])
        except (AssertionError, RuntimeError) as error:
            raise CheckpointError(
                "--any-size: torch.export writes a program for this model that refuses a batch of one; leave out"
                f" --any-size ({str(error).splitlines()[0]})"
            ) from None
        _check_sides(program, least, step)
    return program


def _check_sides(program: ExportedProgram, least: int, step: int) -> None:
    """Let the program raise an error for images with a side that is not `least` + k `step`. (torch drops such a check
    while it traces, because it assumes that `dynamic_shapes` hold, but does not check those.)
    """
    graph = program.graph
    (images,) = (node for node in graph.nodes if node.name == "images")
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for axis in (2, 3):
            value: Any = images.meta["val"].shape[axis]
            node = graph.call_function(torch.ops.aten.sym_size.int, (images, axis))
            node.meta["val"] = value
            for function, operand in ((operator.sub, least), (operator.mod, step), (operator.eq, 0)):
                value = function(value, operand)
                node = graph.call_function(function, (node, operand))
                node.meta["val"] = value
            message = f"the {('height', 'width')[axis - 2]} of images must be {least} + k {step} pixels"
            graph.call_function(torch.ops.aten._assert_scalar.default, (node, message)).meta["val"] = None
    program.graph_module.recompile()


def _with_kernels(source: Source) -> ExportedProgram:
    """The program whose scans and norms are vimscale's ops, which choose their backend when it runs."""
    if source.any_size:  # our own model lays out tokens on the host
        model: nn.Module = _encoder(source, inner=kernels())
    else:
        model = _Outputs(copy.deepcopy(source.model))
    program = _exported(model, source)
    for node in program.graph.nodes:
        if getattr(node.target, "namespace", None) == "vimscale":
            node.args = (*node.args[:-1], AT_RUN_TIME)
    return program


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """The portable model's `Scan` as torch's op `scan`: one node whatever the number of tokens, so that this may be
    open; compilers make it a loop.
    """
    from torch._higher_order_ops.scan import scan_op

    # `images` is an argument, although h has this size: Inductor looks for open sizes among the arguments. It is not
    # called b, for the traced step would have B and b by one name.
    def step(h: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, images: int) -> list[Tensor]:
        h = torch.addcmul((dt * u)[..., None] * B[:, None], (dt[..., None] * A).exp(), h)  # (b, e, n)
        return [h, (h * C[:, None]).sum(-1).view(images, -1)]

    tokens = [t.transpose(0, 1) for t in (u, dt, B, C)]
    tokens = [t.flip(0) if reverse else t.contiguous() for t in tokens]
    images = u.shape[0]
    _, y = scan_op(step, [u.new_zeros(images, *A.shape)], tokens, (A, images))
    return (y.flip(0) if reverse else y).transpose(0, 1)


# ---- files


def _save(program: ExportedProgram, path: Path) -> None:
    content = io.BytesIO()  # torch ends the process if it cannot write
    torch.export.save(program, content)
    files.write(path, content.getvalue())


def _compile(program: ExportedProgram, path: Path) -> None:
    """Compile a program by AOTInductor. It runs with as many threads as torch has there, and checks its inputs only if
    the environment variable AOTI_RUNTIME_CHECK_INPUTS is 1 there: those checks then allow a batch of one.
    """
    from torch._inductor.exc import CppCompileError

    try:
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"cpp.dynamic_threads": True, "aot_inductor.check_lowerbound": False},
        )
    except CppCompileError as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise CheckpointError(
            f"--aoti: the C++ compiler failed: {lines[-1] if lines else error}; name another in the environment"
            " variable CXX, or leave out --aoti"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says about itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec")
        yield
