"""Bags of tiles: one sequence per very large image, with positions from coordinates."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.models import computes_the_same
from vimscale.data.shards.manifest import Manifest
from vimscale.errors import CheckpointError
from vimscale.export import published, safetensors, starting
from vimscale.model import VimConfig, VisionMamba, tiles
from vimscale.model.cost import costs, flops, parameters
from vimscale.model.layout import layout
from vimscale.model.presets import OwnKind, Stage
from vimscale.model.tiles import Bag, Coordinates

BAGS = VimConfig(
    num_classes=5,
    image_size=8,
    tiles=8,
    patch_size=4,
    pos_embed="coordinates",
    d_model=16,
    depth=4,
    d_state=4,
    directions="bi pair*2 attn",
    d_head=8,
    registers=3,
)
WITHOUT_CLASS = dataclasses.replace(BAGS, cls_token="none", registers=0, directions="bi shared fwd bwd")


def _model(config: VimConfig = BAGS) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def _bag(*at: tuple[int, int], seed: int = 1) -> Bag:
    tiles = torch.randn(len(at), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Bag(tiles, torch.tensor(at, dtype=torch.int32))


def _cut(image: Tensor, side: int = 8) -> Bag:
    """All tiles of an image (3, h, w), by row and column."""
    tiles = image.unfold(1, side, side).unfold(2, side, side)  # (3, rows, columns, side, side)
    rows, columns = tiles.shape[1:3]
    at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).int() * side
    return Bag(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous(), at)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)  # fp32 sums in another order


# ---- a bag and an image


@pytest.mark.parametrize("config", [BAGS, WITHOUT_CLASS], ids=["registers", "no class token"])
def test_an_image_cut_into_one_tile_gives_what_the_image_gives(config: VimConfig) -> None:
    model, image = _model(config), torch.randn(1, 3, 8, 8)
    bag = Bag(image, torch.zeros(1, 2, dtype=torch.int32))
    assert torch.equal(model([bag]), model(image))


def test_a_bag_of_a_large_tile_gives_what_a_model_of_images_gives() -> None:
    of_images = dataclasses.replace(BAGS, tiles=None, image_size=(24, 16))
    model, other = _model(), VisionMamba(of_images)
    other.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 24, 16)
    assert torch.equal(model([Bag(image, torch.zeros(1, 2, dtype=torch.int32))]), other(image))


def test_tokens_are_those_of_the_image_tile_after_tile_and_row_after_row() -> None:
    model, image = _model(WITHOUT_CLASS), torch.randn(3, 16, 24)
    of_image, _ = model._embed(image[None])
    of_bag, _ = model._embed(_cut(image))
    cells = torch.arange(4 * 6).view(4, 6)
    order = torch.cat([cells[r : r + 2, c : c + 2].flatten() for r in (0, 2) for c in (0, 2, 4)])
    assert _close(of_bag, of_image[:, order])
    assert not _close(of_bag, of_image)


def test_class_token_and_registers_are_placed_as_for_an_image_of_that_many_tokens() -> None:
    model, bag = _model(), _bag((0, 0), (0, 8), (40, 16))
    x, tokens = model._embed(bag)
    slots = layout(BAGS, (6, 2))
    assert tokens.rows == (((6, 2),),)
    assert tokens.reset is None
    assert x.shape == (1, 12 + 1 + 3, 16)
    assert model.cls_token is not None
    assert model.registers is not None
    assert torch.equal(x[0, list(slots.cls)], model.cls_token)
    assert torch.equal(x[0, list(slots.registers)], model.registers)
    alone = torch.cat([model._patches(t[None], at[None])[0] for t, at in zip(bag.tiles, bag.at, strict=True)])
    assert _close(slots.image_tokens(x)[0], alone)


# ---- positions


def test_positions_depend_on_coordinates_alone() -> None:
    of = Coordinates(BAGS, 16)
    of.init_weights()
    at = torch.tensor([[0, 0], [8, 1024], [3, 5]], dtype=torch.int32)
    both, image = of(at, (2, 2)), of(None, (4, 300))
    assert both.dtype == torch.float32
    assert torch.equal(of(at[[2, 0, 1]], (2, 2)), both[[2, 0, 1]])
    assert torch.equal(both[0], image.unflatten(1, (4, 300))[0, :2, :2].flatten(0, 1))
    assert torch.equal(both[1], image.unflatten(1, (4, 300))[0, 2:4, 256:258].flatten(0, 1))
    assert len(torch.cat([both[2], image[0]]).unique(dim=0)) == 4 + 1200


def test_positions_far_away_are_those_of_exact_arithmetic() -> None:
    of = Coordinates(BAGS, 16)
    of.init_weights()
    at = torch.tensor([[1_000_000, 200_000]], dtype=torch.int32)
    angles = at.double()[0, :, None] / 4 * 10_000 ** -(torch.arange(4).double() / 4)  # (2, d / 4)
    exact = torch.cat([angles.sin(), angles.cos()], dim=1).flatten()
    # fp32 has 24 bits: the frequency's last one is worth 250,000 x 2^-25 of an angle
    assert (of(at, (1, 1))[0, 0] - exact).abs().max() < 2e-2
    assert torch.equal(of(at, (2, 2))[0, 0], of(at, (1, 1))[0, 0])


def test_a_bag_far_away_is_another_input_and_without_positions_the_same() -> None:
    near, far = _bag((0, 0), (8, 8)), _bag((0, 0), (800, 8))
    assert not _close(_model()([near]), _model()([far]))
    blind = _model(dataclasses.replace(BAGS, pos_embed=False))
    assert torch.equal(blind([near]), blind([far]))


# ---- several bags


def test_bags_are_packed_and_each_gives_what_it_gives_alone() -> None:
    model = _model()
    bags = [_bag(*((8 * i, 16) for i in range(count)), seed=count) for count in (2, 5, 1, 3)]
    alone = torch.cat([model([bag]) for bag in bags])
    assert _close(model(bags), alone)
    x, tokens, packed = model._embed_packed(bags)
    assert packed is not None
    assert tokens.reset is not None
    assert len(x) < len(bags)
    starts = {(image.row, image.start) for image in packed}
    marked = {(int(row), int(start)) for row, start in tokens.reset.nonzero()}
    assert starts <= marked
    assert len(marked - starts) <= len(x), "only a row's padding has a further mark"


def test_drop_path_drops_bags_as_it_drops_images() -> None:
    config = dataclasses.replace(BAGS, drop_path=0.5)
    model, bags = _model(config), [_bag((0, 0), (8, 0)), _bag((0, 8), seed=2)]
    draws = torch.tensor([[0.9, 0.9, 0.9, 0.1], [0.9, 0.1, 0.9, 0.9]])
    alone = torch.cat([model([bag], draw[None]) for bag, draw in zip(bags, draws, strict=True)])
    assert _close(model(bags, draws), alone)
    assert not _close(model(bags), alone)


# ---- gradients and memory


@pytest.mark.parametrize("level", ["none", "scan", "block"])
def test_gradients_reach_every_parameter_and_tile(level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bag = _bag(*((8 * (i // 3), 8 * (i % 3)) for i in range(7)))
    bag.tiles.requires_grad_()
    found = []
    for at_once in (64, 2):
        monkeypatch.setattr(tiles, "AT_ONCE", at_once)
        model = _model()
        model.recompute = [level] * 4
        loss = model([bag]).square().sum()
        named = dict(model.named_parameters())
        found.append(dict(zip([*named, "tiles"], torch.autograd.grad(loss, [*named.values(), bag.tiles]), strict=True)))
    assert all(gradient.abs().sum() > 0 for gradient in found[0].values())
    assert (found[0]["tiles"].abs().sum(dim=(1, 2, 3)) > 0).all()
    assert all(_close(found[1][name], gradient) for name, gradient in found[0].items())


def test_a_large_bag_keeps_no_activations_of_its_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(WITHOUT_CLASS, stem="conv")
    model, bag = _model(config), _bag(*((8 * i, 0) for i in range(32)))

    def kept() -> int:
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            keep = model._embed(bag)
        assert keep
        given = {t.untyped_storage().data_ptr() for t in (*bag, *model.parameters())}
        return sum(size for pointer, size in sizes.items() if pointer not in given)

    at_once = kept()
    monkeypatch.setattr(tiles, "AT_ONCE", 4)
    assert kept() < at_once / 50


# ---- features of tiles


@pytest.mark.parametrize("config", [BAGS, WITHOUT_CLASS], ids=["registers", "no class token"])
def test_features_of_tiles_are_the_means_of_their_tokens(config: VimConfig) -> None:
    model, bag = _model(config), _bag((0, 0), (0, 8), (40, 16))
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda *call: seen.append(call[2][0]))
    features = model.tile_features(bag)
    assert features.shape == (3, 16)
    image = layout(config, (6, 2)).image_tokens(seen[0])[0]
    for i in range(3):
        assert torch.allclose(features[i], image[4 * i : 4 * i + 4].mean(dim=0))
    if config.pooling == "mean":
        assert _close(features.mean(dim=0), model([bag], features=True)[0])


# ---- what does not fit together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": True}, "pos_embed true or sincos is for one grid: use coordinates"),
        ({"image_size": 224}, "image_size 224 does not consist of tiles: use image_size 8"),
        ({"image_size": (16, 16)}, r"image_size \(16, 16\) does not consist of tiles"),
        ({"image_size": 6, "tiles": 6, "registers": 0}, "tiles 6 is not a multiple of patch_size 4; use 4 or 8"),
        ({"directions": "bi@column bi@snake cross bi@window"}, "bi@column, bi@snake, cross, bi@window needs one grid"),
        ({"d_model": 18, "directions": "bi*4"}, "needs a multiple of 4 channels, and d_model is 18"),
        ({"tiles": 0}, "tiles is 0; it must be at least 1"),
        (
            {"cls_token": "none", "registers": 0, "stages": (Stage(depth=4, d_model=16),)},
            "stages merge the tokens of one grid: leave one of them out",
        ),
    ],
)
def test_tiles_are_refused_with_one_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(BAGS, **changes)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_of_images_and_an_empty_bag_are_refused() -> None:
    with pytest.raises(ValueError, match="the model takes images, not bags"):
        _model(dataclasses.replace(BAGS, tiles=None))([_bag((0, 0))])
    with pytest.raises(ValueError, match="a bag has no tiles"):
        _model()([Bag(torch.zeros(0, 3, 8, 8), torch.zeros(0, 2))])
    with pytest.raises(ValueError, match="do not fill an image of 6 x 8 pixels"):
        _model()([Bag(torch.zeros(1, 3, 6, 8), torch.zeros(1, 2))])
    with pytest.raises(ValueError, match="tokens and maps need images of one size"):
        _model().forward_intermediates([_bag((0, 0))])  # type: ignore[arg-type]


def test_layers_of_ones_own_see_bags() -> None:
    kind = OwnKind(name="gate", kind=str(Path(__file__).parents[2] / "examples" / "own_layer.py:GatedConv"))
    model = _model(dataclasses.replace(BAGS, kinds=(kind,), directions="gate bi*3"))
    assert model([_bag((0, 0), (8, 8))]).shape == (1, 5)


# ---- counts and files


def test_costs_are_those_of_an_image_of_as_many_tokens() -> None:
    bag = BAGS.with_bag_size(6)
    image = dataclasses.replace(BAGS, tiles=None, image_size=(24, 16))
    assert (bag.bag_size, bag.patches, bag.tokens) == (6, 24, 28)
    assert flops(bag) == flops(image)
    assert [part.tokens for part in costs(bag)] == [part.tokens for part in costs(image)]
    assert parameters(bag) == parameters(BAGS) == sum(p.numel() for p in _model().parameters())
    apart = dataclasses.replace(BAGS, stride=2)
    assert apart.with_bag_size(6).patches == 6 * 9
    assert _model(apart)([_bag((0, 0), (8, 0))]).shape == (1, 5)


def test_weights_in_products_and_decay_leave_positions_alone() -> None:
    model = _model()
    assert "coordinates.scale" in model.no_weight_decay()
    assert "coordinates.scale" not in model.product_weights()


MANIFEST = Manifest("five", tuple("abcde"), shards=(), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def test_exports_hold_tiles_and_the_published_format_refuses_them(tmp_path: Path) -> None:
    assert VimConfig.from_dict(json.loads(json.dumps(BAGS.to_dict()))) == BAGS
    model, bag = _model().eval(), _bag((0, 0), (64, 8))
    safetensors.write(tmp_path / "ours", model, MANIFEST, {})
    loaded = safetensors.load(tmp_path / "ours")
    assert loaded.config == BAGS
    assert torch.equal(loaded.tile_features(bag), model.tile_features(bag))
    assert computes_the_same(loaded, model)
    with pytest.raises(CheckpointError, match="cannot express this model") as caught:
        published.write(tmp_path / "theirs", _model(dataclasses.replace(BAGS, directions="bi*4")), MANIFEST)
    assert "tiles 8: only None" in str(caught.value)
    assert "pos_embed coordinates: only True or False" in str(caught.value)


def test_exports_from_before_there_were_tiles_load(tmp_path: Path) -> None:
    model = _model(dataclasses.replace(BAGS, tiles=None, pos_embed=True)).eval()
    safetensors.write(tmp_path, model, MANIFEST, {})
    tree = json.loads((tmp_path / "config.json").read_text())
    del tree["model"]["tiles"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(safetensors.load(tmp_path)(image), model(image))


def test_a_model_of_bags_starts_from_one_of_images(tmp_path: Path) -> None:
    old = _model(dataclasses.replace(BAGS, tiles=None)).eval()
    safetensors.write(tmp_path, old, MANIFEST, {})
    notes = starting.compare(starting.read(tmp_path), BAGS, MANIFEST)
    assert notes == ["tiles: the weights have seen images, here the model sees bags of tiles of 8 pixels"]
    state, _ = safetensors.starting_weights(tmp_path, BAGS, MANIFEST)
    new = VisionMamba(BAGS).eval()
    new.load_state_dict(state)
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(new([Bag(image, torch.zeros(1, 2, dtype=torch.int32))]), old(image))
    with pytest.raises(CheckpointError, match="pos_embed: the weights have coordinates, the recipe false"):
        starting.compare(starting.read(tmp_path), dataclasses.replace(BAGS, pos_embed=False), MANIFEST)
