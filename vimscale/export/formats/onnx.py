"""ONNX: a model as one file for onnxruntime, in which every scan is one `Scan` operator.

Axes: b images, l tokens, d model width, e inner width, n state; images are (b, 3, h, w), already normalized.
"""

import ast
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vimscale import __version__
from vimscale.export.formats.base import Format, Outputs, Source, sides
from vimscale.export.portable import limits
from vimscale.export.portable.modeling import Encoder
from vimscale.export.safetensors import preprocessing
from vimscale.model import VimConfig
from vimscale.storage import files

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET, IR_VERSION = 18, 8
"""The exporter's own operator set, so that nothing is converted; onnxruntime 1.15 opens them."""

_SCAN = """
<opset_import: ["" : 18], domain: "vimscale">
{name} (u, dt, A, B, C) => (y) {{
    two = Constant <value_ints: ints = [2]> ()
    three = Constant <value_ints: ints = [3]> ()
    x = Mul (dt, u)
    dt_first = Transpose <perm = [1, 0, 2]> (dt)
    x_first = Transpose <perm = [1, 0, 2]> (x)
    B_first = Transpose <perm = [1, 0, 2]> (B)
    C_first = Transpose <perm = [1, 0, 2]> (C)
    A_wide = Transpose <perm = [1, 0]> (A)
    dts = Unsqueeze (dt_first, two)
    xs = Unsqueeze (x_first, two)
    Bs = Unsqueeze (B_first, three)
    Cs = Unsqueeze (C_first, two)
    images = Shape <start = 0, end = 1> (u)
    n_e = Shape (A_wide)
    b_n_e = Concat <axis = 0> (images, n_e)
    zeros = ConstantOfShape (b_n_e)
    last, ys = Scan <
        num_scan_inputs = 4,
        scan_input_directions = [{way}, {way}, {way}, {way}],
        scan_output_directions = [{way}],
        body = step (
            float[b, n, e] h, float[b, one, e] dt_t, float[b, one, e] x_t, float[b, n, one] B_t, float[b, one, n] C_t
        ) => (float[b, n, e] h_t, float[b, one, e] y_t) {{
            dt_A = Mul (dt_t, A_wide)
            decay = Exp (dt_A)
            kept = Mul (decay, h)
            new = Mul (x_t, B_t)
            h_t = Add (kept, new)
            y_t = MatMul (C_t, h_t)
        }}
    > (zeros, dts, xs, Bs, Cs)
    y_first = Squeeze (ys, two)
    y = Transpose <perm = [1, 0, 2]> (y_first)
}}
"""
"""A scan in ONNX itself. States are (n, e), not (e, n): their rows are long, which halves onnxruntime's time."""

_EXTERNAL = 2**31 - 2**24
"""Bytes of weights beyond which they are in a second file: protobuf's limit, less what the graph needs."""


class Onnx(Format):
    """model.onnx, and config.json with what its users need to prepare images and name classes."""

    needs: ClassVar[dict[str, str]] = {name: name for name in ("onnx", "onnxscript", "onnxruntime")}
    tolerance: ClassVar[float] = 1e-4

    def check(self, source: Source) -> None:
        """Raise CheckpointError for a model that `portable` does not have."""
        limits.check(source.model, "onnx")

    def write(self, folder: Path, source: Source) -> None:
        """Write `folder`/model.onnx, with model.onnx.data beyond 2 GB of weights, and config.json.

        Raises:
            OSError: names the file.
        """
        import onnx
        import onnx_ir as ir

        config, path = source.model.config, folder / "model.onnx"
        with _quiet():
            model = _exported(source)
            _simplified(model)
        _named(model, source.model.state_dict())
        _typed(model, config, source.any_size)
        if source.any_size:
            _check_sides(model, *sides(config))
        if source.half:
            _halved(model)
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        with files.naming(path):
            ir.save(model, path, external_data="model.onnx.data" if size > _EXTERNAL else None)
        onnx.checker.check_model(path, full_check=True)
        least, step = sides(config)
        about = {"format": 1, **preprocessing(source.manifest), "size": config.size}
        about |= {"any_size": {"least": least, "step": step} if source.any_size else None}
        about |= {"opset": OPSET, "about": source.about}
        if config.num_classes == 0:
            about["classes"] = []
        files.write(folder / "config.json", json.dumps(about, indent=1) + "\n")

    def reopen(self, folder: Path) -> Callable[[Tensor], Outputs]:
        """Open `folder`/model.onnx in onnxruntime, on the CPU, with as many threads as torch has."""
        import onnxruntime  # type: ignore[import-untyped]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]

        def run(images: Tensor) -> Outputs:
            arrays = session.run(names, {"images": images.float().cpu().numpy()})
            return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

        return run


