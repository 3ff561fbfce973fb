"""The picture of a run of `benchmarks.gpu`, or of what was recorded: `python -m benchmarks.gpu.picture FILE.json`."""

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KINDS = ("scan forward", "scan backward", "products", "attention", "convolution", "gate", "norm", "other")
OURS, PEER, WAIT = "C0", "0.6", "C1"


def draw(record: Row, path: Path) -> None:
    """Four panels: images/s at 224 pixels, times of steps, kernels of the steps by kind, scans against mamba-ssm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = record["parts"]
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 11), layout="constrained", width_ratios=(1, 1.15))
    _speeds(axes[0][0], parts)
    _times(axes[0][1], parts)
    _kinds(axes[1][0], parts)
    _scans(axes[1][1], parts)
    for panel in axes.flat:
        panel.grid(visible=True, axis="x", which="major", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    versions = ", ".join(
        f"{name.replace('_', '-')} {record[name]}" for name in ("torch", "triton", "mamba_ssm") if name in record
    )
    figure.suptitle(f"{record['gpu']}, {versions}, commit {record['commit']}, {record['date']}; bf16")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _title(row: Row) -> str:
    variant = f" {row['directions']}" if row["directions"] else ""
    variant += f" recompute {row['recompute']}" if row["recompute"] != "none" else ""
    return f"{row['model']}{variant}, {row['image_size']} px x {row['batch']}"


def _bars(panel: Any, names: list[str], values: list[float], colors: list[str], form: str) -> None:
    panel.barh(range(len(names)), values, color=colors)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    for at, value in enumerate(values):
        panel.text(value, at, f" {value:{form}}", va="center", fontsize=9)
    panel.margins(x=0.12)


def _speeds(panel: Any, parts: Row) -> None:
    """Images/s of Vim-S, from the trainer to the limit that its kernels set, and of its peers."""
    speeds: list[tuple[str, float, str]] = []
    for row in parts.get("trainer", ()):
        speed = row["images_per_s"]
        speeds.append((f"vimscale launch, {row['model']}", row["batch"] / row["step_ms"] * 1e3, OURS))
        if isinstance(speed, list):
            speeds[-1] = (speeds[-1][0], sum(speed) / len(speed), OURS)
    for row in parts.get("steps", []) + parts.get("originals", []):
        if row["image_size"] != 224 or row["directions"] or row["recompute"] != "none":
            continue
        ours = row["model"].startswith("Vim")
        speeds.append((f"{row['model']}, bare step", row["images_per_s"], OURS if ours else PEER))
        if "graph_images_per_s" in row:
            speeds.append((f"{row['model']}, one CUDA graph", row["graph_images_per_s"], OURS if ours else PEER))
        if ours:
            speeds.append((f"{row['model']}, its kernels alone", row["batch"] / row["kernels_ms"] * 1e3, "C9"))
    _bars(panel, *map(list, zip(*speeds, strict=True)), ",.0f")
    panel.set(title="Training at 224 pixels", xlabel="images per second")


def _times(panel: Any, parts: Row) -> None:
    """Kernels as bars; what is missing to the wall is the device waiting for its host."""
    rows = parts.get("steps", []) + parts.get("originals", [])
    at = range(len(rows))
    kernels = [row["kernels_ms"] for row in rows]
    panel.barh(at, [row["wall_ms"] for row in rows], color=WAIT, alpha=0.55, label="the device waits")
    panel.barh(at, kernels, color=[OURS if row["model"].startswith("Vim") else PEER for row in rows])
    marks = [(row["graph_ms"], i) for i, row in enumerate(rows) if "graph_ms" in row]
    if marks:
        panel.plot(*zip(*marks, strict=True), "k|", markersize=13, markeredgewidth=2, label="as one CUDA graph")
    panel.barh([0], [0], color=OURS, label="kernels, Vim")
    panel.barh([0], [0], color=PEER, label="kernels, others")
    for i, row in enumerate(rows):
        panel.text(max(row["wall_ms"], row["kernels_ms"]), i, f" {row['wall_ms']:.0f}", va="center", fontsize=9)
    panel.set_yticks(at, [_title(row) for row in rows])
    panel.invert_yaxis()
    panel.margins(x=0.08)
    panel.set(title="A step: forward, backward, AdamW", xlabel="ms; the number is the wall time")
    panel.legend(loc="center right", frameon=True)


def _kinds(panel: Any, parts: Row) -> None:
    rows = [row for row in parts.get("steps", ()) if row.get("kinds_ms")]
    names = [kind for kind in KINDS if any(kind in row["kinds_ms"] for row in rows)]
    start = [0.0] * len(rows)
    for number, kind in enumerate(names):
        values = [row["kinds_ms"].get(kind, 0.0) for row in rows]
        panel.barh(range(len(rows)), values, left=start, color=f"C{number}", label=kind, height=0.55)
        for i, value in enumerate(values):
            if value > 0.025 * max(sum(row["kinds_ms"].values()) for row in rows):
                panel.text(start[i] + value / 2, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color="w")
        start = [a + b for a, b in zip(start, values, strict=True)]
    panel.set_yticks(range(len(rows)), [_title(row) for row in rows])
    panel.set_ylim(len(rows) + 0.6 * (len(rows) < 3), -1 - 0.6 * (len(rows) < 3))
    panel.set(title="Where the time of the kernels goes", xlabel="ms")
    panel.legend(loc="lower center", ncols=4, frameon=False)


def _scans(panel: Any, parts: Row) -> None:
    """Forward and backward, both directions: ours in one call, mamba-ssm's in two."""
    shapes: dict[tuple[int, ...], dict[str, float]] = {}
    for row in parts.get("scans", ()):
        times = shapes.setdefault((row["b"], row["l"], row["e"], row["n"]), {})
        if row["name"] == "mamba-ssm CUDA":
            times["mamba-ssm CUDA, twice"] = 2 * row["both_ms"]
        elif row["directions"] == 2:
            times["vimscale, both directions"] = row["both_ms"]
    height = 0.38
    for number, (name, color) in enumerate((("vimscale, both directions", OURS), ("mamba-ssm CUDA, twice", PEER))):
        found = [(i + (number - 0.5) * height, of[name]) for i, of in enumerate(shapes.values()) if name in of]
        if found:
            panel.barh(*zip(*found, strict=True), height=height, color=color, label=name)
        for at, value in found:
            panel.text(value, at, f" {value:.2f}", va="center", fontsize=9)
    panel.set_yticks(range(len(shapes)), [", ".join(map(str, shape)) for shape in shapes])
    panel.invert_yaxis()
    panel.margins(x=0.1)
    panel.set(title="Scans of both directions, forward and backward", xlabel="ms of kernels", ylabel="b, l, e, n")
    if shapes:
        panel.legend(frameon=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        draw(json.loads(Path(argument).read_text()), Path(argument).with_suffix(".png"))
