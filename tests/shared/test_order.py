"""Sample order: by names, complete, balanced, resumable."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from shared.order import order, schedule, steps_per_epoch

NAMES = [f"case-{i:03d}" for i in range(97)]


def test_an_epoch_is_a_permutation_that_changes():
    first, second, other = order(NAMES, 0, 0), order(NAMES, 0, 1), order(NAMES, 1, 0)
    assert sorted(first) == list(range(97))
    assert first != sorted(first)
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_order_goes_by_names_not_by_positions():
    whole = [NAMES[i] for i in order(NAMES, 3, 5)]
    fewer = NAMES[::-2]
    assert [fewer[i] for i in order(fewer, 3, 5)] == [name for name in whole if name in set(fewer)]


def test_first_positions_are_spread_evenly():
    counts = [0] * 10
    for epoch in range(2000):
        counts[order(NAMES[:10], 0, epoch)[0]] += 1
    assert sum((count - 200) ** 2 / 200 for count in counts) < 27.9  # chi-square, 9 degrees, p = 0.001


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 50))
def test_batches_cover_every_epoch_and_resume_anywhere(samples, batch, begun):
    names = NAMES[:samples]
    count = steps_per_epoch(samples, batch)
    steps = list(islice(schedule(names, batch, 7), begun + 2 * count))
    sizes = [len(indices) for _, indices in steps]
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    for epoch in range(2):
        seen = [i for number, indices in steps if number == epoch for i in indices]
        assert sorted(seen) == list(range(samples))
    assert list(islice(schedule(names, batch, 7, begun), 2 * count)) == steps[begun:]
