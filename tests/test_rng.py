import numpy as np
import pytest

from fcmae import rng

GOLDEN_BITS = [
    13357118306183126268,
    8378209260603098177,
    11852320319659296368,
]
GOLDEN_ORDER = [8, 9, 6, 4, 0, 5, 3, 1, 7, 2]
GOLDEN_SEED = 3786859119430737898


def reference_bits(*arguments: int) -> int:
    """The hash, written out in Python integers."""
    word = 2**64 - 1
    state = 0
    for value in arguments:
        state = ((state ^ (value & word)) + 0x9E3779B97F4A7C15) & word
        for shift, factor in (
            (30, 0xBF58476D1CE4E5B9),
            (27, 0x94D049BB133111EB),
            (33, 0xFF51AFD7ED558CCD),
        ):
            state = (state ^ (state >> shift)) * factor & word
        state ^= state >> 32
    return state


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0, 0), (7, 3, 11, 999_999, 4), (-1, 2, 5, -9, 1)])
def test_bits_equal_the_hash_written_out(arguments: tuple[int, int, int, int, int]) -> None:
    assert int(rng.bits(*arguments)[0]) == reference_bits(*arguments)


def test_golden_values() -> None:
    """These never change: stored runs depend on them."""
    assert rng.bits(0, rng.ORDER, 0, 0).tolist() == GOLDEN_BITS[:1]
    assert rng.bits(2**63 + 5, rng.CROP, 3, 12_345, np.arange(2)).tolist() == GOLDEN_BITS[1:]
    assert rng.permutation(0, 0, 10).tolist() == GOLDEN_ORDER
    assert rng.seed_for(1, rng.MODEL, 0, 0) == GOLDEN_SEED


def test_arrays_give_the_same_as_their_elements() -> None:
    index, counter = np.arange(3)[:, None], np.arange(4)
    table = rng.bits(5, rng.MASK, 2, index, counter)
    assert table.shape == (3, 4)
    for i in range(3):
        for c in range(4):
            assert table[i, c] == rng.bits(5, rng.MASK, 2, i, c)[0]


@pytest.mark.parametrize("axis", range(5))
def test_each_argument_flips_half_of_the_bits(axis: int) -> None:
    arguments = np.zeros((400, 5), np.int64)
    arguments[:, axis] = np.arange(400)
    words = np.array([rng.bits(*row)[0] for row in arguments.tolist()])
    changed = np.unpackbits((words[1:] ^ words[:-1]).view(np.uint8)).mean()
    assert abs(changed - 0.5) < 0.02
    assert len(np.unique(words)) == 400


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    for numbers in (
        rng.uniform(0, rng.CROP, 0, np.arange(100_000)),
        rng.uniform(0, rng.CROP, np.arange(100_000), 7),
        rng.uniform(0, rng.CROP, 0, 7, np.arange(100_000)),
    ):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
        chi_square = ((counts - 1000.0) ** 2 / 1000.0).sum()
        assert 50 < chi_square < 165  # 99 degrees of freedom: outside with probability 1e-4


def test_counters_seeds_and_epochs_are_independent() -> None:
    base = rng.uniform(0, rng.CROP, 0, np.arange(50_000), 0)
    for other in (
        rng.uniform(0, rng.CROP, 0, np.arange(50_000), 1),
        rng.uniform(1, rng.CROP, 0, np.arange(50_000), 0),
        rng.uniform(0, rng.CROP, 1, np.arange(50_000), 0),
        rng.uniform(0, rng.FLIP, 0, np.arange(50_000), 0),
        rng.uniform(0, rng.CROP, 0, np.arange(50_000) + 1, 0),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.02


def test_permutation_holds_every_index_once_and_changes_with_the_epoch() -> None:
    first, second = rng.permutation(3, 0, 1000), rng.permutation(3, 1, 1000)
    assert first.dtype == np.int64
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1000))
    assert (first == second).mean() < 0.01
    assert len(rng.permutation(3, 0, 0)) == 0


def test_seeds_have_63_bits() -> None:
    seeds = [rng.seed_for(0, rng.MODEL, 0, index) for index in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) >= 2**62


def test_streams_are_distinct() -> None:
    streams = [getattr(rng, name) for name in dir(rng) if name.isupper()]
    assert len(streams) == len(set(streams)) >= 10
