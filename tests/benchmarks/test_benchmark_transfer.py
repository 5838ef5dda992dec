"""What a transferred value function came to: the sums by hand, the page, and a run at small sizes."""

import pytest
from toy import TOY, toy_problem

from benchmarks import transfer
from benchmarks.problem import data_root
from benchmarks.transfer import COLD, MOST_OF, UNGUIDED, WARM, Pair, passes_until, row_of, text

NEEDED = ("a9a", "bank_marketing")
needs_data = pytest.mark.skipif(not all((data_root() / name).is_dir() for name in NEEDED), reason="needs its data")
PAIR = Pair("toy to toy", TOY, toy_problem, toy_problem)
PASSES = [0, 8, 16, 24]


def record(seed, cold, warm, ranked=0.75, control=0.25):
    curves = {UNGUIDED: [0.5] * 4, COLD: cold, WARM: warm}
    methods = {
        name: {"report": 0.5, "curve": {"passes": PASSES, "selection": selection, "trust": [0.0] * 4}}
        for name, selection in curves.items()
    }
    ranks = {"transferred": ranked, "shuffled": control}
    return {"seed": seed, "observe": "scores", "methods": methods, "ranked": ranks}


def test_passes_until_a_score_by_hand():
    curve = {"passes": PASSES, "selection": [0.5, 0.75, 0.25, 1.0]}
    assert [passes_until(curve, score, 1, 99) for score in (0.5, 0.7, 0.9, 1.5)] == [0, 8, 24, 99]
    assert passes_until(curve, 0.3, -1, 99) == 16


def test_a_pair_by_hand():
    row = row_of(
        PAIR,
        [
            record(0, cold=[0.0, 0.5, 0.92, 1.0], warm=[0.0, 0.95, 1.0, 0.5]),
            record(1, cold=[0.0, 0.0, 0.0, 1.0], warm=[0.0, 0.1, 0.2, 0.3]),  # never as good: all passes
        ],
    )
    assert [part.tolist() for part in row.passes[1.0]] == [[24, 24], [16, 24]] and row.reached == 1
    assert [part.tolist() for part in row.passes[MOST_OF]] == [[16, 24], [8, 24]]
    assert row.saved(1.0) == pytest.approx(1 - 40 / 48) and row.saved(MOST_OF) == pytest.approx(1 - 32 / 40)
    assert row.ends[WARM].tolist() == [1.0, 0.3] and row.means[COLD][1] == 0.25


def test_the_page_counts_what_was_aimed_at_won_or_not():
    lost = row_of(PAIR, [record(seed, [0, 1, 1, 1], [0, 0, 0, 0.5], ranked=0.1 * seed) for seed in range(2)])
    won = row_of(PAIR, [record(seed, [0, 0, 1, 1], [0, 1, 1, 1]) for seed in range(2)])
    written = text({("lost", "scores"): (PAIR, lost), ("won", "scores"): (PAIR, won)})
    assert "rank correlation is above 0.5 on 1 of 2 pairs" in written
    assert "saved on 1 of 2 to where the run from scratch ends, and on 1 to 90%" in written
    assert "-200%" in written and "Written by `python -m benchmarks.transfer`" in written


@needs_data
def test_no_example_of_the_first_run_is_the_target_s():
    first, second = (transfer.table("a9a", 8, True, 3, whose) for whose in (transfer.FIRST, transfer.SECOND))
    seen, own = ({row for part in (p.train, p.observation, p.selection) for row in part.rows} for p in (first, second))
    assert not seen & own and len(own) > 200


@pytest.mark.slow
@needs_data
def test_it_runs_at_small_sizes(capsys, monkeypatch):
    monkeypatch.setattr(transfer, "PAGE", None)
    assert transfer.main(["--smoke", "--pairs", "a9a_width", "--seeds", "0", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| a9a, MLP 64 to 128 wide |" in printed and "Where scores are observed" in printed