# ---- torch to ONNX


def _scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """The portable model's `Scan`, as a call of one of the two functions that `_SCAN` describes."""
    name = "vimscale::ScanBackward" if reverse else "vimscale::ScanForward"
    scanned = torch.onnx.ops.symbolic(name, (u, dt, A, B, C), dtype=u.dtype, shape=u.shape, version=1)
    assert isinstance(scanned, Tensor)
    return scanned


def _exported(source: Source) -> "ir.Model":
    """Trace the model with torch's exporter and add the functions that its scans call."""
    import onnx
    import onnx_ir as ir

    config = source.model.config
    portable_model = Encoder(config.to_dict(), _scan, backward=source.model.backward)
    portable_model.load_state_dict(source.model.state_dict())
    height, width = config.size
    shapes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if source.any_size:  # any two different sides serve for tracing
        least, step = sides(config)
        height, width = least + 2 * step, least + 4 * step
        shapes |= {at: step * torch.export.Dim(name, min=2) + (least - step) for at, name in ((2, "i"), (3, "j"))}
    with torch.no_grad():
        program = torch.export.export(
            portable_model.eval(), (torch.zeros(2, 3, height, width),), dynamic_shapes={"images": shapes}
        )
        names = ["features"] if source.model.head is None else ["features", "logits"]
        exported = torch.onnx.export(
            program,
            (),
            input_names=["images"],
            output_names=names,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: _sorted, torch.ops.aten.remainder.Scalar: _remainder},
        )
    assert exported is not None
    model = exported.model
    for name, way in (("ScanForward", 0), ("ScanBackward", 1)):
        function = ir.serde.deserialize_function(onnx.parser.parse_function(_SCAN.format(name=name, way=way)))
        model.functions[function.identifier()] = function
    return model


