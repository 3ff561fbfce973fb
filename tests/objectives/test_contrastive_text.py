"""Captions, their tokens, and samples without them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vimscale.data.dataset import Dataset
from vimscale.data.sample import Sample
from vimscale.data.shards.manifest import write_set
from vimscale.data.stream import Batch, evaluation, training
from vimscale.data.training_set import TrainingSet
from vimscale.errors import BadSample, DataError, RecipeError
from vimscale.objectives.build import build
from vimscale.objectives.contrastive import Contrastive
from vimscale.objectives.text import tokenizer
from vimscale.objectives.text.captions import caption
from vimscale.objectives.text.tower import TextTower
from vimscale.recipe import recipe as recipes
from vimscale.recipe.recipe import Recipe

# ---- tokenizers

RECORDED = {
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "Don't we'll they're it's 'quoted' ''s": [847, 713, 649, 1342, 889, 982, 585, 568, 262, 27706, 262, 8445, 338],
    "ABC123def 4x4 3.14": [5334, 272, 273, 274, 11649, 275, 343, 275, 274, 269, 272, 275],
    "naïve café Ærøskøbing": [1097, 35689, 563, 15304, 42495, 81, 17483, 909, 17483, 5665],
    "Привет, мир!": [26302, 16370, 29503, 110, 22176, 141, 480, 267, 38018, 16701, 141, 478, 256],
    "emoji 😀🎉 ❤️": [16327, 12832, 3986, 1752],
    "a &amp;amp; b &lt;x&gt;": [320, 261, 321, 283, 343, 285],
    "under_score __init__": [1798, 318, 4431, 3838, 42670, 3838],
    "Tom\u2019s \u201cbest\u201d dog": [2435, 568, 257, 949, 257, 1929],
    "½ ² Ⅷ ٣ x٣y": [33613, 41175, 158, 227, 371, 149, 352, 343, 149, 352, 344],
    "a" * 100: [23126] * 12 + [19336],
    "  hello\n\tworld  x": [3306, 1002, 343],
    "": [],
}
"""Tokens of the original, openai/CLIP's `SimpleTokenizer` as clip-anytorch 2.6.0 has it, with ftfy 6.3.1."""


@pytest.mark.parametrize("text", RECORDED)
def test_clips_tokenizer_gives_the_originals_tokens(text: str) -> None:
    assert tokenizer.load("clip").encode(text) == RECORDED[text]
    assert tokenizer.load("clip").size == 49_408


def test_a_row_has_start_end_and_padding_and_is_cut_before_its_end_token() -> None:
    clip, byte = tokenizer.load("clip"), tokenizer.load("bytes")
    row = tokenizer.row(clip, "a cat", 6)
    assert (row.tokens.tolist(), row.needed) == ([49406, 320, 2368, 49407, 0, 0], 4)
    cut = tokenizer.row(byte, "hé  you", 5)
    assert (cut.tokens.tolist(), cut.needed) == ([256, 104, 195, 169, 257], 9)
    assert all(int(each.tokens.argmax()) == at for each, at in ((row, 3), (cut, 4)))


@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_change_a_texts_features(causal: bool) -> None:
    torch.manual_seed(0)
    tower = TextTower(vocabulary=258, context=20, d=16, depth=2, heads=2, features=8, causal=causal)
    for module in tower.modules():
        if (init := getattr(module, "init_weights", None)) is not None:
            init()
    long, short = (tokenizer.row(tokenizer.load("bytes"), "a text", n).tokens[None] for n in (20, 8))
    changed = long.clone()
    changed[0, 8:] = 7
    assert torch.allclose(tower(long), tower(short), atol=1e-6)
    assert torch.equal(tower(long), tower(changed))
    other = long.clone()
    other[0, 1] += 1
    assert not torch.allclose(tower(long), tower(other), atol=1e-4)


# ---- captions


def _sample(**members: bytes) -> Sample:
    return Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), 0, "a", {"png": b"", **members}, (4, 4), "cat")


def test_captions_come_from_members_fields_and_classes() -> None:
    rng = np.random.default_rng(0)
    sample = _sample(
        txt="\ufeff a caf\u00e9 \n".encode(), json=json.dumps({"text": "b", "all": ["c", "", "d"]}).encode()
    )
    assert caption(sample, "txt", (), rng) == "a café"
    assert caption(sample, "json:text", (), rng) == "b"
    assert {caption(sample, "json:all", (), rng) for _ in range(20)} == {"c", "d"}
    assert {caption(sample, "class", ("a {}", "the {}"), rng) for _ in range(20)} == {"a cat", "the cat"}


@pytest.mark.parametrize(
    ("members", "source", "fault"),
    [
        ({}, "txt", r"no member \.txt, the caption \(objective\.caption: txt\)"),
        ({"txt": b" \n"}, "txt", r"its \.txt, the caption, is empty"),
        ({}, "json:text", r"no member \.json"),
        ({"json": b"{"}, "json:text", r"\.json cannot be read"),
        ({"json": b"[1]"}, "json:text", r"no text in field 'text' of its \.json"),
        ({"json": b'{"text": 3}'}, "json:text", r"no text in field 'text' of its \.json"),
        ({"json": b'{"text": ["", " "]}'}, "json:text", r"no text in field 'text' of its \.json"),
    ],
)
def test_a_sample_without_a_caption_is_bad(members: dict[str, bytes], source: str, fault: str) -> None:
    with pytest.raises(BadSample, match=fault) as raised:
        caption(_sample(**members), source, (), np.random.default_rng(0))
    assert raised.value.cause == "no caption"


