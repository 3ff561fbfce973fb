"""Training steps of complete models: forward, backward, fused AdamW; bf16 by autocast on a GPU; no engine.

Vim, a ViT with scaled_dot_product_attention, and the original Vim on CUDA kernels; eager and as one CUDA graph.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import times
from benchmarks.vit import ViT
from vimscale import ops
from vimscale.estimate import work
from vimscale.model import PRESETS, VisionMamba

Row = dict[str, Any]
PRESET = {
    "Vim-Ti": "vim_tiny",
    "Vim-S": "vim_small",
    "Vim-B": "vim_base",
    "SSD-S": "ssd_small",
    "SSD-MLP-S": "ssd_mlp_small",
}
KINDS = {
    "scan backward": (
        "selective_scan_bwd",
        "scan_segments_bwd",
        "selective_scan_pack",
        "selective_scan_unpack",
        "ssd_pairs",
        "ssd_scores",
        "ssd_decay_bwd",
    ),
    # the dual scan's gradient of x and states are launches of its forward kernels
    "scan forward": ("selective_scan", "scan_segments", "ssd_"),
    "convolution": ("causal_conv1d",),
    "gate": ("scan_gate",),
    "norm": ("add_norm", "gate_norm", "layer_norm"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": (
        "gemm",
        "cutlass",
        "nvjet",
        "cublas",
        "xmma",
        "splitk",
        "implicit_convolve",
        "dgrad",
        "wgrad",
        "fprop",
    ),
}
"""Words in the names of kernels; the first kind with a word in a name has the kernel, and the rest are "other"."""


@dataclass(frozen=True)
class Case:
    """One row of the table of steps."""

    model: str
    """One of PRESET, ViT-S, or "original Vim-Ti" or "original Vim-S"."""
    image_size: int
    batch: int
    directions: str | None = None
    recompute: str = "none"

    @property
    def is_ours(self) -> bool:
        return self.model in PRESET

    @property
    def title(self) -> str:
        variant = f" {self.directions}" if self.directions else ""
        variant += f" recompute {self.recompute}" if self.recompute != "none" else ""
        return f"{self.model}{variant}, {self.image_size} pixels, {self.batch} images"


CASES = (
    Case("Vim-S", 224, 128),
    Case("Vim-Ti", 224, 128),
    Case("Vim-B", 224, 64),
    Case("Vim-S", 224, 128, directions="fwd*24"),
    Case("Vim-S", 224, 128, recompute="scan"),
    Case("Vim-S", 224, 128, recompute="block"),
    Case("ViT-S", 224, 128),
    Case("Vim-S", 512, 24),
    Case("ViT-S", 512, 24),
    Case("Vim-S", 1248, 4),
    Case("ViT-S", 1248, 4),
    Case("Vim-S", 2048, 2),
    Case("ViT-S", 2048, 2),
)
DUAL = (
    Case("SSD-S", 224, 128),
    Case("SSD-MLP-S", 224, 128),
    Case("ViT-S", 224, 128),
    Case("SSD-S", 512, 24),
    Case("SSD-MLP-S", 512, 24),
    Case("ViT-S", 512, 24),
    Case("SSD-S", 1248, 4),
    Case("SSD-MLP-S", 1248, 4),
    Case("ViT-S", 1248, 4),
    Case("SSD-S", 2048, 2),
    Case("SSD-MLP-S", 2048, 2),
    Case("ViT-S", 2048, 2),
)
ORIGINALS = (Case("original Vim-S", 224, 128), Case("original Vim-Ti", 224, 128), Case("original Vim-S", 1248, 4))


def model_of(case: Case, kind: type[VisionMamba] = VisionMamba) -> nn.Module:
    """The model of a row, in training mode, on the default device."""
    if case.model == "ViT-S":
        return ViT(case.image_size, d=384, heads=6)
    config = replace(PRESETS[PRESET[case.model.removeprefix("original ")]], image_size=case.image_size)
    if case.directions:
        config = replace(config, directions=case.directions)
    model = kind(config)
    model.recompute = [case.recompute] * len(config.layers)
    if case.is_ours:
        return model
    from benchmarks.gpu.original import OnCuda

    return OnCuda(model)


def step_of(model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], batch: tuple[Tensor, Tensor]) -> Any:
    """A function that runs one step of the model on (images, labels)."""
    images, labels = batch
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=images.is_cuda)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def graph_of(step: times.Call) -> times.Call:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times.WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measured(case: Case, device: str, calls: int) -> Row:
    """Times, images/s and peak memory of a row; `graph_ms`, or why there is no graph."""
    torch.manual_seed(0)
    with torch.device(device):
        model = model_of(case)
        images = torch.randn(case.batch, 3, case.image_size, case.image_size)
        labels = torch.randint(1000, (case.batch,))
    step = step_of(model, list(model.parameters()), (images, labels))
    on_gpu = device == "cuda"
    step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    found = times.of(step, calls)
    row: Row = asdict(case) | {"kernels_ms": found.kernels_ms, "wall_ms": found.wall_ms, "host_ms": found.host_ms}
    row |= {"launches": found.launches, "images_per_s": case.batch / found.wall_ms * 1e3}
    row["kinds_ms"] = kinds(found.by_kernel)
    row["longest"] = [list(kernel) for kernel in found.by_kernel[:12]]
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row |= _graph(step, calls, case.batch)
    return row


def _graph(step: times.Call, calls: int, batch: int) -> Row:
    try:
        taken = times.wall(graph_of(step), calls)
    except RuntimeError as error:  # what cannot be captured differs by version; the row says so
        return {"graph_error": str(error).strip().splitlines()[0]}
    return {"graph_ms": taken, "graph_images_per_s": batch / taken * 1e3}


def kinds(by_kernel: tuple[tuple[str, float, float], ...]) -> dict[str, float]:
    """ms by kind of work, from the names of kernels."""
    found: dict[str, float] = {}
    for name, ms, _ in by_kernel:
        kind = next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")
        found[kind] = found.get(kind, 0.0) + ms
    return found


def rows(cases: tuple[Case, ...], device: str, calls: int) -> Iterator[Row]:
    """Measure row after row, and print each."""
    for case in cases:
        row = measured(case, device, calls)
        host, graph = row["host_ms"] or 0.0, row.get("graph_ms", 0.0)
        print(
            f"{case.title:52} kernels {row['kernels_ms']:8.1f}  wall {row['wall_ms']:8.1f}  host {host:8.1f}"
            f"  graph {graph:8.1f} ms{row['images_per_s']:8.0f} images/s{row.get('peak_gib', 0):8.2f} GiB",
            flush=True,
        )
        yield row
        if device == "cuda":
            torch.cuda.empty_cache()


# ---- work: needs no device


class _Bare(VisionMamba):
    """A model without initial values, which fake tensors cannot have."""

    def _init_all(self, gather: Any) -> None:
        return


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[work.Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(work.COMPOSED):
            with self:  # its parts count, not itself
                return torch._library.custom_ops.OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if (done := work.of_operation(func, args, kwargs or {}, out)) is not None:
            self.parts.append(done)
        return out


def work_of(case: Case) -> work.Work:
    """What the step of a row asks of a GPU, counted with fake tensors, as `vimscale plan` counts it."""
    with FakeTensorMode(), ops.counted("triton"):
        model = model_of(case, _Bare)
        images = torch.empty(case.batch, 3, case.image_size, case.image_size)
        labels = torch.empty(case.batch, dtype=torch.int64)
        with Counting() as counting:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
    return work.total(counting.parts) + work.update(sum(p.numel() for p in model.parameters()))


def counted(cases: tuple[Case, ...]) -> Iterator[Row]:
    for case in cases:
        yield asdict(case) | {"work": work_of(case).as_json()}
