"""What a guide may ask for in a run: a loss of its own, all parameters, the first phase."""

import pytest
import torch
from helpers import (
    OPTIMUM,
    Quadratic,
    Targets,
    Texts,
    assert_equal_weights,
    weights,
)
from runs import Truth, bert_trainer, quadratic_trainer
from transformers import Trainer, TrainerCallback

from metricopt_hf import Guide, MetricOptTrainer
from metricopt_hf.training import observing

BEST = torch.as_tensor(OPTIMUM, dtype=torch.float32)


class ByLoss(Truth):
    """Says the distance to the optimum as a loss; notes every batch that it is asked about."""

    def __init__(self, sign=1):
        super().__init__(sign)
        self.asked = []

    def direction(self, phi):
        return None

    def loss(self, inputs, outputs, task_loss):
        assert "labels" in inputs and task_loss.requires_grad and task_loss.shape == ()
        self.asked.append(task_loss.item())
        return (outputs["logits"] - BEST).square().sum(1).mean()


class Scaled(Quadratic):
    """Divides its loss by what Trainer counts over the accumulated batches, as models of `transformers` do."""

    accepts_loss_kwargs = True

    def forward(self, target, labels=None, num_items_in_batch=None):
        outputs = super().forward(target, labels)
        if num_items_in_batch is not None:
            outputs["loss"] = outputs["loss"] * len(target) / num_items_in_batch
        return outputs


class Forget(TrainerCallback):
    """What a trainer and its guide have noted in the rehearsal is not of the run."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.records, self.trainer.targets, self.trainer.trusts = [], [], []


class Gradients(MetricOptTrainer):
    """Keeps, step by step, phi, the gradient of the loss, the trust while it was computed and the batches' targets."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.records, self.targets, self.trusts = [], [], []
        self.add_callback(Forget(self))

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.phase is not None and self._stage is not None:
            self.targets.append(inputs["target"])
            self.trusts.append(self.phase.guide.standing[0] if self.phase.started else 0.0)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _guide_update(self, step):
        self.records.append((self.phi.read(), self.phi.read_grad(), self.trusts, torch.cat(self.targets)))
        self.targets, self.trusts = [], []
        super()._guide_update(step)


def run(folder, guide, model=None, **kwargs):
    trainer = quadratic_trainer(folder, guide, kwargs.pop("cls", MetricOptTrainer), model=model, **kwargs)
    trainer.train()
    return trainer


MODELS = pytest.mark.parametrize("model", [Quadratic, Scaled], ids=["plain", "takes loss kwargs"])


@MODELS
@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_it_replaces_the_task_s_loss_as_far_as_it_is_trusted(tmp_path, model, accumulate):
    trainer = run(tmp_path, ByLoss(), model(), cls=Gradients, gradient_accumulation_steps=accumulate)
    assert trainer.model_accepts_loss_kwargs is (model is Scaled)
    followed = 0
    for phi, gradient, trusts, targets in trainer.records:
        assert len(set(trusts)) == 1 and len(trusts) == len(targets) / 4 <= accumulate  # fewer where an epoch ends
        task, guided = phi - targets.mean(0), 2 * (phi - BEST)
        assert torch.allclose(gradient, task + trusts[0] * (guided - task), rtol=1e-4, atol=1e-5)
        followed += trusts[0] > 0
    assert max(len(trusts) for _, _, trusts, _ in trainer.records) == accumulate
    assert len(trainer.records) == 20 and followed == 19  # before the first round there is no evidence


@MODELS
@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_that_lies_changes_nothing_by_a_bit(tmp_path, model, accumulate):
    guide = ByLoss(-1)
    lied = run(tmp_path, guide, model(), gradient_accumulation_steps=accumulate)
    loss_only = run(tmp_path, None, model(), value_weight=0, gradient_accumulation_steps=accumulate)
    assert all(row["trust"] == 0 for row in lied.result.curve) and not guide.asked
    assert torch.equal(lied.result.last_phi, loss_only.result.last_phi)
    assert [e["train_loss"] for e in lied.state.log_history if "train_loss" in e] == [
        e["train_loss"] for e in loss_only.state.log_history if "train_loss" in e
    ]


