"""What is particular to the guide over behaviour: what one model has taught it holds for another."""

import numpy as np
import pytest
import torch
from helpers import OPTIMUM, guide_context
from runs import quadratic_trainer
from scipy.stats import spearmanr
from teaching import coordinates, predictions_of, started, taught, trusted
from transformers import EvalPrediction

from metricopt_hf import BehaviourGuide, Observation, Round, Trajectory, ValueFunction, ValueFunctionError
from metricopt_hf import ValueFunctionGuide as OverPhi
from metricopt_hf.guides import behaviour as module
from metricopt_hf.guides.outputs import of_prediction
from metricopt_hf.phi import Coordinates
from metricopt_hf.value import BehaviourSignature, Signature, ValueNetwork

K, ROWS, CLASSES = 4, 240, 3


class Model:
    """Logits that are linear in z, by directions of its own, of a scale of its own, for rows of its own."""

    def __init__(self, seed, dim=K, scale=1.0, classes=CLASSES):
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, classes, ROWS)
        lean = 0.8 * (np.arange(classes) == 0)  # decides too often for the first class
        self.logits = scale * (rng.normal(size=(ROWS, classes)) + 1.2 * np.eye(classes)[self.labels] + lean)
        # each coordinate shifts classes, which is what a bias and much of FiLM do
        self.slopes = scale * (rng.normal(size=(dim, 1, classes)) + 0.2 * rng.normal(size=(dim, ROWS, classes)))

    def at(self, z):
        logits = self.logits + np.tensordot(z, self.slopes, 1)
        return EvalPrediction(logits.astype(np.float32), self.labels)


def worst_recall(prediction):
    predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return float(min((predicted[labels == c] == c).mean() for c in np.unique(labels)))


def observed(model, step, dim=K, size=16, metric=worst_recall, spread=0.3):
    z = (spread * np.random.default_rng(step).normal(size=(size, dim))).astype(np.float32)
    predictions = [model.at(point) for point in z]
    scores = np.array([metric(prediction) for prediction in predictions])
    trajectory = Trajectory([Observation(p, float(s), float("nan"), step, 0.1) for p, s in zip(z, scores, strict=True)])
    return Round(trajectory, predictions=predictions, scores=scores, z=z)


def learned(model, rounds=10, shuffle=False):
    """A shared value function of a run on `model`; with the scores shuffled: broken on purpose."""
    guide = started(BehaviourGuide())
    for step in range(rounds):
        told = observed(model, step)
        if shuffle:
            scores = np.random.default_rng(step).permutation(told.scores)
            told = Round(told.trajectory, predictions=told.predictions, scores=scores, z=told.z)
        guide.observe(told)
    behaviour, seen = guide.behaviour
    return ValueFunction.of(guide.network, BehaviourSignature("Model", behaviour, "recall", True), seen)


def ranked(value_function, model, dim=K):
    """Rank correlation with another model's scores, before it has seen any of these."""
    guide = BehaviourGuide(value_function)
    guide.start(guide_context(Coordinates(torch.zeros(dim), None)))
    told = observed(model, 100, dim)
    return float(spearmanr(guide.predict_round(told), told.scores).statistic)


OTHER = Model(seed=1, dim=7, scale=5.0)  # of another phi, another scale, and other rows


def test_what_one_model_taught_ranks_another_s_scores_before_any_of_its_own():
    assert ranked(learned(Model(seed=0)), OTHER, dim=7) > 0.5


def test_with_its_scores_shuffled_it_ranks_nothing():
    """Broken on purpose."""
    assert abs(ranked(learned(Model(seed=0), shuffle=True), OTHER, dim=7)) < 0.5


def test_its_direction_raises_the_other_model_s_metric():
    guide = BehaviourGuide(learned(Model(seed=0)))
    guide.start(guide_context(Coordinates(torch.zeros(7), None)))
    guide.observe(observed(OTHER, 100, 7))
    uphill = -trusted(guide).direction(torch.zeros(7)).vector.numpy()
    uphill = 0.2 * uphill / np.linalg.norm(uphill)
    assert worst_recall(OTHER.at(uphill)) > worst_recall(OTHER.at(0 * uphill)) > worst_recall(OTHER.at(-uphill))


def test_its_direction_is_the_gradient_of_what_it_expects():
    """Against finite differences of the value function of the summary of the predictions themselves."""
    guide, model = started(BehaviourGuide()), Model(seed=0)
    for step in range(6):
        guide.observe(observed(model, step, size=32, spread=0.1))
    read_as, network = guide.behaviour[0], guide.network

    def value(z):
        rows = of_prediction(model.at(np.asarray(z, np.float32)))
        return float(network.predict(read_as.summary(rows.outputs, rows.labels))[0])

    step = 0.02 * np.eye(K)
    differences = np.array([(value(e) - value(-e)) / 0.04 for e in step])
    phi = guide.context.coordinates.origin
    found = guide.context.coordinates.encode(guide.ascent(phi) + phi).numpy()
    cosine = differences @ found / np.linalg.norm(differences) / np.linalg.norm(found)
    assert cosine > 0.95
    assert guide.expect(phi)[0] == pytest.approx(value(np.zeros(K)), abs=0.02)


