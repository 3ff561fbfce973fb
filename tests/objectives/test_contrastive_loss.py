"""SigLIP's and CLIP's losses equal recorded runs of open_clip, on one rank and several, in bounded memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.thread_ranks import ThreadContext, on_ranks
from vimscale.objectives import contrastive_loss
from vimscale.objectives.contrastive_loss import Contrast, Kind, Ranks, contrast
from vimscale.objectives.published.open_clip import Loss, Name, text_tower

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "objectives" / "contrastive.safetensors"
KINDS: tuple[Kind, ...] = ("siglip", "clip")
CASES: dict[str, tuple[Name, dict[str, Any]]] = {
    "clip": ("ClipLoss", {}),
    "clip_with_bias": ("ClipLoss", {}),
    "siglip": ("SigLipLoss", {}),
    "siglip_chunked": ("SigLipLoss", {"chunk_size": 5}),
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    if not GOLDEN.exists():
        pytest.skip(f"there are no recorded outputs of the original code at {GOLDEN}")
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is not a dict


def _close(ours: Tensor, theirs: Tensor, bound: float, what: str) -> None:
    assert ours.shape == theirs.shape, what
    off = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-6)
    assert off < bound, f"{what}: error {off:.1e} relative to the largest value"


def _inputs(recorded: dict[str, Tensor], case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    scalars = "siglip" if case.startswith("siglip") else "clip"
    found = {
        "image_features": recorded["input/image_features"],
        "text_features": recorded["input/text_features"],
        "log_logit_scale": recorded[f"input/{scalars}/log_logit_scale"],
    }
    if case != "clip":
        found["logit_bias"] = recorded["input/siglip/logit_bias"]
    return {name: t.to(dtype).requires_grad_() for name, t in found.items()}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_open_clip_on_one_rank(
    recorded: dict[str, Tensor], case: str, dtype: torch.dtype, bound: float
) -> None:
    inputs = _inputs(recorded, case, dtype)
    bias = inputs.get("logit_bias")
    features = inputs["image_features"], inputs["text_features"], inputs["log_logit_scale"]
    per_sample = contrastive_loss.losses(
        Loss(*CASES[case]).kind, *features, torch.zeros(()) if bias is None else bias
    ).mean()
    ours = Loss(*CASES[case])(*features[:2], features[2].exp(), bias)
    for loss in (ours, per_sample):
        grads = torch.autograd.grad(loss, list(inputs.values()))
        expected = recorded.get(f"output/{case}/loss", recorded["output/siglip/loss"])
        _close(loss.detach(), expected, bound, "loss")
        for name, grad in zip(inputs, grads, strict=True):
            key = f"grad/{case}/{name}"
            if case == "clip_with_bias" and name == "logit_bias":
                assert abs(grad) < 1e-6
            elif key in recorded:
                _close(grad, recorded[key], bound, key)
            else:
                _close(grad, recorded[f"grad/siglip/{name}"], bound, key)


def _on_ranks(size: int, kind: Kind, images: Tensor, texts: Tensor, scalars: tuple[Tensor, Tensor], logits: int) -> Any:
    """What `contrast` finds on each of `size` ranks."""

    def work(ranks: ThreadContext) -> Contrast:
        own = len(images) // size
        rows = slice(ranks.rank * own, (ranks.rank + 1) * own)
        meeting = Ranks(rows.start, lambda t: ranks.gather(t).flatten(0, 1), ranks.add)
        return contrast(kind, images[rows], texts[rows], *scalars, meeting, logits)

    return on_ranks(size, work)


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        *((f"siglip/ranks2/{how}", {"dist_impl": how}) for how in ("bidir", "shift", "reduce", "gather")),
        ("clip/ranks2/local0_grad0", {"local_loss": False, "gather_with_grad": False}),
        ("clip/ranks2/local0_grad1", {"local_loss": False, "gather_with_grad": True}),
        ("clip/ranks2/local1_grad1", {"local_loss": True, "gather_with_grad": True}),
    ],
)
def test_losses_and_gradients_equal_open_clip_on_two_ranks(
    recorded: dict[str, Tensor], case: str, arguments: dict[str, Any]
) -> None:
    published = Loss("SigLipLoss" if case.startswith("siglip") else "ClipLoss", arguments | {"world_size": 2})
    inputs = _inputs(recorded, case.partition("/")[0], torch.float32)
    images, texts, log_scale = (inputs[n] for n in ("image_features", "text_features", "log_logit_scale"))
    bias = inputs.get("logit_bias", torch.zeros(()))
    found = _on_ranks(2, published.kind, images.detach(), texts.detach(), (log_scale.detach(), bias.detach()), 36)
    mean = sum(recorded[f"output/{case}/rank{rank}/loss"] for rank in range(2)) / 2
    for rank, ours in enumerate(found):
        _close(ours.loss, mean, 1e-5, "loss")
        for name, grad in (("image_features", ours.images), ("text_features", ours.texts)):
            key = f"grad/{case}/rank{rank}/{name}"
            _close(published.factor * grad, recorded[key], 1e-5, key)
    if published.factor == 2:
        names = ["log_logit_scale", "logit_bias"] if published.kind == "siglip" else ["log_logit_scale"]
        for name, grad in zip(names, (found[0].log_scale, found[0].bias), strict=False):
            both = sum(recorded[f"grad/{case}/rank{rank}/{name}"] for rank in range(2))
            _close(2 * grad, both, 1e-5, name)


def test_gradients_that_open_clip_loses_are_refused() -> None:
    with pytest.raises(ValueError, match="loses the gradients by other ranks' features"):
        Loss("ClipLoss", {"local_loss": True, "gather_with_grad": False, "world_size": 2})


def _pairs(n: int, w: int, seed: int = 0) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = (nn.functional.normalize(torch.randn(n, w, generator=generator), dim=1) for _ in range(2))
    return images, texts, (torch.tensor(2.5), torch.tensor(-4.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_number_of_ranks_and_any_chunk_give_the_same(kind: Kind, size: int) -> None:
    images, texts, scalars = _pairs(24, 7)
    whole = contrast(kind, images, texts, *scalars)
    for logits in (1, 24 * 4 - 1, 10**6):
        found = _on_ranks(size, kind, images, texts, scalars, logits)
        _close(torch.cat([each.images for each in found]), whole.images, 1e-5, "images")
        _close(torch.cat([each.texts for each in found]), whole.texts, 1e-5, "texts")
        for each in found:
            for name in ("loss", "log_scale"):
                _close(getattr(each, name), getattr(whole, name), 1e-5, name)
            assert torch.allclose(each.bias, whole.bias, atol=1e-6)
            assert all(torch.equal(getattr(each, n), getattr(found[0], n)) for n in ("loss", "log_scale", "bias"))


class _Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_logits_exist_at_once_than_a_chunk_has(kind: Kind) -> None:
    images, texts, scalars = _pairs(256, 8)
    with _Largest() as seen:
        contrast(kind, images, texts, *scalars, logits=4096)
    assert seen.elements == 4096
    with _Largest() as seen:
        contrast(kind, images, texts, *scalars)
    assert seen.elements == 256 * 256


def test_extreme_logits_give_finite_losses_and_gradients() -> None:
    images = _pairs(16, 4)[0]
    for kind in KINDS:
        found = contrast(kind, images, -images, torch.tensor(100.0).log(), torch.tensor(-10.0))
        assert all(t.isfinite().all() for t in vars(found).values())


def test_text_towers_of_open_clip_convert_and_compute_as_torchs_own_transformer() -> None:
    """open_clip's blocks are torch's pre-norm encoder layers, under other names."""
    torch.manual_seed(0)
    d, heads, depth, context, vocabulary, features = 24, 3, 2, 9, 40, 10
    layers = [
        nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    token, position = nn.Embedding(vocabulary, d), nn.Parameter(torch.randn(context, d))
    final, projection = nn.LayerNorm(d), torch.randn(d, features)
    renamed = {"norm1": "ln_1", "norm2": "ln_2", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj", "self_attn": "attn"}
    state = {"token_embedding.weight": token.weight, "positional_embedding": position, "text_projection": projection}
    state |= {f"ln_final.{name}": torch.randn_like(p) for name, p in final.named_parameters()}
    final.load_state_dict({name: state[f"ln_final.{name}"] for name in ("weight", "bias")})
    for i, layer in enumerate(layers):
        for name, p in layer.named_parameters():
            nn.init.normal_(p, std=0.3)
            first, _, rest = name.partition(".")
            state[f"transformer.resblocks.{i}.{renamed[first]}.{rest}"] = p
    arguments = {"width": d, "heads": heads, "layers": depth, "context_length": context, "vocab_size": vocabulary}
    tower = text_tower(arguments | {"embed_dim": features}, state)
    tokens = torch.tensor([[38, 5, 6, 39, 0, 0, 0, 0, 0], [38, 1, 2, 3, 4, 5, 6, 7, 39]])
    x = token(tokens) + position
    for layer in layers:
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(context), is_causal=True)
    expected = final(x[torch.arange(2), tokens.argmax(dim=1)]) @ projection
    _close(tower(tokens.int()).detach(), expected.detach(), 1e-5, "features")
    with pytest.raises(ValueError, match="the state lacks ln_final"):
        text_tower(arguments, {})
    with pytest.raises(ValueError, match="pool_type 'last': only towers with 'argmax' can be converted"):
        text_tower(arguments | {"pool_type": "last"}, state)


def test_recorded_settings_are_those_that_the_tests_assume() -> None:
    if not GOLDEN.exists():
        pytest.skip(f"there are no recorded outputs of the original code at {GOLDEN}")
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
    assert (config["chunk_size"], config["worlds"]) == (5, [2])
