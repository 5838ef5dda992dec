"""What a run keeps does not grow with the number of its steps."""

import json

import pytest
from runs import quadratic_trainer

from metricopt_hf.training import checkpoint, faults, phase, rounds


@pytest.fixture
def small_bounds(monkeypatch):
    monkeypatch.setattr(rounds, "MOST_REAL", 24)
    monkeypatch.setattr(phase, "MOST_ENTRIES", 16)
    monkeypatch.setattr(faults, "MOST_SCORES", 64)


def kept(trainer, folder):
    """Numbers in what a checkpoint holds of the guidance, and the lengths of what a run keeps."""
    checkpoint.save(trainer._guidance_state(trainer.phase.state_dict()), folder)
    phase = trainer.phase
    lengths = [len(phase.rounds.trajectory), len(phase.rounds.faults.scores), len(phase.selection.candidates)]
    tensors = (folder / checkpoint.TENSORS_FILE).stat().st_size
    return lengths, tensors, len(json.loads((folder / checkpoint.JSON_FILE).read_text())["state"]["dict"])


def test_a_longer_run_keeps_as_much(tmp_path, small_bounds):
    found = []
    for steps in (30, 60):
        trainer = quadratic_trainer(tmp_path, max_steps=steps, metric_call_budget=10**9, forward_pass_budget=10**9)
        trainer.train()
        curve = trainer.result.curve
        assert trainer.ledger.calls["observe"] > 3 * steps  # so many there were
        assert 8 <= len(curve) <= 16 and curve[0]["step"] == 0 and curve[-1]["step"] == steps
        assert [row["step"] for row in curve] == sorted(row["step"] for row in curve)
        assert trainer.observations[-1].step == steps - 1  # the latest ones
        found.append(kept(trainer, tmp_path / "state"))
    assert found[0] == found[1] and found[0][0] == [24, 64, 3]


def test_scores_that_are_no_longer_kept_still_bound_what_is_no_outlier(small_bounds):
    first = faults.Faults(5, lambda reason: False)
    first.accept([0.0, 100.0])
    first.accept([50.0 + i / 100 for i in range(200)])
    again = faults.Faults(5, lambda reason: False)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for one in (first, again):
        assert len(one.scores) == 64 and not one.is_outlier(99.0) and not one.is_outlier(1000.0)
        assert one.is_outlier(1e5)
