"""The methods and how their settings are chosen."""

import numpy as np
import pytest
import torch
import transformers
from toy import needs_data

from benchmarks import by_loss, comparing, drop, methods, protocol, records, run, surrogates, tasks, tune
from benchmarks.searchers import CMAES, SPSA
from metricopt_hf import ConfigurationError


def test_grids_are_of_one_size():
    assert {len(rival.grid) for rival in methods.RIVALS.values() if rival.grid} == {6}
    ours = ("metricopt", *comparing.CONTROLS, *comparing.WAYS)
    for name, rival in methods.RIVALS.items():
        # the start has nothing to set, and ours are the library's defaults, with another guide or none
        assert rival.grid or rival.settings_of or rival.setting or name in ("start", "metricopt", "negated")
        assert name not in ours or set(rival.setting) <= {"guide"}


def test_what_is_committed_is_from_the_grids():
    fixed = protocol.load()
    assert set(fixed.settings) == set(methods.TUNED)
    for name, config in fixed.settings.items():
        assert config in methods.RIVALS[name].grid
    assert fixed.config("obs") == fixed.config("train_obs")
    loss = [fixed.config("loss_only"), fixed.config("loss_small")]
    assert fixed.config("metricopt") == {"by_loss": loss}
    assert {seed for _, seed in fixed.chosen["tasks and seeds"]} <= set(protocol.DEVELOPMENT_SEEDS)


def test_no_committed_record_is_of_another_protocol():
    run.check(records.read(records.RESULTS), protocol.load())


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
    negated = methods.NegatedGuide()
    negated.slope = torch.tensor([1.0, -2.0])
    assert torch.equal(negated.gradient(torch.zeros(2)), torch.tensor([-1.0, 2.0]))


def test_batches_are_those_of_trainer(tmp_path):
    """In every epoch, in their order."""
    data = [{"x": torch.tensor(float(i)), "labels": torch.tensor(0)} for i in range(10)]
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, labels):
            seen.append(x.tolist())
            return {"loss": self.weight * x.sum()}

    args = {"max_steps": 6, "per_device_train_batch_size": 4, "seed": 3, "report_to": [], "disable_tqdm": True}
    transformers.Trainer(
        Model(), transformers.TrainingArguments(str(tmp_path), use_cpu=True, **args), train_dataset=data
    ).train()
    ours = by_loss.batches(data, 4, 3)
    assert [next(ours)["x"].tolist() for _ in range(6)] == seen


def test_records_are_dropped_and_others_stay_byte_for_byte(tmp_path):
    lines = [b'{"method": "a",  "x": 1.50}\n', b'{"method": "b"}\n', b'{"method": "c"}\n']
    file = tmp_path / "task.jsonl"
    file.write_bytes(b"".join(lines))
    assert drop.drop(file, ["b"]) == 1 and file.read_bytes() == lines[0] + lines[2]