# ---- in the data stream


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A set of 60 digits with captions in .txt; each sixth has none, or a blank one."""
    folder = tmp_path_factory.mktemp("captioned") / "train"
    source = Dataset.open(str(digits / "train"))

    def samples() -> Any:
        for i in range(60):
            members = source.read(0, i)
            text = {0: {}, 3: {"txt": b" "}}.get(i % 12, {"txt": f"digit number {i}".encode()})
            yield {"__key__": f"{i:03d}", "png": members["png"], "cls": int(members["cls"]), **text}

    manifest = source.manifest
    write_set(
        *(folder, samples()),
        per_shard=30,
        name="captioned",
        classes=manifest.classes,
        mean=manifest.mean,
        std=manifest.std,
        source="",
        licence="",
    )
    return folder


def _recipe(captioned: Path, *changes: str) -> Recipe:
    base = (f"data.train={captioned}", "data.val=null", "batch=20", "objective.tokenizer=bytes", "objective.context=24")
    return recipes.load("vim_digits_cpu", ["objective.kind=contrastive", *base, "objective.width=16", *changes])


def _batches(chosen: Recipe, world: int = 1) -> list[Batch]:
    data, config = TrainingSet.open(chosen.data), chosen.shape(10)
    views = build(chosen.objective, config).views
    streams = [training(chosen, data, config, rank=r, world=world, start=0, steps=3, views=views) for r in range(world)]
    return [batch for stream in streams for batch in stream]


def _texts(batches: list[Batch]) -> list[str]:
    tokens = [row for batch in batches for row in batch.views["tokens"]]
    return [bytes(row[1 : int(row.argmax())].tolist()).decode() for row in tokens]


def test_samples_without_captions_are_replaced_and_counted(captioned: Path) -> None:
    batches = _batches(_recipe(captioned))
    assert all(text == f"digit number {int(key)}" for text, key in zip(_texts(batches), _keys(batches), strict=True))
    bad = [found for batch in batches for found in batch.bad]
    assert len(bad) >= 10
    assert {cause for cause, _ in bad} == {"no caption"}
    assert any("00000.tar, sample 000: no member .txt" in description for _, description in bad)
    assert any("sample 003: its .txt, the caption, is empty" in description for _, description in bad)


def _keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_replacements_do_not_depend_on_ranks_or_workers(captioned: Path) -> None:
    chosen = _recipe(captioned)
    whole = [batch.keys for batch in _batches(chosen)]
    first, second = (part.keys for part in _batches(chosen, world=2)[::3])
    assert first + second == whole[0]
    assert [batch.keys for batch in _batches(_recipe(captioned, "data.workers=1"))] == whole


def test_a_missing_or_long_caption_ends_the_run_on_request(captioned: Path) -> None:
    with pytest.raises(DataError, match=r"sample 0\d\d: .*add it, or set objective\.missing: replace"):
        _batches(_recipe(captioned, "objective.missing=refuse"))
    with pytest.raises(DataError, match=r"its caption has 1[67] tokens, at most 8; raise objective\.context, or set"):
        _batches(_recipe(captioned, "objective.too_long=refuse", "objective.context=8"))
    cut = _batches(_recipe(captioned, "objective.context=8"))
    assert set(_texts(cut)) == {"digit "}
    assert all(batch.views["cut"].eq(1).all() for batch in cut)


def test_evaluations_leave_out_what_has_no_caption(captioned: Path) -> None:
    chosen = _recipe(captioned, "objective.evaluation=retrieval")
    objective = build(chosen.objective, chosen.shape(10))
    dataset = Dataset.open(str(captioned))
    parts = list(evaluation(dataset, rank=0, world=1, batch=16, size=(32, 32), views=objective.evaluation_views))
    assert sum(float(part.weights.sum()) for part in parts) == 50
    assert len([found for part in parts for found in part.bad]) == 10
    candidates = objective.before_evaluation(dataset)["tokens"]
    counted = [row for part in parts for row, weight in zip(part.views["tokens"], part.weights, strict=True) if weight]
    assert torch.equal(candidates[:, 0], torch.stack(counted))


def test_zero_shot_evaluations_need_no_captions(captioned: Path) -> None:
    chosen = _recipe(captioned)
    objective = build(chosen.objective, chosen.shape(10))
    assert isinstance(objective, Contrastive)
    dataset = Dataset.open(str(captioned))
    parts = list(evaluation(dataset, rank=0, world=1, batch=16, size=(32, 32), views=objective.evaluation_views))
    assert sum(float(part.weights.sum()) for part in parts) == 60
    tokens: Tensor = objective.before_evaluation(dataset)["tokens"]
    assert tokens.shape == (10, len(objective.options.templates), 24)


# ---- the recipe


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["objective.heads=5"], "width 16 is not a multiple of heads 5; use heads: 4"),
        (["objective.caption=a/b"], "'a/b' is not a member such as txt, a field such as json:caption, or class"),
        (["objective.caption='json:'"], "'json:' is not a member such as txt, a field"),
        (["objective.templates=['a photo']"], r"'a photo' does not say where the class goes; write \{\} there"),
        (["objective.templates=[]"], r"objective\.templates"),
        (["objective.scale=200"], r"objective\.scale: 200"),
        (["objective.context=2"], r"objective\.context: 2"),
        (["augment.mixup=0.8"], "augment: objective contrastive needs images as they are; leave out mixup and cutmix"),
    ],
)
def test_faults_name_the_value_the_rule_and_the_fix(captioned: Path, changes: list[str], fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        _recipe(captioned, *changes)
