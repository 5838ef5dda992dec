"""One odd answer of the metric never decides: not what is trusted, nor what is kept."""

import numpy as np
import pytest
from helpers import Quadratic, Targets, distance_to_optimum
from runs import SCORES, planned

from metricopt_hf import MetricOptConfig, MetricOptTrainer
from metricopt_hf.guides import ValueFunctionGuide
from metricopt_hf.training.faults import EARLY_SCORES, MIN_SCORES_FOR_OUTLIERS, Faults


def faults(scores=()):
    told = Faults(8, lambda reason: True)
    told.accept(list(scores))
    return told


RNG = np.random.default_rng(0)
USUAL = (0.5 + 0.1 * RNG.standard_normal(40)).tolist()


@pytest.mark.parametrize("value", [1e6, -1e6, 1e29, 999.0, -50.0])
@pytest.mark.parametrize("place", range(MIN_SCORES_FOR_OUTLIERS))
def test_an_early_fault_is_told_as_soon_as_there_are_enough_others(place, value):
    told, scores = faults(), [*USUAL[:place], value, *USUAL[place:]]
    found = []
    for i, score in enumerate(scores):
        assert not told.is_outlier(score)
        told.accept([score])
        found += [(i, fault) for fault in told.revoke()]
    assert found == [(MIN_SCORES_FOR_OUTLIERS, value)]
    assert told.scores == USUAL and told.total == 1 and told.is_outlier(value)


def test_two_early_faults_of_one_size_do_not_hide_each_other():
    told, found = faults(), []
    for score in [USUAL[0], 1e6, *USUAL[1:9], 1e6, *USUAL[9:]]:
        told.accept([score])
        found += told.revoke()
    assert found == [1e6, 1e6] and told.scores == USUAL


@pytest.mark.parametrize(
    "scores",
    [
        np.linspace(0, 1, 64),  # it improves steadily
        np.r_[np.zeros(16), np.linspace(0, 1, 40)],  # from nothing at all
        1 - np.exp(-np.arange(64) / 8),  # fast, then slowly
        np.exp(-np.arange(64.0)),  # a perplexity that falls by orders of magnitude
        np.r_[np.full(20, 0.1) + 1e-3 * np.arange(20), 0.4, 0.45, 0.5, 0.55, 0.6],
        np.tile([0.0, 1.0], 32),
        np.full(64, 0.5),
    ],
    ids=["steady", "from zero", "saturating", "falling", "a jump", "two values", "constant"],
)
def test_no_real_change_is_taken_for_a_fault(scores):
    told = faults()
    for score in scores:
        assert not told.is_outlier(score)
        told.accept([float(score)])
        assert told.revoke() == []


def test_later_ones_are_told_as_they_come():
    told = faults(USUAL)
    assert told.is_outlier(1e3) and not told.is_outlier(0.9)
    told.accept(np.linspace(0, 1, EARLY_SCORES).tolist())
    assert told.revoke() == [] and told.is_outlier(1e3)


def test_its_state_goes_on():
    told, again = faults(USUAL), faults()
    told.add(["it failed"] * 3, succeeded=0)
    again.load_state_dict(told.state_dict())
    assert (again.total, again.in_a_row) == (told.total, told.in_a_row) == (3, 3)
    for score in (1e3, 0.9, 2.0, 3.0, 14.0, -14.0):
        assert again.is_outlier(score) == told.is_outlier(score)


# ---- a run


class Box:
    """The distance to an optimum, except on some calls."""

    def __init__(self, faulty=(), value=0.0):
        self.faulty, self.value, self.calls, self.odd = set(faulty), value, 0, []

    def __call__(self, prediction):
        self.calls += 1
        if self.calls - 1 in self.faulty:
            self.odd.append(self.calls - 1)
            return self.value
        return distance_to_optimum(prediction)


def run(folder, metric, observed=16, selected=32, **kwargs):
    defaults = {
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "metric_start_ratio": 0,
        "metric_call_budget": 80,
        "observe_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "greater_is_better": False,
        "phi": "w",
        "coordinates": "identity",
    }
    settings = {**SCORES, **defaults, **kwargs}
    trainer = planned(MetricOptTrainer, settings)(
        Quadratic(),
        MetricOptConfig(str(folder), **settings),
        train_dataset=Targets(seed=1),
        observation_dataset=Targets(observed, seed=2),
        selection_dataset=Targets(selected, seed=3),
        metric=metric,
    )
    trainer.train()
    return trainer


CHECKS = 1  # then the phase's start on the selection split, then the first round


@pytest.mark.parametrize("value", [1e6, -1e6, 1e29])
@pytest.mark.parametrize("call", [CHECKS + 1, CHECKS + 5, CHECKS + 8])
def test_one_early_observation_does_not_take_the_trust_of_a_run(tmp_path, call, value):
    clean, odd = run(tmp_path, Box()), run(tmp_path, Box({call}, value))
    trust = [[entry["trust"] for entry in trainer.result.curve] for trainer in (clean, odd)]
    assert max(trust[0]) > 0.5  # else this says nothing
    assert max(trust[1]) > 0.5 * max(trust[0])
    assert value not in [o.score for o in odd.observations] and odd.result.failed_calls == 1


def test_what_was_learned_from_an_early_fault_is_forgotten(tmp_path, monkeypatch):
    starts, start = [], ValueFunctionGuide.start

    def counted(guide, context):
        starts.append(guide)
        start(guide, context)

    monkeypatch.setattr(ValueFunctionGuide, "start", counted)
    run(tmp_path, Box())
    usual = len(starts)
    run(tmp_path, Box({CHECKS + 5}, 1e6))
    assert len(starts) == 2 * usual + 1


@pytest.mark.parametrize("value", [-1e6, -1e29, -400.0])
@pytest.mark.parametrize("which", [0, 1, 3])
def test_one_early_selection_is_not_what_is_kept(tmp_path, which, value):
    """The metric is better the smaller: the odd answer would be the best."""
    selects = []

    clean = run(tmp_path, Box())
    numbers = iter(range(1000))

    def metric(prediction):
        # the selection set is the only one of 32 rows
        if len(prediction.label_ids) == 32 and next(numbers) == which:
            selects.append(which)
            return value
        return distance_to_optimum(prediction)

    odd = run(tmp_path, metric)
    assert selects, "the fault never came"
    assert odd.result.best_score == pytest.approx(clean.result.best_score, rel=0.3) and odd.result.best_score > 0
    assert odd.result.best_step != clean.result.curve[0]["step"]


@pytest.mark.parametrize("which", [0, 1])
def test_an_odd_answer_that_comes_out_again_stands(tmp_path, which):
    """At one phi the metric is far better than at all others, whenever it is asked."""
    seen = []

    def metric(prediction):
        if len(prediction.label_ids) == 32:
            seen.append(prediction.predictions.tobytes())
        good = len(seen) > which and prediction.predictions.tobytes() == seen[which]
        return -400.0 if good else distance_to_optimum(prediction)

    trainer = run(tmp_path, metric)
    assert trainer.result.best_score == -400.0 and seen.count(seen[which]) == 2
    assert trainer.ledger.calls["select"] == len(seen)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e15, 1e28])
def test_a_metric_of_any_size_is_followed_alike(tmp_path, scale):
    trainer = run(tmp_path, lambda prediction: scale * distance_to_optimum(prediction))
    best = trainer.result.best_score / scale
    assert trainer.result.trust > 0.3 and trainer.phase.direction.vector.isfinite().all() and np.isfinite(best)
