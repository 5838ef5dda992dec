"""Cost: what a linearization takes, by its sizes alone; test_linearizer.py compares it with a count of passes."""

from math import prod

import pytest

from metricopt_hf.linear.cost import DIFFERENCES, LARGEST, MOST_BYTES, ROW_BY_ROW, cost, way_of

ROWS, TOKENS, LABELS = 2000, 128, 9


@pytest.mark.parametrize(
    ("shapes", "taps", "reads_all", "way", "passes", "floats"),
    [
        ([(ROWS,)], True, False, ROW_BY_ROW, 1 + 1, ROWS * 64),
        ([(ROWS, 2)], True, False, ROW_BY_ROW, 1 + 2, ROWS * 2 * 64),
        ([(ROWS, 1000)], True, False, LARGEST, 1 + 5, ROWS * 5 * 64),
        ([(ROWS, 10)], True, True, ROW_BY_ROW, 1 + 10, ROWS * 10 * 64),
        ([(ROWS, 512)], True, True, DIFFERENCES, 16, ROWS * 512 * 16),
        ([(ROWS, 2)], False, False, DIFFERENCES, 16, ROWS * 2 * 16),
        ([(ROWS, TOKENS, LABELS)], True, False, LARGEST, 1 + 5, ROWS * TOKENS * 5 * 64),
        ([(ROWS, TOKENS, LABELS)], True, True, ROW_BY_ROW, 1 + 9, ROWS * TOKENS * LABELS * 64),
        ([(ROWS, TOKENS, LABELS)], False, True, DIFFERENCES, 16, ROWS * TOKENS * LABELS * 16),
        ([(ROWS, 3, 8, 8)], True, True, DIFFERENCES, 16, ROWS * 3 * 64 * 16),
        ([(ROWS, 100, 4), (ROWS, 100, 92)], True, True, DIFFERENCES, 16, ROWS * 100 * 96 * 16),
        ([], True, True, DIFFERENCES, 16, 0),
    ],
)
def test_the_cheapest_way_is_taken(shapes, taps, reads_all, way, passes, floats):
    assert way_of(shapes, taps, reads_all) == way
    found = cost(shapes, 2304, 64, way)
    assert (found.passes, found.nbytes) == (passes, 4 * floats)
    assert str(found).startswith(f"{way}, {passes} passes")


def test_there_are_no_more_coordinates_than_numbers_of_phi():
    assert cost([(ROWS, 2)], 10, 64, ROW_BY_ROW).dim == 10
    assert cost([(ROWS, 2)], 10, 64, DIFFERENCES).passes == 10


@pytest.mark.parametrize("rows", [10**5, 10**6, 10**8])
@pytest.mark.parametrize("tokens", [(), (10,)])
def test_rows_are_drawn_where_all_would_take_more_than_the_most(rows, tokens):
    found = cost([(rows, *tokens, 1000)], 2304, 64, LARGEST)
    assert found.rows == min(rows, MOST_BYTES // (4 * 5 * 64 * prod(tokens))) and found.nbytes <= MOST_BYTES
