"""Encoding parts of images: packed parts compute what separate images do, and selections keep the order of tokens."""

import pytest
import torch

from vimscale.model import VimConfig, VisionMamba
from vimscale.model.layout import layout
from vimscale.model.tokens import plane_sincos

SHAPE = {"num_classes": 0, "image_size": 32, "patch_size": 8, "d_model": 32, "depth": 4}


def _model(**changes: object) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(VimConfig(**(SHAPE | {"directions": "bi*4"} | changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"registers": 3},
        {"cls_token": "both", "pos_embed": "sincos"},
        {"cls_token": "none", "directions": "fwd bi@column cross attn", "d_head": 16},
        {"directions": "(fwd bwd)*2", "pos_embed": False},
    ],
)
def test_parts_of_a_row_compute_what_separate_images_do(changes: dict[str, object]) -> None:
    model = _model(**changes)
    large, small = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 16, 24)
    parts = [(model.patches(large), (4, 4)), (model.patches(small), (2, 3))]
    encoded = model.encode(parts, layers=[1, -1])
    first, second = model.pooled(encoded)
    torch.testing.assert_close(first, model(large, features=True))
    torch.testing.assert_close(second, model(small, features=True))
    alone = model.encode(parts[1:], layers=[1, -1])
    (_, (span, grid)) = encoded.parts
    assert grid == (2, 3)
    torch.testing.assert_close(encoded.tokens[:, span], alone.tokens)
    for tap, other in zip(encoded.taps, alone.taps, strict=True):
        torch.testing.assert_close(tap[:, span], other)


def test_the_class_token_is_in_the_middle_of_a_selection() -> None:
    model = _model()
    patches = model.patches(torch.randn(1, 3, 32, 32))
    kept = patches[:, [0, 3, 4, 9, 15]]
    assert layout(model.config, (1, 5)).cls == (2,)
    tapped = model.encode([(kept, (1, 5))], layers=[0]).taps[0]
    assert tapped.shape == (1, 6, 32)
    whole = model.encode([(patches, (4, 4))]).tokens
    torch.testing.assert_close(whole, model.encode([(patches, (1, 16))]).tokens)


def test_gradients_reach_every_token_that_is_encoded_and_no_other() -> None:
    model = _model()
    patches = model.patches(torch.randn(2, 3, 32, 32)).detach().requires_grad_()
    (pooled,) = model.pooled(model.encode([(patches[:, 5:9], (1, 4))]))
    pooled.sum().backward()
    assert patches.grad is not None
    touched = patches.grad.abs().sum(dim=(0, 2)) > 0
    assert touched.tolist() == [5 <= i < 9 for i in range(16)]


def test_fixed_positions_are_sines_of_column_and_row() -> None:
    table = plane_sincos((3, 5), 8)
    x, y = 4, 2  # of the last cell
    angles = [[at * 10000 ** -(i / 2) for i in range(2)] for at in (x, y)]
    expected = [wave(torch.tensor(angle)) for angle in angles for wave in (torch.sin, torch.cos)]
    torch.testing.assert_close(torch.tensor(table[-1]), torch.cat(expected).double(), atol=1e-6, rtol=0)
    model = _model(pos_embed="sincos", d_model=32)
    assert "pos_embed" not in dict(model.named_parameters())


def test_a_model_without_classes_has_no_head() -> None:
    model = _model()
    assert not any(name.startswith("head") for name, _ in model.named_parameters())
    assert model(torch.randn(1, 3, 32, 32), features=True).shape == (1, 32)
    with pytest.raises(ValueError, match="was trained without classes and has no head: ask for features"):
        model(torch.randn(1, 3, 32, 32))


def test_what_cannot_be_encoded_in_parts_is_refused() -> None:
    model = _model()
    patches = model.patches(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="there is no layer 4: count from 0 to 3"):
        model.encode([(patches, (4, 4))], layers=[4])
    model.context = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="only on one rank and without stages"):
        model.encode([(patches, (4, 4))])
