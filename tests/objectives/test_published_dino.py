"""Heads, losses, schedules and training equal recorded runs of the original code of DINO and DINOv2.

The recordings are next to the checkout, not in it.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from vimscale.objectives import teacher
from vimscale.objectives.published import dino, dinov2

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "objectives"
Numbers = dict[str, Tensor]
BOUNDS = {torch.float32: 1e-5, torch.float64: 2e-7}
"""Of a tensor's largest value. Recordings were rounded to fp32."""


def _recorded(name: str, dtype: torch.dtype) -> tuple[dict[str, Any], Numbers]:
    path = GOLDEN / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"there are no recorded runs of the original code at {GOLDEN}")
    with safe_open(path, "pt") as golden:
        tensors = {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118  safe_open is not a dict
        config = json.loads(golden.metadata()["config"])
    return config, {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}


def _below(tensors: Numbers, folder: str) -> Numbers:
    return {key.removeprefix(folder): value for key, value in tensors.items() if key.startswith(folder)}


def _close(ours: Any, theirs: Tensor, what: str = "") -> None:
    ours = torch.as_tensor(ours, dtype=theirs.dtype).detach()
    assert ours.shape == theirs.shape, what
    off = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
    assert off < BOUNDS[theirs.dtype], f"{what}: error {off:.1e} relative to the largest value"


both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


# ---- DINO


@both
def test_the_loss_its_gradient_and_the_center_equal_dinos_over_six_calls(dtype: torch.dtype) -> None:
    config, t = _recorded("dino", dtype)
    loss = dino.Loss(**config["loss"])
    _close(loss.temperatures, t["output/teacher_temperature"])
    for i, epoch in enumerate(config["epochs_of_steps"]):
        student = t[f"input/steps/{i}/student"].requires_grad_()
        value = loss(student, t[f"input/steps/{i}/teacher"], epoch)
        value.backward()
        _close(value, t[f"output/steps/{i}/loss"])
        _close(student.grad, t[f"grad/steps/{i}/student"])
        _close(loss.center[None], t[f"output/steps/{i}/center_after"])


@both
def test_losses_and_centers_of_two_ranks_equal_dinos(dtype: torch.dtype) -> None:
    """Each rank's sums are those of both ranks' images, which this test adds up."""
    config, t = _recorded("dino", dtype)
    crops = config["loss"]["ncrops"]
    current: list[Tensor] = []

    def both_ranks(values: Tensor) -> Tensor:
        outputs = torch.cat(current)
        return torch.full_like(values, len(outputs)) if values.ndim == 0 else outputs.sum(dim=0)

    for rank in range(2):
        loss = dino.Loss(**config["loss"], total=both_ranks)
        for i, epoch in enumerate(config["epochs_of_steps"]):
            views = t[f"input/steps/{i}/student"].unflatten(0, (crops, 2, -1))[:, rank].flatten(0, 1)
            student = views.clone().requires_grad_()
            halves = t[f"input/steps/{i}/teacher"].unflatten(0, (2, 2, -1))
            current = [halves[:, r].flatten(0, 1) for r in range(2)]
            value = loss(student, current[rank], epoch)
            value.backward()
            _close(value, t[f"output/ranks2/rank{rank}/{i}/loss"])
            _close(student.grad, t[f"grad/ranks2/rank{rank}/{i}/student"])
            _close(loss.center[None], t[f"output/ranks2/rank{rank}/{i}/center_after"])


def _check_head(made: Any, t: Numbers, name: str) -> None:
    x = t[f"input/{name}/x"].requires_grad_()
    logits = made(x)
    _close(logits, t[f"output/{name}/logits"], name)
    (logits * t[f"input/{name}/weight_of_output"]).sum().backward()
    recorded = _below(t, f"grad/{name}/")
    ours = {key: p.grad for key, p in dino.head_state(made).items()} | {"x": x.grad}
    assert ours.keys() == recorded.keys()
    for key, grad in ours.items():
        _close(grad, recorded[key], f"{name} {key}")


@both
@pytest.mark.parametrize("name", ["head_frozen", "head_free"])
def test_heads_and_their_gradients_equal_dinos(name: str, dtype: torch.dtype) -> None:
    config, t = _recorded("dino", dtype)
    _check_head(dino.head(config["heads"][name], _below(t, f"state/{name}/")).to(dtype), t, name)


@both
def test_clipping_each_parameter_equals_dinos(dtype: torch.dtype) -> None:
    config, t = _recorded("dino", dtype)
    clip = config["clip"]
    made = dino.head(config["heads"][clip["head"]], _below(t, f"state/{clip['head']}/")).to(dtype)
    named = dino.head_state(made)
    for key, p in named.items():
        p.grad = t[f"grad/{clip['head']}/{key}"].clone()
    norms = dict(zip(dict(made.named_parameters()), dino.clip_gradients(made, clip["max"]), strict=True))
    order = {id(p): norms[name] for name, p in made.named_parameters()}
    _close([order[id(named[key])] for key in clip["names_in_order_of_norms"]], t["output/clip/norms"])
    for key, p in named.items():
        _close(p.grad, t[f"grad/clip/{key}"], key)


def test_schedules_equal_dinos() -> None:
    config, t = _recorded("dino", torch.float64)
    for name, arguments in config["schedules"].items():
        _close(dino.cosine_scheduler(**arguments), t[f"output/schedules/{name}"], name)
    wanted = config["schedules"]["momentum"]
    steps = wanted["epochs"] * wanted["niter_per_ep"]
    ours = [teacher.momentum(wanted["base_value"], wanted["final_value"], step, steps) for step in range(steps)]
    _close(ours, t["output/schedules/momentum"])


class _Backbone(nn.Module):
    """What stands in for an encoder in the recording."""

    def __init__(self, wide: int, features: int):
        super().__init__()
        self.proj, self.norm = nn.Linear(wide, features), nn.LayerNorm(features, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(nn.functional.gelu(self.proj(x)))


@both
def test_three_epochs_of_training_equal_dinos(dtype: torch.dtype) -> None:
    config, t = _recorded("dino", dtype)
    train = config["train"]

    def modules(who: str) -> nn.ModuleDict:
        state = _below(t, f"state/train/{who}/")
        backbone = _Backbone(train["in"], train["head"]["in_dim"])
        backbone.load_state_dict(_below(state, "backbone."))
        head = dino.head(train["head"], _below(state, "head."))
        return nn.ModuleDict({"backbone": backbone, "head": head}).to(dtype)

    per_epoch, (base, final, more) = train["iterations_per_epoch"], train["lr"]
    lr, _ = dino.settings(base, final, train["epochs"], per_epoch, **more)
    loss = dino.Loss(**train["loss"])
    training = dino.Training(
        modules("student"),
        modules("teacher"),
        loss,
        lr=lr,
        weight_decay=tuple(train["wd"][:2]),
        momentum=tuple(train["momentum"][:2]),
        epochs=train["epochs"],
        niter_per_ep=per_epoch,
        clip_grad=train["clip_grad"],
        freeze_last_layer=train["freeze_last_layer"],
    )
    for i in range(train["epochs"] * per_epoch):
        _close(training.rates, torch.stack([t[f"output/train/{x}"][i] for x in ("lr", "weight_decay", "momentum")]))
        _close(training([*t[f"input/train/{i}/crops"]]), t["output/train/loss"][i], f"loss {i}")
        if (i + 1) % per_epoch:
            continue
        at = f"output/train/epoch{i // per_epoch}"
        _close(loss.center[None], t[f"{at}/center"])
        of_teacher = {name.replace("prototypes", "last_layer"): b for name, b in training.teacher.named_buffers()}
        student = {name.replace("prototypes", "last_layer"): p for name, p in training.student.named_parameters()}
        for who, ours in (("student", student), ("teacher", of_teacher)):
            recorded = _below(t, f"{at}/{who}/")
            assert ours.keys() == recorded.keys() - {"head.last_layer.weight_g"}
            for key, value in ours.items():
                _close(value, recorded[key], f"{at} {who} {key}")


# ---- DINOv2


@both
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_knopp_equals_dinov2s(iterations: int, dtype: torch.dtype) -> None:
    config, t = _recorded("dinov2", dtype)
    ours = dinov2.sinkhorn_knopp_teacher(t["input/cls/teacher"], config["cls"]["teacher_temp"], iterations)
    _close(ours, t[f"output/cls/sinkhorn_{iterations}"])


@both
@pytest.mark.parametrize(("part", "key", "cut"), [("cls", "input/cls/teacher", 6), ("ibot", "input/ibot/teacher", 23)])
def test_sinkhorn_knopp_of_two_ranks_equals_that_of_one(part: str, key: str, cut: int, dtype: torch.dtype) -> None:
    """Chunks of one rank are added up like ranks."""
    from vimscale.objectives import distillation_losses as losses

    config, t = _recorded("dinov2", dtype)
    rows, temperature = t[key].split([cut, len(t[key]) - cut]), config[part]["teacher_temp"]
    made: list[Callable[[], Tensor]] = [partial(Tensor.clone, each) for each in rows]
    bias = losses.sinkhorn_bias(made, [None, None], temperature, 3, lambda x: x, lambda x: x)
    for rank, each in enumerate(rows):
        _close(losses.targets(each, temperature, bias), t[f"output/ranks2/rank{rank}/{part}/sinkhorn"])
    padded = [partial(torch.cat, [each, torch.randn_like(each)]) for each in rows]
    weights = [torch.cat([torch.ones(len(each)), torch.zeros(len(each))]).to(dtype) for each in rows]
    torch.testing.assert_close(
        losses.sinkhorn_bias(padded, [*weights], temperature, 3, lambda x: x, lambda x: x).exp()
        / losses.sinkhorn_bias(made, [None, None], temperature, 3, lambda x: x, lambda x: x).exp(),
        torch.ones(t[key].shape[1], dtype=dtype),
    )


@both
def test_the_loss_of_class_tokens_equals_dinov2s(dtype: torch.dtype) -> None:
    config, t = _recorded("dinov2", dtype)
    targets = dinov2.sinkhorn_knopp_teacher(t["input/cls/teacher"], config["cls"]["teacher_temp"])
    students = [t[f"input/cls/student_{which}"].requires_grad_() for which in ("global", "local")]
    total = dinov2.class_token_loss(*students, targets, config["cls"]["student_temp"])
    total.backward()
    _close(total, t["output/cls/total"])
    for which, student in zip(("global", "local"), students, strict=True):
        _close(student.grad, t[f"grad/cls/student_{which}"], which)
    only = dinov2.class_token_loss(students[0], None, targets, config["cls"]["student_temp"])
    _close(only, t["output/cls/global"])


@both
def test_centering_equals_dinov2s(dtype: torch.dtype) -> None:
    config, t = _recorded("dinov2", dtype)
    centering = dinov2.Centering(config["cls"]["out_dim"], config["cls"]["center_momentum"])
    for i, temperature in enumerate(config["cls"]["centering_temps"]):
        _close(centering.center[None].to(dtype), t[f"output/cls/centering/{i}/center_used"])
        target = centering(t[f"input/cls/centering/{i}/teacher"], temperature)
        _close(target, t[f"output/cls/centering/{i}/target"])
    _close(centering.center[None], t["output/cls/centering/final_center"])
    patches = dinov2.Centering(config["ibot"]["out_dim"], config["ibot"]["center_momentum"])
    for i, temperature in enumerate(config["ibot"]["centering_temps"]):
        at = f"ibot/centering/{i}"
        _close(patches.center[None, None].to(dtype), t[f"output/{at}/center_used"])
        target = patches(t[f"input/{at}/teacher"], temperature)
        _close(target, t[f"output/{at}/target"])
        student = t["input/ibot/student"].clone().requires_grad_()
        loss = dinov2.ibot_loss(student, target, t["mask/ibot/masks"])
        loss.backward()
        _close(loss, t[f"output/{at}/loss"])
        _close(student.grad, t[f"grad/{at}/student"])
    _close(patches.center[None, None], t["output/ibot/centering/final_center"])


@both
def test_the_loss_of_masked_patches_equals_dinov2s(dtype: torch.dtype) -> None:
    config, t = _recorded("dinov2", dtype)
    temperature = config["ibot"]["teacher_temp"]
    target = dinov2.sinkhorn_knopp_teacher(t["input/ibot/teacher"], temperature)
    _close(target, t["output/ibot/sinkhorn"])
    masks = t["mask/ibot/masks"]
    for name, weights in (("given_weights", t["mask/ibot/masks_weight"]), ("own_weights", None)):
        student = t["input/ibot/student"].clone().requires_grad_()
        loss = dinov2.ibot_loss(student, target, masks, weights)
        loss.backward()
        _close(loss, t[f"output/ibot/{name}/loss"], name)
        _close(student.grad, t[f"grad/ibot/{name}/student"], name)
    dense = t["input/ibot/dense_student"].clone().requires_grad_()
    target = (t["input/ibot/dense_teacher"] / temperature).softmax(dim=-1)
    _close(target, t["output/ibot/dense_target"])
    loss = dinov2.ibot_loss_dense(dense, target, masks)
    loss.backward()
    _close(loss, t["output/ibot/dense_loss"])
    _close(dense.grad, t["grad/ibot/dense_student"])


@both
@pytest.mark.parametrize("name", ["a", "b"])
def test_koleo_equals_dinov2s(name: str, dtype: torch.dtype) -> None:
    from vimscale.objectives import distillation_losses as losses

    _, t = _recorded("dinov2", dtype)
    x = t[f"input/koleo/{name}"].requires_grad_()
    loss = dinov2.koleo_loss(x)
    loss.backward()
    _close(loss, t[f"output/koleo/{name}/loss"])
    _close(x.grad, t[f"grad/koleo/{name}"])
    assert torch.equal(losses.nearest(losses.unit(x)), t[f"output/koleo/{name}/nearest"])


@both
@pytest.mark.parametrize("name", ["head", "head_no_bias"])
def test_heads_and_their_gradients_equal_dinov2s(name: str, dtype: torch.dtype) -> None:
    config, t = _recorded("dinov2", dtype)
    _check_head(dinov2.head(config["heads"][name], _below(t, f"state/{name}/")).to(dtype), t, name)


def test_arguments_and_weights_that_are_not_the_originals_are_refused() -> None:
    with pytest.raises(ValueError, match="DINOHead has no argument outdim; it has bottleneck_dim"):
        dino.head({"in_dim": 4, "outdim": 8})
    with pytest.raises(ValueError, match="use_bn: heads with batch norm are not supported"):
        dino.head({"in_dim": 4, "out_dim": 8, "use_bn": True})
    sizes = {"in_dim": 4, "out_dim": 8, "hidden_dim": 4, "bottleneck_dim": 3}
    free = dino.head({**sizes, "norm_last_layer": False})
    state = {name: p.detach() * 2 for name, p in dino.head_state(free).items()}
    with pytest.raises(ValueError, match="weight_g is not 1"):
        dino.head(sizes, state)
    with pytest.raises(ValueError, match="these weights are of another head"):
        dino.head({**sizes, "nlayers": 2, "norm_last_layer": False}, state)