def test_switched_off_it_is_asked_no_more(tmp_path):
    class Off(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 10:
                guide.switch_off("a test")

    guide = ByLoss()
    trainer = quadratic_trainer(tmp_path, guide, Gradients)
    trainer.add_callback(Off())
    trainer.train()
    assert len(guide.asked) == 9
    for phi, gradient, trusts, targets in trainer.records[10:]:
        assert trusts == [0.0]
        assert torch.allclose(gradient, phi - targets.mean(0), atol=1e-6)


def test_it_is_trained_but_not_evaluated(tmp_path):
    class Large(ByLoss):
        def loss(self, inputs, outputs, task_loss):
            return outputs["logits"].sum() * 0 + 200.0

    trainer = run(tmp_path, Large(), logging_steps=10, value_weight=0)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(loss > 90 for loss in logged[1:])
    assert trainer.evaluate(Targets(8, seed=5))["eval_loss"] < 50


@MODELS
def test_accumulation_is_a_larger_batch(tmp_path, model):
    kwargs = {"optim": "adamw_torch", "learning_rate": 0.05}
    large, small = (
        run(
            tmp_path,
            ByLoss(),
            model(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            logging_steps=5,
            **kwargs,
        )
        for batch, accumulate in ((8, 1), (1, 8))
    )
    assert torch.allclose(large.result.last_phi, small.result.last_phi, rtol=1e-4, atol=1e-5)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (large, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    loss_only = run(tmp_path, None, model(), value_weight=0, per_device_train_batch_size=8, **kwargs)
    assert not torch.allclose(large.result.last_phi, loss_only.result.last_phi, atol=0.1)


@pytest.mark.skipif(not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="this transformers does not ask for it")
def test_accumulation_with_a_loss_that_a_subclass_says_is_a_mean(tmp_path):
    class Mean(Gradients):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

    trainer = run(tmp_path, ByLoss(), Scaled(), cls=Mean, gradient_accumulation_steps=4)
    for phi, gradient, trusts, targets in trainer.records:
        task, guided = phi - targets.mean(0), 2 * (phi - BEST)
        assert torch.allclose(gradient, task + trusts[0] * (guided - task), rtol=1e-4, atol=1e-5)


# ---- scope


class Everywhere(Guide):
    """Knows nothing, and wants all parameters to move."""

    scope = "all"

    def predict(self, z):
        return None

    def learn(self, observed):
        pass


class Moves(MetricOptTrainer):
    """Notes which parameters have moved since the run began, and in which mode they are trained."""

    def _guide_update(self, step):
        moved = {n for n, p in self.model.named_parameters() if not torch.equal(p, self.initial[n])}
        self.moved, self.training_modes = moved, {module.training for module in self.model.modules()}
        super()._guide_update(step)

    def train(self, *args, **kwargs):
        self.settle()
        self.initial = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return super().train(*args, **kwargs)


def test_a_guide_may_let_all_parameters_move(tmp_path):
    wide, narrow = (bert_trainer(tmp_path, cls=Moves, guide=guide) for guide in (Everywhere(), None))
    wide.train()
    assert {"bert.embeddings.word_embeddings.weight", "classifier.weight"} <= wide.moved
    assert wide.training_modes == {True}  # as in ordinary training, dropout included
    assert not any("film" in name for name in weights(wide.model))
    names = set(narrow.phi.names)
    narrow.train()
    assert narrow.moved == names and narrow.training_modes == {False}


@pytest.mark.parametrize("first_phase", [0.0, 0.5])
def test_with_all_parameters_they_go_on_moving_in_the_metric_phase(tmp_path, first_phase):
    """Each phase runs the schedule once: the first one's has come down to nothing when it ends."""
    trainer = bert_trainer(tmp_path, cls=Moves, guide=Everywhere(), metric_start_ratio=first_phase, max_steps=12)
    seen = {}

    class Border(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen[state.global_step] = weights(model)["bert.embeddings.word_embeddings.weight"]

    trainer.add_callback(Border())
    trainer.train()
    assert all(not torch.equal(seen[step], seen[step + 1]) for step in range(1, 11))


def test_with_all_parameters_the_best_of_all_is_put_in_place(tmp_path):
    """All that moves is what was selected, to the bit, and not phi alone."""

    class Path(MetricOptTrainer):
        def _guide_update(self, step):
            path.append(weights(self.model))
            super()._guide_update(step)

    def metric(prediction):
        """Best when the selection set is seen for the sixth time."""
        selects.append(len(prediction.label_ids) == 50)
        return -abs(sum(selects) - 6)

    path, selects = [], []
    trainer = bert_trainer(
        tmp_path,
        metric=metric,
        cls=Path,
        guide=Everywhere(),
        phi="classifier",
        optim="sgd",
        select_steps=1,
        selection_dataset=Texts(50, seed=4),
    )
    trainer.train()
    assert trainer.result.best_score == 0 and trainer.result.best_step == 5
    assert trainer.result.best_phi.numel() == sum(p.numel() for p in trainer.model.parameters())
    assert_equal_weights(path[5], weights(trainer.model))
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(path[5][name], path[11][name])


# ---- the first phase


class Early(ByLoss):
    """Is asked from the run's beginning; notes what it is told."""

    in_first_phase = True

    def __init__(self, sign=1):
        super().__init__(sign)
        self.starts, self.rounds = [], []

    def start(self, context):
        super().start(context)
        self.starts.append(context.coordinates.origin.clone())

    def learn(self, observed):
        self.rounds.append((len(self.starts), observed.trajectory[-1].step, len(observed.trajectory)))


def test_in_the_first_phase_it_observes_and_speaks_and_nothing_is_selected(tmp_path):
    guide = Early()
    trainer = run(tmp_path, guide, metric_start_ratio=0.5, observe_steps=2, metric_call_budget=None)
    steps = [step for _, step, _ in guide.rounds]
    assert steps == list(range(0, 20, 2))
    rehearsed = guide.rounds[0][0] - 1  # it was started for the rehearsal too
    assert [start - rehearsed for start, *_ in guide.rounds] == [1] * 5 + [2] * 5
    guide.starts = guide.starts[rehearsed:]
    assert [count for *_, count in guide.rounds] == [8, 16, 24, 32, 40] * 2  # other coordinates: begun anew
    assert not torch.equal(*guide.starts)  # phi moved in between
    assert len(guide.asked) == 19  # before the first round there is no evidence
    assert min(row["step"] for row in trainer.result.curve if row["selection"] is not None) == 10
    assert trainer.result.start_step == 10 and trainer.result.best_step >= 10
    assert torch.equal(guide.starts[1], trainer.result.coordinates.origin)


def test_in_the_first_phase_its_loss_moves_all_of_the_model(tmp_path):
    """One that is trusted moves the run; one that lies leaves it the run that nothing guides, to the bit."""

    def at_border(guide, **kwargs):
        class Border(TrainerCallback):
            def on_step_end(self, args, state, control, model, **kwargs):
                if state.global_step == 10:
                    seen.append(model.w.detach().clone())

        seen = []
        trainer = quadratic_trainer(tmp_path, guide, metric_start_ratio=0.5, metric_call_budget=None, **kwargs)
        trainer.add_callback(Border())
        trainer.train()
        return seen[0]

    loss_only = at_border(None, value_weight=0)
    assert torch.equal(at_border(Early(-1)), loss_only)
    assert (at_border(Early()) - BEST).norm() < 0.6 * (loss_only - BEST).norm()


class EarlyValues(Early):
    """The same for any model: it predicts nothing, so it changes nothing."""

    def predict(self, z):
        return None


def test_while_all_of_the_model_moves_nothing_is_replayed(tmp_path, monkeypatch):
    """Observed with what was kept of frozen activations, a model that moves on would be scored as it was."""
    scores = []
    for memory in (2e9, 0.0):
        monkeypatch.setattr(observing, "CACHE_BYTES", memory)
        trainer = bert_trainer(
            tmp_path,
            guide=EarlyValues(),
            metric_start_ratio=0.5,
            metric_call_budget=None,
            observe_steps=1,
        )
        told = []
        trainer._given_guide.learn = lambda observed, told=told: told.extend(observed.trajectory.last_round.scores)
        trainer.train()
        scores.append(told)
    assert len(scores[0]) == 8 * 12 and scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_its_calls_are_spread_over_both_phases(tmp_path):
    trainer = run(tmp_path, Early(), metric_start_ratio=0.5, observe_steps=None, metric_call_budget=40)
    assert trainer.ledger.calls["observe"] == 40
    assert [step for _, step, _ in trainer._given_guide.rounds] == [0, 4, 8, 10, 14]


@pytest.mark.parametrize("step", [3, 7])
def test_a_run_with_it_is_resumed_in_either_phase(tmp_path, step):
    def make(folder):
        return quadratic_trainer(
            folder,
            Early(),
            max_steps=10,
            metric_start_ratio=0.5,
            observe_steps=2,
            metric_call_budget=None,
            save_strategy="steps",
            save_steps=1,
        )

    whole, resumed = make(tmp_path / "whole"), make(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert torch.equal(whole.result.last_phi, resumed.result.last_phi)
    assert [o.score for o in whole.observations] == [o.score for o in resumed.observations]
    assert whole.result.curve == resumed.result.curve or step == 3
