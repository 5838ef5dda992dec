"""The last part of the metric phase: phi anew from where that phase began, by the loss alone, as a candidate."""

import pytest
import torch
from helpers import true_class_probability
from runs import Truth, faulty_trainer, quadratic_trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from metricopt_hf import MetricOptConfig, MetricOptTrainer, Subset
from metricopt_hf.training.optimization import PhiSchedule


class Path(MetricOptTrainer):
    """Keeps phi, its learning rate and the optimizer's count of updates, at each step's gradient."""

    def _guide_update(self, step):
        super()._guide_update(step)
        group = next(g for g in self.optimizer.param_groups if any(p is self.phi.parameters[0] for p in g["params"]))
        count = self.optimizer.state.get(self.phi.parameters[0], {}).get("step", 0)
        self.path = [*getattr(self, "path", []), (self.phi.read(), group["lr"], int(count))]


def make(folder, cls=Path, metric=true_class_probability, **kwargs):
    shared = {"unguided_ratio": 0.5, "select_steps": None, "observe_steps": None, "metric_call_budget": 16}
    rates = {"lr_scheduler_type": "constant", "phi_learning_rate": 1e-3, "unguided_learning_rate": 1e-1}
    return faulty_trainer(folder, metric, cls, **{**shared, **rates, **kwargs})


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("first_phase", [0.0, 0.5])
def test_it_begins_where_the_metric_phase_began_with_an_optimizer_that_forgot(tmp_path, first_phase, accumulate):
    trainer = make(tmp_path, metric_start_ratio=first_phase, gradient_accumulation_steps=accumulate)
    trainer.train()
    phis, rates, counts = zip(*trainer.path, strict=True)
    guided = 6 if first_phase == 0 else 3
    assert trainer.result.unguided_step == trainer.result.start_step + guided
    assert torch.equal(phis[guided], phis[0]) and not torch.equal(phis[guided - 1], phis[0])
    assert counts[guided] == 0 and counts[guided + 1] == 1
    assert rates[:guided] == pytest.approx([1e-3] * guided)
    if first_phase == 0:  # exponentially, over a third of six steps
        assert rates[guided:] == pytest.approx([1e-3, 1e-2, 1e-1, 1e-1, 1e-1, 1e-1])


def test_there_nothing_is_observed_or_followed(tmp_path):
    trainer = quadratic_trainer(tmp_path, Truth(), max_steps=20, unguided_ratio=0.5, metric_call_budget=None)
    trainer.train()
    assert max(trainer.result.trajectory.steps) == 9
    alone = [row for row in trainer.result.curve if row["step"] > 10]
    assert len(alone) == 10 and all(row["trust"] == 0 and row["reason"] == "the unguided branch" for row in alone)
    assert any(row["trust"] > 0 for row in trainer.result.curve)


def test_it_is_the_run_that_nothing_guides(tmp_path):
    """Also where guidance went before: the same batches from the same start."""

    def alone(guide, **kwargs):
        trainer = quadratic_trainer(tmp_path, guide, max_steps=20, unguided_ratio=0.5, **kwargs)
        trainer.train()
        return [row["selection"] for row in trainer.result.curve if row["step"] > 10]

    assert alone(Truth()) == alone(None, value_weight=0, metric_call_budget=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_better_of_both_is_kept(tmp_path, sign):
    """Guidance where it helps, the loss alone where a guide that is trusted leads astray."""

    class Guide(Truth):
        def ascent(self, phi):
            return sign * super().ascent(phi)

    trainer = quadratic_trainer(tmp_path, Guide(), max_steps=40, value_weight=2.0, unguided_ratio=0.5)
    trainer.train()
    chosen = trainer.result
    assert (chosen.best_step <= 20) is (sign == 1) and chosen.kept_branch == ("guided" if sign == 1 else "unguided")
    assert chosen.best_score == min(row["selection"] for row in chosen.curve)
    assert torch.equal(trainer.phi.read(), chosen.best_phi)


def test_looks_are_counted_once(tmp_path):
    """At the start, every so many steps and at the end; not once more at the start that it goes back to."""
    trainer = make(tmp_path, MetricOptTrainer, select_steps=2)
    trainer.train()
    looked = [row["step"] for row in trainer.result.curve if row["selection"] is not None]
    assert looked == [0, 2, 4, 6, 8, 10, 12] and trainer.ledger.calls["select"] == 7


def test_there_a_guide_s_loss_is_not_asked_for(tmp_path):
    class Loss(Truth):
        def loss(self, inputs, outputs, task_loss):
            asked.append(trainer.state.global_step)
            return None

    asked = []
    trainer = quadratic_trainer(tmp_path, Loss(), max_steps=20, unguided_ratio=0.5)
    trainer.train()
    assert set(asked) == set(range(1, 10))  # the phase begins behind the first step's loss


def test_where_nothing_can_be_selected_the_last_guided_phi_stays(tmp_path):
    """The loss alone takes large steps, because it is looked at: unseen, it is not kept."""

    def metric(prediction):
        if len(prediction.label_ids) == 40:  # all of the selection set; a fold has 20
            raise RuntimeError("not here")
        return true_class_probability(prediction)

    trainer = make(tmp_path, MetricOptTrainer, metric, max_metric_failures=100)
    trainer.train()
    assert trainer.result.best_phi is None and trainer.observations
    merged = trainer.model.classifier.bias
    assert torch.equal(merged, trainer.result.last_phi[-len(merged) :])
    assert not torch.equal(merged, trainer.phase.start_phi[-len(merged) :])


def test_a_schedule_that_reacts_to_evaluation_goes_on_from_phi_s_rate(tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(1))
    phi = Subset(torch.nn.ParameterDict({"w": parameter}), "w")
    scheduler = ReduceLROnPlateau(torch.optim.SGD([parameter], lr=0.5), factor=0.1, patience=0)
    args = MetricOptConfig(
        str(tmp_path),
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=1,
        phi_learning_rate=0.2,
    )
    schedule, rates = PhiSchedule(args, 2, 4, 6), []
    for step in range(2, 6):
        schedule.apply(scheduler.optimizer, scheduler, phi, phi, step)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.step(1.0)
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.002])
