"""All pretraining objectives with everything that a run can be: ranks, accumulation, ZeRO stages, precision,
recomputation, restarts. Runs are those of tests/support/injected.py: real processes, DeepSpeed and tar shards. The
faster tests of each kind are beside this file.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import forks
from vimscale.checkpoint.compare import Pair

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LENGTH = ("steps=6", "checkpoint.every=4", "log.every=1", "optim.warmup=2", "batch=16", "evaluate.every=0")
DISTILLATION = "kind: distillation, prototypes: 64, hidden: 32, bottleneck: 16, local_crops: 2, local_size: 16"
CONTRASTIVE = "kind: contrastive, tokenizer: bytes, caption: class, width: 32, depth: 1, heads: 2, features: 16"
KINDS: dict[str, tuple[str, ...]] = {
    "masked": ("objective={kind: masked, decoder_depth: 1, decoder_width: 32}",),
    "autoregressive": (
        "objective={kind: autoregressive, cluster: 2, decoder_depth: 2, decoder_width: 32, decoder_heads: 2}",
        "model.directions=fwd*2",
        "model.cls_token=none",
    ),
    "distillation": (f"objective={{{DISTILLATION}}}",),
    "sinkhorn": (f"objective={{{DISTILLATION}, targets: sinkhorn, ibot: 1.0, koleo: 0.1}}",),
    "contrastive": (f"objective={{{CONTRASTIVE}}}",),
    "clip": (f"objective={{{CONTRASTIVE}, loss: clip}}",),
}


def _run(folder: Path, kind: str, *changes: str, world: int = 2, fault: str = "") -> list[dict[str, Any]]:
    """The rows of training of a run of `world` ranks."""
    done = forks.run_module("tests.support.injected", folder, world, fault, *LENGTH, *KINDS[kind], *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def _losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


Plain = tuple[str, list[float]]


@pytest.fixture(scope="module", params=KINDS)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """A kind, and its losses: two ranks without accumulation, ZeRO stage 1, fp32."""
    kind = request.param
    losses = _losses(_run(tmp_path_factory.mktemp("plain"), kind, "parallel.zero=1"))
    assert len(set(losses)) == 6
    return kind, losses


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (4, 2)])
def test_losses_depend_on_neither_ranks_nor_accumulation(tmp_path: Path, plain: Plain, world: int, micro: int) -> None:
    kind, losses = plain
    found = _losses(_run(tmp_path, kind, f"parallel.micro_batch={micro}", world=world))
    assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_run_that_stops_resumes_to_the_bit_at_any_stage(tmp_path: Path, plain: Plain, zero: int) -> None:
    kind, losses = plain
    if kind in ("distillation", "sinkhorn") and zero == 3:
        pytest.skip("a teacher at ZeRO stage 3 is refused")
    changes = (f"parallel.zero={zero}", "parallel.persist=0", "parallel.micro_batch=4", "parallel.recompute=block")
    calm = _losses(_run(tmp_path / "calm", kind, *changes))
    _run(tmp_path / "hit", kind, *changes, fault="stopped_at_3")
    assert _losses(_run(tmp_path / "hit", kind, *changes)) == calm
    pair = Pair(*(tmp_path / name / "run/checkpoints/step_00000006" for name in ("calm", "hit")))
    assert pair.only_in == [[], []]
    assert all(found.same_bits for found in pair.differences())
    assert calm == pytest.approx(losses, rel=1e-5)


def test_mixed_precision_stays_near_single(tmp_path: Path, plain: Plain) -> None:
    kind, losses = plain
    mixed = _losses(_run(tmp_path, kind, "parallel.precision=bf16"))
    assert mixed != losses
    assert mixed == pytest.approx(losses, rel=3e-2)