def _sorted(keys: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort, which torch's exporter lacks with `stable`; the portable model's keys are all different."""
    from onnxscript import opset18

    op: Any = opset18
    size = op.Reshape(op.Gather(op.Shape(keys), op.Constant(value_int=dim)), op.Constant(value_ints=[1]))
    return op.TopK(keys, size, axis=dim, largest=int(descending), sorted=1)


def _remainder(x: Any, by: Any) -> Any:
    """aten.remainder of integers by an integer, which torch's exporter lacks where `by` depends on the image's size."""
    from onnxscript import opset18 as op

    return op.Mod(x, by)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter and its optimizer say about themselves; what they raise is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ---- ONNX to a smaller, readable ONNX


def _simplified(model: "ir.Model") -> None:
    """Inline all functions, and compute what does not depend on the images, such as the transposes of weights."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    everything = 2**40
    limits: dict[str, Any] = {"input_size_limit": everything, "output_size_limit": everything}
    common.InlinePass()(model)
    optimizer.fold_constants_ir(model, **limits)
    while _folded_sorts(model):
        optimizer.fold_constants_ir(model, **limits)
    optimizer.optimize_ir(model, **limits)
    common.DeduplicateInitializersPass(size_limit=everything)(model)


def _folded_sorts(model: "ir.Model") -> bool:
    """Compute sorts of constants, which the optimizer leaves, for they have two outputs; return if there were any."""
    import onnx_ir as ir

    graph, found = model.graph, False
    for node in list(graph):
        keys = node.inputs[0].const_value if node.op_type == "TopK" and node.inputs[0] is not None else None
        if keys is None:
            continue
        array = keys.numpy()
        order = array.argsort(kind="stable")
        for old, new in zip(node.outputs, (array[order], order), strict=True):
            value = ir.val(old.name, const_value=ir.tensor(new.astype(np.int64), name=old.name))
            old.replace_all_uses_with(value)
            old.name = None
            graph.register_initializer(value)
        graph.remove(node, safe=True)
        found = True
    return found


def _named(model: "ir.Model", parameters: Collection[str]) -> None:
    """Name nodes after the modules they are of, and their outputs and constants after them; parameters keep their
    names. Drop what the exporter noted on each: shapes, which all readers infer, and lines of this machine's files.
    """
    scope, seen = "", Counter[str]()
    named = {id(value) for value in model.graph.outputs}
    for node in model.graph:
        scopes = node.metadata_props.get(_SCOPES)  # nodes without any are parts of what the node before them computes
        if scopes is not None:
            module = ast.literal_eval(scopes)[-2]
            scope = "" if module.startswith("_") else module
        _name(node, scope, seen, named)
        for body in (one.as_graph() for one in node.attributes.values() if one.name == "body"):
            for value in body.inputs:
                value.name = f"{node.name}/{value.name}"
            for inner in body:
                _name(inner, str(node.name), seen, named)
    for value in list(model.graph.initializers.values()):
        value.metadata_props.clear()
        if value.name not in parameters:
            use = next(iter(value.uses()))
            value.name = f"{use.node.name}:in{use.idx}"
    model.graph.name, model.producer_name, model.producer_version = "VisionMamba", "vimscale", __version__
    model.ir_version = IR_VERSION


_SCOPES = "pkg.torch.onnx.name_scopes"


def _name(node: "ir.Node", scope: str, seen: Counter[str], named: Collection[int]) -> None:
    name = f"{scope}/{node.op_type}" if scope else node.op_type
    seen[name] += 1
    node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
    node.metadata_props.clear()
    for i, value in enumerate(node.outputs):
        value.metadata_props.clear()
        if id(value) not in named:
            value.name, value.shape, value.type = f"{node.name}:out{i}", None, None


def _typed(model: "ir.Model", config: VimConfig, any_size: bool) -> None:
    """Declare the shapes of images and outputs, with names for the sizes that are open."""
    import onnx_ir as ir

    sides = ("height", "width") if any_size else config.size
    widths = {"images": (3, *sides), "features": (config.features,), "logits": (config.num_classes,)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None
        value.shape = ir.Shape(["batch", *widths[value.name]])
        value.metadata_props.clear()


def _check_sides(model: "ir.Model", least: int, step: int) -> None:
    """Let the model fail for images with a side that is not `least` + k `step`. ONNX has no assertion: the remainders
    of the sides are indices into [0], so that others than 0 are out of bounds; the node's name says why. What they give
    is part of a shape [0, 0, 0, 0], which leaves the images as they are.
    """
    import onnx_ir as ir

    graph = model.graph
    (images,) = graph.inputs
    uses = list(images.uses())
    first = graph[0]

    def constant(name: str, *numbers: int) -> "ir.Value":
        value = ir.val(f"sides/{name}", const_value=ir.tensor(np.array(numbers), name=f"sides/{name}"))
        graph.register_initializer(value)
        return value

    def add(op: str, *inputs: "ir.Value", name: str | None = None, **attributes: int) -> "ir.Value":
        node = ir.node(op, list(inputs), attributes, name=name or f"sides/{op}")
        node.outputs[0].name = f"sides/{op}:out0"
        graph.insert_before(first, node)
        return node.outputs[0]

    zero = constant("zero", 0)
    above = add("Sub", add("Shape", images, start=2, end=4), constant("least", least))
    remainders = add("Mod", above, constant("step", step))
    rule = f"the sides of images must be {least} + k {step} pixels"
    shape = add("Concat", zero, zero, add("Gather", zero, remainders, name=rule), axis=0)
    checked = add("Reshape", images, shape)
    for node, index in uses:
        node.replace_input_with(index, checked)


def _halved(model: "ir.Model") -> None:
    """Store as bf16 the weights whose values it holds exactly, which were rounded; a Cast makes them fp32 again, as
    onnxruntime does once when it opens the file. So nothing is computed in bf16, which few of its kernels can.
    """
    import onnx_ir as ir

    graph = model.graph
    for value in list(graph.initializers.values()):
        assert value.const_value is not None
        assert value.name is not None
        if value.dtype != ir.DataType.FLOAT or len(value.const_value.shape) < 2:
            continue
        wide = torch.tensor(value.const_value.numpy())
        if not torch.equal(wide.bfloat16().float(), wide):
            continue
        narrow = ir.tensor(wide.bfloat16(), name=value.name)
        graph.initializers.pop(value.name)
        stored = ir.val(value.name, const_value=narrow)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{value.name}/Cast")
        cast.outputs[0].name = f"{value.name}/Cast:out0"
        value.replace_all_uses_with(cast.outputs[0])
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)
