"""What a run changes is put back however it ends, and nothing of it leaks into the next one."""

import logging

import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, true_class_probability, weights
from runs import SCORES, TEXT_RUN, planned, probability, text_trainer
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from metricopt_hf import CheckpointError, ConfigurationError, FiLM, MetricOptConfig, MetricOptTrainer, PhiError

DEFAULTS = {**SCORES, **TEXT_RUN, "metric_call_budget": 24}


def make(folder, *args, **kwargs):
    return text_trainer(folder, *args, **{**DEFAULTS, **kwargs})


def assert_ordinary(trainer, callbacks):
    """As before the run, but for what was learned."""
    plain = tiny_bert()
    assert set(weights(trainer.model)) == set(weights(plain))
    assert [n for n, _ in trainer.model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert not any("train" in vars(module) for module in trainer.model.modules())
    assert not any(module._forward_hooks or module._state_dict_hooks for module in trainer.model.modules())
    assert not {"training_step", "compute_loss", "create_optimizer", "save_model", "log"} & set(vars(trainer))
    assert trainer.callback_handler.callbacks == callbacks


class Once(TrainerCallback):
    """Ends the run at a step, the first time."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("step", [3, 14])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the disk is full")], ids=["interrupt", "error"])
def test_a_run_that_ends_early_leaves_an_ordinary_model_and_another_can_follow(tmp_path, step, error):
    trainer = make(tmp_path, trainer_kwargs={"callbacks": [Once(step, error)]})
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(type(error)):
        trainer.train()
    assert_ordinary(trainer, callbacks)
    before = weights(trainer.model)
    trainer.train()
    assert_ordinary(trainer, callbacks)
    after = weights(trainer.model)
    assert all(not torch.equal(before[name], after[name]) for name in after if "position_ids" not in name)
    assert trainer.ledger.calls["observe"] == 24 and trainer.phase.start_step == 12


def test_an_interrupt_keeps_what_was_tuned_so_far(tmp_path):
    logits, ids = {}, Texts(20, seed=9).ids

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 14:
                with torch.no_grad():
                    logits["inside"] = model.eval()(ids).logits

    trainer = make(
        tmp_path, trainer_kwargs={"callbacks": [Look(), Once(14, KeyboardInterrupt())]}, phi_learning_rate=0.1
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with torch.no_grad():
        assert torch.allclose(trainer.model.eval()(ids).logits, logits["inside"], atol=1e-5)


@pytest.mark.parametrize("step", [3, 13])
def test_out_of_memory_with_auto_find_batch_size(tmp_path, step):
    """Trainer begins the run anew with a smaller batch, in the same call of train."""
    trainable = []

    class Greedy(MetricOptTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step == step and len(inputs["input_ids"]) > 4 and torch.is_grad_enabled():
                raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                trainable.append(sum(p.requires_grad for n, p in model.named_parameters() if "film" not in n))

    trainer = make(tmp_path, Greedy, trainer_kwargs={"callbacks": [Look()]}, auto_find_batch_size=True)
    callbacks = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer._train_batch_size <= 4 and trainer.state.global_step == 16
    assert len(trainable) == 5 and set(trainable) == {len(list(tiny_bert().parameters()))}
    assert trainer.ledger.calls["observe"] == 24 and trainer.phase.start_step == 12
    assert_ordinary(trainer, callbacks)


def test_no_memory_already_in_the_rehearsal(tmp_path):
    class Greedy(MetricOptTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate more than there is")
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = make(tmp_path, Greedy, auto_find_batch_size=True)
    trainer.train()
    assert trainer._train_batch_size <= 4 and trainer.ledger.calls["observe"] == 24


def test_a_phi_and_an_optimizer_of_one_s_own_serve_twice(tmp_path):
    model = tiny_bert()
    phi, optimizer = FiLM(model), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make(tmp_path, model=model, trainer_kwargs={"phi": phi, "optimizers": (optimizer, None)})
    for _ in range(2):
        trainer.train()
        assert trainer.phi is phi and not phi.inserted
        assert trainer.ledger.calls["observe"] == 24
        assert trainer.result.phi["parameters"][0][0].endswith("film_scale")


RESUMED = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 1, "max_steps": -1, "phi_learning_rate": 0.1}


def test_a_finished_run_goes_on_with_more_epochs_and_is_guided_anew(tmp_path, caplog):
    make(tmp_path, **RESUMED).train()
    trainer = make(tmp_path, **{**RESUMED, "num_train_epochs": 3})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 60
    assert "metric phase that began at step 15" in caplog.text and "begins at step 45" in caplog.text
    assert trainer.phase.start_step == 45 and min(trainer.result.trajectory.steps) == 45
    assert trainer.ledger.calls["observe"] == 24
    score = trainer.predict(trainer.selection_dataset).metrics["test_probability"]
    assert score == pytest.approx(trainer.result.best_score, abs=1e-6)


def test_going_on_is_a_plain_run_from_the_weights_that_were_saved(tmp_path):
    """Up to the metric phase, as Trainer goes on: what was tuned is in the weights, and its rates are not."""
    make(tmp_path, **RESUMED).train()
    seen = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
            if not seen:
                seen.update(weights(model))
                rates.extend(group["lr"] for group in optimizer.param_groups)

    rates = []
    trainer = make(tmp_path, trainer_kwargs={"callbacks": [Look()]}, **{**RESUMED, "num_train_epochs": 3})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    saved = weights(type(trainer.model).from_pretrained(tmp_path / "checkpoint-20"))
    assert_equal_weights(saved, seen)
    assert len(set(rates)) == 1 and max(rates) <= 1e-3


def test_fewer_steps_than_were_taken_in_the_metric_phase_are_refused(tmp_path):
    make(tmp_path, **RESUMED).train()
    trainer = make(tmp_path, **{**RESUMED, "max_steps": 21})
    with pytest.raises(CheckpointError, match=r"began at step 15.* begins at 16, and step 18 lies behind"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-18"))


OTHERS = {
    "guide": "random",
    "phi": "classifier",
    "coordinates": "random",
    "phi_dim": 3,
    "observe": "predictions",
    "metric_start_ratio": 0.5,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    make(folder, save_strategy="steps", save_steps=2).train()
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_not_gone_on_with(finished, tmp_path, name):
    trainer = make(tmp_path, **{name: OTHERS[name]})
    with pytest.raises(CheckpointError) as caught:
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-14"))
    message = str(caught.value)
    ours, saved = {
        "guide": ("RandomGuide", "ValueFunctionGuide"),
        "phi": ("Subset on", "FiLM on"),
        "coordinates": ("random", "gradient_pca"),
    }.get(
        name, (str(OTHERS[name]), str(SCORES.get(name, getattr(MetricOptConfig, name, None))))
    )
    assert f"{name}=" in message and ours in message and saved in message and "checkpoint-14" in message
    assert trainer.model.classifier.weight.requires_grad


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "phi"])
def test_before_the_metric_phase_its_numbers_may_change(finished, tmp_path, name):
    trainer = make(tmp_path, **{name: OTHERS[name]})
    trainer.train(resume_from_checkpoint=str(finished / "checkpoint-6"))
    assert trainer.ledger.calls["observe"] >= 16 and trainer.phase.start_step == 16 * trainer.args.metric_start_ratio


def test_resume_without_a_checkpoint_is_trainer_s_own_error(tmp_path):
    messages = []
    for cls, config in ((Trainer, TrainingArguments), (MetricOptTrainer, MetricOptConfig)):
        trainer = cls(
            tiny_bert(),
            config(str(tmp_path), **TEXT_RUN),
            train_dataset=Texts(160, seed=1),
            eval_dataset=Texts(80, seed=2),
            compute_metrics=probability,
        )
        with pytest.raises(ValueError, match="No valid checkpoint found") as caught:
            trainer.train(resume_from_checkpoint=True)
        messages.append((type(caught.value), str(caught.value)))
        assert set(weights(trainer.model)) == set(weights(tiny_bert()))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("step", [8, 16])
def test_resume_where_nothing_can_be_selected(tmp_path, step):
    """The metric has no value on the selection split: what training ended with comes out."""
    ended = {}

    class End(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            ended.update(weights(model))

    def metric(prediction):
        if len(prediction.label_ids) == 33:
            return float("nan")
        return true_class_probability(prediction)

    def run(folder, **kwargs):
        settings = {**DEFAULTS, "metric_start_ratio": 0, "max_failures": 1000, **kwargs}
        trainer = planned(MetricOptTrainer, settings)(
            tiny_bert(),
            MetricOptConfig(str(folder), **settings),
            train_dataset=Texts(160, seed=1),
            observation_dataset=Texts(40, seed=3),
            selection_dataset=Texts(33, seed=4),
            metric=metric,
            callbacks=[End()],
        )
        return trainer

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    assert whole.result.best_phi is None
    assert_equal_weights(weights(whole.model), ended)
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert_equal_weights(weights(whole.model), weights(resumed.model))


# Demands and guesses


def test_a_script_that_only_predicts_is_asked_for_nothing(tmp_path):
    """No eval set, no direction, arguments of the old class: nothing of this matters before train."""
    model = tiny_bert()
    names = [n for n, _ in model.named_parameters()]
    trainer = MetricOptTrainer(
        model,
        MetricOptConfig(str(tmp_path), metric_for_best_model="somebody_s_score", report_to=[], use_cpu=True),
        compute_metrics=lambda p: {"somebody_s_score": true_class_probability(p)},
    )
    assert 0 < trainer.predict(Texts(20, seed=5)).metrics["test_somebody_s_score"] < 1
    trainer.evaluate(Texts(20, seed=5))
    trainer.save_model()
    assert [n for n, _ in model.named_parameters()] == names
    with pytest.raises(ConfigurationError, match="'somebody_s_score' is better: set greater_is_better=True"):
        trainer.train()
    old = MetricOptTrainer(
        tiny_bert(),
        TrainingArguments(str(tmp_path), metric_for_best_model="f1", report_to=[], use_cpu=True),
        compute_metrics=lambda p: {"f1": true_class_probability(p)},
    )
    old.predict(Texts(20, seed=5))
    old.evaluate(Texts(20, seed=5))
    with pytest.raises(ConfigurationError, match="MetricOptConfig"):
        old.train()


@pytest.mark.parametrize(("steps", "told"), [(1, True), (2, True), (4, False)])
def test_a_run_too_short_for_a_metric_phase_says_so(tmp_path, caplog, steps, told):
    trainer = make(tmp_path, max_steps=steps)
    trainer.train()
    assert ("leaves none for the metric phase" in caplog.text) is told
    assert trainer.phase.started is not told


def test_a_run_that_stops_before_the_metric_phase_says_so(tmp_path, caplog):
    stop = EarlyStoppingCallback(1, early_stopping_threshold=10.0)
    kwargs = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, trainer_kwargs={"callbacks": [stop]}, load_best_model_at_end=True, **kwargs)
    with caplog.at_level(logging.WARNING, "metricopt_hf"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert "ended at step 4, before the metric phase (step 12)" in caplog.text


def lora():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )


def test_of_a_peft_model_the_adapter_is_tuned_and_saved(tmp_path, caplog):
    """peft 310, 876: only the class names changed."""
    import peft

    model = lora()
    trainer = make(tmp_path, model=model, learning_rate=1e-2)
    trainer.train()
    assert all("lora" in name or "modules_to_save" in name for name in trainer.phi.names)
    assert "moves no prediction" not in caplog.text  # as half of a fresh LoRA does, beside the other, which is 0
    trainer.save_model()
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    ids = Texts(20, seed=9).ids
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(ids).logits, model.eval()(ids).logits, atol=1e-6)


@pytest.mark.parametrize("phi", ["film", FiLM])
def test_film_on_a_peft_model_is_refused_with_the_reason(tmp_path, phi):
    with pytest.raises(PhiError, match='adapter alone is saved.*phi="adapter"'):
        make(tmp_path, model=lora(), trainer_kwargs={"phi": phi}).train()
