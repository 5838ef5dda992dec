"""The methods and how their settings are chosen."""

import numpy as np
import pytest
import torch
from helpers import guide_context
from toy import needs_data

from benchmarks import methods, protocol, surrogates, tasks, tune
from benchmarks.searchers import CMAES, SPSA
from metricopt_hf import ConfigurationError, Observation, Round, Trajectory, ValueFunctionGuide
from metricopt_hf.phi import Coordinates


def test_grids_are_of_one_size():
    assert {len(rival.grid) for rival in methods.RIVALS.values() if rival.grid} == {6}
    for name, rival in methods.RIVALS.items():
        assert rival.grid or rival.settings_of or rival.setting or name == "start"  # which has nothing to set


def test_what_is_committed_is_from_the_grids():
    fixed = protocol.load()
    assert set(fixed.settings) == set(methods.TUNED)
    for name, config in fixed.settings.items():
        assert config in methods.RIVALS[name].grid
    assert fixed.config("shuffled") == fixed.config("unguided") == fixed.config("metricopt")
    assert {seed for _, seed in fixed.chosen["tasks and seeds"]} <= set(protocol.DEVELOPMENT_SEEDS)


def test_a_setting_is_chosen_in_units_of_the_noise():
    def record(task, config, score):
        return {"task": task, "method": "m", "config": {"c": config}, "score": score}

    # the second is better by two units, and in the other task, where smaller is better, worse by four
    rows = [record("a", 1, 10.0), record("a", 2, 20.0), record("b", 1, 0.1), record("b", 2, 0.2), record("b", 2, 0.4)]
    worth = tune.worth(rows, {"a": 5.0, "b": -0.05})["m"]
    assert worth['{"c": 1}'] == pytest.approx((10 / 5 - 0.1 / 0.05) / 2)
    assert worth['{"c": 2}'] == pytest.approx((20 / 5 - 0.3 / 0.05) / 2)


@needs_data
def test_nothing_is_chosen_on_seeds_of_the_final_runs():
    with pytest.raises(ConfigurationError, match="development seeds"):
        tune.main(["--seeds", "0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cma", "spsa"])
def test_searchers_climb(name):
    """-|z - 1|^2 in five dimensions, from zero."""
    if name == "cma":
        pytest.importorskip("cma")
        searcher = CMAES(5, 0.3, 8, False, seed=0)
    else:
        searcher = SPSA(5, 0.1, 1.5, rounds=40, seed=0)
    for _ in range(40):
        points = searcher.ask(8)
        assert points.shape == (8, 5)
        searcher.tell(points, -((points - 1) ** 2).sum(1))
    assert ((searcher.centre - 1) ** 2).sum() < 0.3


def test_a_generation_may_take_several_rounds():
    pytest.importorskip("cma")
    searcher = CMAES(3, 0.5, 8, False, seed=0)
    for turn in range(4):
        points = searcher.ask(4)
        searcher.tell(points, -((points - 1) ** 2).sum(1))
        assert bool(np.any(searcher.centre)) == (turn >= 1)


def test_the_slope_of_the_evolution_guide():
    guide = methods.EvolutionGuide(rounds=1)
    guide.start(guide_context(Coordinates(torch.zeros(2), None), greater_is_better=False))
    assert guide.direction(torch.zeros(2)).trust == 0
    old = [Observation(np.array([s, 0.0], np.float32), s, 1.0, 0, 0.0) for s in (1.0, -1.0)]
    new = [Observation(np.array([5.0, s], np.float32), 3 * s, 1.0, 1, 0.0) for s in (1.0, -1.0)]
    guide.observe(Round(Trajectory([*old, *new])))
    direction = guide.direction(torch.zeros(2))
    assert direction.trust == guide.TRUST
    # the metric rises along the second coordinate; smaller is better, so a step against the vector goes down it
    assert torch.equal(direction.vector / direction.vector.norm(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("metric", surrogates.SURROGATES)
def test_surrogates_fall_where_predictions_get_right(metric):
    generator = torch.Generator().manual_seed(0)
    if metric == "spearman":
        labels = torch.rand(32, generator=generator)
        wrong, right = torch.randn(32, 1, generator=generator), labels[:, None] * 3
    else:
        labels = torch.arange(32) % 2
        right = 4.0 * torch.nn.functional.one_hot(labels).float()
        wrong = torch.randn(32, 2, generator=generator)
    loss = surrogates.surrogate_loss(metric, 0.0)
    wrong.requires_grad_(True)
    bad, good = loss({"logits": wrong}, labels), loss({"logits": right}, labels)
    assert good < bad - 0.1
    (gradient,) = torch.autograd.grad(bad, wrong)
    assert torch.isfinite(gradient).all() and gradient.norm() > 0
    formula, known = methods.RIVALS["formula"], tasks.tasks().values()
    assert {task.metric.__name__ for task in known if formula.applies(task)} == set(surrogates.SURROGATES)


def test_the_negated_guide_says_the_opposite():
    def taught(guide):
        guide.start(guide_context(Coordinates(torch.zeros(2), None)))
        trajectory = Trajectory()
        for step in range(5):
            z = np.random.default_rng(step).normal(size=(8, 2)).astype(np.float32)
            trajectory.extend([Observation(point, float(point[0]), float("nan"), step, 0.0) for point in z])
            guide.observe(Round(trajectory))
        return guide

    straight, negated = taught(ValueFunctionGuide()), taught(methods.NegatedGuide())
    phi = torch.ones(2)
    assert torch.equal(straight.ascent(phi), -negated.ascent(phi)) and straight.direction(phi).trust > 0.5
    assert negated.trust.correlation < -0.5 and negated.direction(phi).trust == 0