def test_one_that_is_given_stays_as_it_is_and_what_is_shared_on_was_seen_here():
    given = learned(Model(seed=0))
    before = given.predict(torch.as_tensor(given.observations.z[:4]))[0].clone()
    guide = BehaviourGuide(given)
    guide.start(guide_context(Coordinates(torch.zeros(7), None)))
    guide.observe(observed(OTHER, 100, 7))
    assert len(guide.behaviour[1]) == 16
    assert torch.equal(given.predict(torch.as_tensor(given.observations.z[:4]))[0], before)  # it is copied


def test_the_oldest_summaries_are_forgotten(monkeypatch):
    monkeypatch.setattr(module, "MOST_SUMMARIES", 20)
    guide = started(BehaviourGuide())
    taught(guide, rounds=5)
    assert len(guide.behaviour[1]) == 20


def test_one_over_phi_is_refused_and_one_over_behaviour_by_the_other_guide():
    over_phi = ValueFunction(K)
    over_phi.signature = Signature("Linear", {}, "random", "recall", True, torch.zeros(12), None)
    with pytest.raises(ValueFunctionError, match='over phi, and the guide takes one over behaviour: take guide="val'):
        BehaviourGuide(over_phi)
    over_behaviour = learned(Model(seed=0), rounds=1)
    with pytest.raises(ValueFunctionError, match='over behaviour, and the guide takes one over phi: take guide="beh'):
        OverPhi(over_behaviour)


@pytest.mark.parametrize("given", ["signed", "plain"])
def test_one_of_other_predictions_is_not_followed(given, caplog):
    value_function = learned(Model(seed=0), rounds=2) if given == "signed" else ValueNetwork(5)
    guide = started(BehaviourGuide(value_function))
    guide.observe(observed(Model(seed=1, classes=2), 0))
    trust, reason = guide.standing
    why = "is of 3 classes, these predictions are 2 classes" if given == "signed" else "reads 5 numbers"
    assert trust == 0 and why in reason and "cannot guide this run" in caplog.text
    assert guide.network is None and guide.behaviour is None


def test_of_too_many_classes_it_switches_itself_off(monkeypatch):
    monkeypatch.setattr(module, "MOST_NUMBERS", 8)
    guide = started(BehaviourGuide())
    guide.observe(observed(Model(seed=0), 0))
    assert "longer than 8 numbers" in guide.standing[1]


def test_without_predictions_it_learns_nothing():
    guide = started(BehaviourGuide())
    guide.observe(Round(observed(Model(seed=0), 0).trajectory))
    assert guide.network is None and guide.standing[0] == 0


def test_where_a_round_does_not_say_its_points_the_last_real_ones_are_taken():
    guides = [started(BehaviourGuide()) for _ in range(2)]
    trajectory, z = Trajectory(), np.random.default_rng(0).normal(size=(8, K)).astype(np.float32)
    predictions = predictions_of(z, 0)
    trajectory.extend([Observation(p, float(i), 0.0, 0, 0.1) for i, p in enumerate(z)])
    for guide, points in zip(guides, (None, z), strict=True):
        guide.observe(Round(trajectory, predictions=predictions, scores=np.arange(8.0), z=points))
    phi = coordinates().origin
    assert torch.equal(*(guide.ascent(phi) for guide in guides))


# ---- in a run


class Halted(BehaviourGuide):
    """Broken on purpose: how the summary moves with phi is lost, and with it the way from the metric to phi."""

    def learn_rows(self, rows, scores, observed):
        super().learn_rows(rows, scores, observed)
        self._tangent.slope.zero_()


class Negated(BehaviourGuide):
    """Broken on purpose: as good a prophet, and its direction leads away."""

    def ascent_and_agreement(self, phi):
        ascent, agreement = super().ascent_and_agreement(phi)
        return -ascent, agreement


def distance_after(folder, guide, observe="predictions"):
    """Of phi from the metric's optimum, after a short run."""
    weight = {"value_weight": 0.0 if guide is None else 6.0}
    trainer = quadratic_trainer(folder, guide, observe=observe, observe_steps=4, metric_call_budget=None, **weight)
    trainer.train()
    assert guide is None or max(row["trust"] for row in trainer.result.curve) > 0.3
    return float((trainer.result.last_phi - torch.as_tensor(OPTIMUM)).norm())


@pytest.mark.parametrize("observe", ["predictions", "scores"])
def test_it_leads_a_run_to_the_metric_and_only_its_direction_does(tmp_path, observe):
    loss_only = distance_after(tmp_path, None, observe)
    assert distance_after(tmp_path, BehaviourGuide(), observe) < 0.8 * loss_only
    assert distance_after(tmp_path, Halted(), observe) == pytest.approx(loss_only, rel=1e-4)
    assert distance_after(tmp_path, Negated(), observe) > 1.1 * loss_only


def test_it_makes_no_pass_and_no_call_of_its_own(tmp_path):
    spent = []
    for guide in (OverPhi(), BehaviourGuide()):
        trainer = quadratic_trainer(tmp_path, guide, observe="predictions", metric_call_budget=None, max_steps=8)
        trainer.train()
        spent.append((dict(trainer.ledger.calls), dict(trainer.ledger.passes)))
    assert spent[0] == spent[1]
