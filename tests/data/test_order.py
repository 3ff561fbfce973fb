"""The order of samples: permutations found at any position, lanes, mixtures, phases and repeated augmentation."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from vimscale.data.order import DatasetOrder, Mixture, Order, generator
from vimscale.errors import RecipeError
from vimscale.recipe import recipe
from vimscale.recipe.recipe import Recipe
from vimscale.recipe.sections import MIX_BLOCK


def _recipe(*changes: str) -> Recipe:
    return recipe.load("vim_digits_cpu", ["batch=24", *changes])


def _epoch(order: DatasetOrder, epoch: int) -> list[tuple[int, int]]:
    """List what all lanes together read in an epoch."""
    read = []
    for lane in range(order.lanes):
        length = (lane + 1) * order.samples // order.lanes - lane * order.samples // order.lanes
        located = [order.locate(turn, lane) for turn in range(epoch * length, (epoch + 1) * length)]
        assert {e for e, _, _ in located} == {epoch}
        read += [(shard, sample) for _, shard, sample in located]
    return read


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_an_epoch_is_a_permutation_and_the_next_is_another(lanes: int) -> None:
    counts = np.array([5, 1, 9, 0, 4, 7, 3])
    order = DatasetOrder(counts, seed=3, window=2, lanes=lanes)
    epochs = [_epoch(order, e) for e in range(3)]
    everything = {(shard, i) for shard, count in enumerate(counts) for i in range(count)}
    assert all(set(epoch) == everything and len(epoch) == len(everything) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_window_mixes_only_its_own_shards() -> None:
    order = DatasetOrder(np.full(8, 10), seed=0, window=2)
    for window in range(4):
        assert len({order.locate(p)[1] for p in range(window * 20, (window + 1) * 20)}) == 2


def test_shards_ahead_are_those_that_come_next() -> None:
    order = DatasetOrder(np.full(12, 10), seed=0, window=2, lanes=2)
    for lane in range(2):
        for turn in (0, 19, 20, 47, 59, 75):  # a lane has 60 samples per epoch
            window = turn // 20
            coming = {order.locate(t, lane)[1] for t in range(window * 20, (window + 2) * 20)}
            now = {order.locate(t, lane)[1] for t in range(window * 20, (window + 1) * 20)}
            ahead = order.ahead(turn, lane)
            assert set(ahead) == coming
            assert set(ahead[: len(now)]) == now


def test_a_node_that_works_on_its_lanes_needs_only_their_shards() -> None:
    def shards_of(chosen: Recipe, node: int) -> set[int]:
        order = Order(chosen, [np.full(64, 100)])
        slots = range(node * 16, (node + 1) * 16)  # of four nodes
        return {ref.shard for step in range(100) for ref in order.at(step, slots)}

    without = [shards_of(_recipe("batch=64", "data.window=2"), node) for node in range(4)]
    laned = [shards_of(_recipe("batch=64", "data.window=2", "data.lanes=4"), node) for node in range(4)]
    assert sum(map(len, without)) == 4 * 64, "every node needs every shard"
    assert sum(map(len, laned)) == 64, "each shard is needed by one node"


def test_any_position_is_found_without_earlier_ones_and_without_arrays_of_samples() -> None:
    counts = np.full(100_000, 10_000)
    far = 10**9
    walked = DatasetOrder(counts, seed=1)
    before = [walked.locate(far - k) for k in (500_000, 3, 2, 1)]
    assert len(set(before)) == 4
    fresh = DatasetOrder(counts, seed=1)
    tracemalloc.start()
    assert fresh.locate(far) == walked.locate(far)
    assert tracemalloc.get_traced_memory()[1] < 10e6, "arrays of shards and of one window, not of samples"
    tracemalloc.stop()


def test_generators_of_different_purposes_differ() -> None:
    counters = [(0,), (1,), (0, 1), (0, 0, 1)]
    drawn = {generator(0, stream, *counter).random() for stream in (0, 1, 8 << 60) for counter in counters}
    assert len(drawn) == 12


# ---- mixtures


def test_a_mixture_has_exact_shares_in_every_block_and_keeps_each_sets_order() -> None:
    mixture = Mixture([(0, [0.7, 0.25, 0.05])], seed=3)
    drawn = [mixture.locate(turn) for turn in range(3 * MIX_BLOCK)]
    for block in range(3):
        shares = Counter(source for source, _ in drawn[block * MIX_BLOCK : (block + 1) * MIX_BLOCK])
        for source, share in enumerate((0.7, 0.25, 0.05)):
            assert abs(shares[source] - share * MIX_BLOCK) < 2
    for source in range(3):
        turns = [own for s, own in drawn if s == source]
        assert turns == list(range(len(turns)))
    assert len({source for source, _ in drawn[:30]}) > 1, "shuffled, not one after the other"


def test_far_positions_of_a_mixture_need_no_earlier_ones() -> None:
    mixture = Mixture([(0, [2, 1]), (12345, [1, 1])], seed=0)
    far = 10**9 + 77
    assert Mixture([(0, [2, 1]), (12345, [1, 1])], seed=0).locate(far) == mixture.locate(far)
    counted = mixture.before(far)
    assert sum(counted) == far
    source, own = mixture.locate(far)
    assert counted[source] == own


def test_weights_change_at_their_step_and_no_sample_is_lost_or_repeated() -> None:
    changes = [(0, [1.0, 1.0]), (5000, [0.0, 1.0]), (9000, [3.0, 1.0])]
    mixture = Mixture(changes, seed=0)
    drawn = [mixture.locate(turn) for turn in range(20_000)]
    for source in range(2):
        turns = [own for s, own in drawn if s == source]
        assert turns == list(range(len(turns)))
    assert {source for source, _ in drawn[5000:9000]} == {1}
    assert abs(sum(source == 0 for source, _ in drawn[9000 : 9000 + MIX_BLOCK]) - 0.75 * MIX_BLOCK) < 2
    assert [mixture.before(turn)[0] for turn in (5000, 9000)] == [sum(s == 0 for s, _ in drawn[:5000])] * 2


def test_an_order_mixes_in_every_lane_from_the_recipes_step_on() -> None:
    chosen = _recipe(
        "data.train=[{data: a, weight: 1}, {data: b, weight: 1}]",
        "data.reweight=[{step: 200, weights: [0, 1]}]",
        "data.lanes=2",
    )
    order = Order(chosen, [np.full(4, 10), np.full(6, 10)])
    before = [ref.source for step in range(200) for ref in order.at(step, range(24))]
    after = [ref.source for step in range(200, 210) for ref in order.at(step, range(24))]
    assert 0.4 < np.mean(before) < 0.6
    assert set(after) == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.reweight=[{step: 5, weights: [1, 2]}]", "reweight: there is only one source"),
        ("data.train=[]", "the mixture is empty"),
        ("data.train=[{data: a}, {data: b, weight: 10000}]", "below 1/4096"),
        ("phases=[{step: 5, image_size: 30}]", "phase at step 5: image_size 30 is not a multiple of patch_size 8"),
        ("phases=[{step: 5}, {step: 5}]", "phases: their steps must increase; they are 5, 5"),
        ("augment.repeats=5", "batch 24 is not a multiple of augment.repeats 5 x data.lanes 1; use 25"),
        ("augment.policy=rand-m12", "neither 3-augment nor a RandAugment"),
        ("data.cache=big", "'big' is not a size; write 500MB, 100GB or 2TB"),
    ],
)
def test_inconsistent_values_are_refused_with_a_fix(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _recipe(change)


# ---- steps


def test_positions_count_the_images_of_all_phases() -> None:
    chosen = _recipe("phases=[{step: 0, batch: 96, image_size: 16}, {step: 3, batch: 48}, {step: 5, image_size: 24}]")
    order = Order(chosen, [np.full(10, 100)])
    seen = [ref.position for step in range(8) for ref in order.at(step, range(chosen.batch_at(step)))]
    assert [chosen.batch_at(step) for step in range(7)] == [96, 96, 96, 48, 48, 48, 48]
    assert seen == list(range(3 * 96 + 5 * 48))
    assert [chosen.size_at(step, (32, 32))[0] for step in (0, 4, 5)] == [16, 16, 24]
    samples = [(p.shard, p.sample) for step in range(8) for p in order.at(step, range(chosen.batch_at(step)))]
    assert len(set(samples)) == len(samples), "no sample comes twice within an epoch, whatever the batch"


def test_epochs_are_counted_through_phases() -> None:
    chosen = _recipe("phases=[{step: 0, batch: 96}, {step: 10, batch: 24}]")
    assert chosen.length(1000) == round(10 + (30 * 1000 - 960) / 24)


def test_a_phases_batch_is_split_like_the_recipes() -> None:
    chosen = _recipe("batch=24", "parallel.micro_batch=6", "phases=[{step: 10, batch: 48}]")
    assert chosen.micro_batch(2, 0) == (6, 2)
    assert chosen.micro_batch(2, 10) == (12, 2)
    with pytest.raises(RecipeError, match=r"phase at step 10: batch 50 is not a multiple of 2 ranks x 2 micro-steps"):
        _recipe("batch=24", "parallel.micro_batch=6", "phases=[{step: 10, batch: 50}]").micro_batch(2)


def test_skipped_images_are_never_read_again() -> None:
    counts = [np.full(10, 100)]
    chosen = _recipe("data.lanes=2", "augment.repeats=2")
    plain, skipping = Order(chosen, counts), Order(chosen, counts, [(5, 48), (9, 24)])

    def read(order: Order, steps: range) -> list[tuple[int, int, int]]:
        return [(p.position, p.shard, p.sample) for step in steps for p in order.at(step, range(24))]

    assert read(skipping, range(5)) == read(plain, range(5))
    assert read(skipping, range(5, 9)) == read(plain, range(7, 11))
    assert read(skipping, range(9, 12)) == read(plain, range(12, 15))


def test_repeated_augmentation_puts_copies_into_one_batch_far_apart() -> None:
    order = Order(_recipe("augment.repeats=3"), [np.full(10, 100)])
    for step in (0, 7):
        refs = list(order.at(step, range(24)))
        samples = [(ref.shard, ref.sample) for ref in refs]
        assert set(Counter(samples).values()) == {3}
        assert all(a != b for a, b in zip(samples[::2], samples[1::2], strict=True)), "pairs are of different images"
        assert len({ref.position for ref in refs}) == 24, "each copy has a generator of its own"
    first, second = ({(p.shard, p.sample) for p in order.at(step, range(24))} for step in (0, 1))
    assert not first & second


def test_mixing_pairs_needs_even_micro_batches() -> None:
    assert _recipe("augment.mixup=0.8").micro_batch(4) == (6, 1)
    with pytest.raises(RecipeError, match="micro-batches of 3 images are odd"):
        _recipe("augment.mixup=0.8").micro_batch(8)
