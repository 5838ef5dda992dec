"""A subclass overrides what the library wraps: guidance, freezing and modes hold all the same."""

import logging

import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, weights
from runs import text_trainer
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptTrainer


def make(cls, folder, model=None, classes=MetricOptConfig, trainer_kwargs=None, **kwargs):
    return text_trainer(folder, cls, model, classes, trainer_kwargs, **kwargs)


def score_on_selection(trainer):
    return trainer.predict(trainer.selection_dataset).metrics["test_probability"]


def rows(size, seed):
    """Pictures of which the brighter are of class 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(size, generator=generator) < 0.3).long()
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator) + b * 0.3 + 1, "labels": b} for b in labels]


def resnet():
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    )


def test_class_weights_in_compute_loss_on_a_net_with_batch_norm(tmp_path):
    """transformers 12997: what was selected is what comes out."""

    class WeightedTrainer(MetricOptTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"], torch.tensor([1.0, 3.0]))
            return (loss, outputs) if return_outputs else loss

    data = {"train_dataset": rows(160, 0), "eval_dataset": rows(80, 1)}
    trainer = make(WeightedTrainer, tmp_path, resnet(), trainer_kwargs=data)
    trainer.train()
    assert trainer.ledger.calls["observe"] > 0
    assert score_on_selection(trainer) == pytest.approx(trainer.result.best_score, abs=1e-6)


def test_a_training_step_that_calls_the_model_itself(tmp_path):
    """It never passes by compute_loss, and makes sure of train mode where nobody looks."""

    class OwnStep(MetricOptTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)
            for module in model.children():
                module.train()
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Statistics(TrainerCallback):
        seen = []

        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step >= 12:
                self.seen.append({n: b.clone() for n, b in model.named_buffers()})

    statistics = Statistics()
    data = {"train_dataset": rows(160, 0), "eval_dataset": rows(80, 1), "callbacks": [statistics]}
    trainer = make(OwnStep, tmp_path, resnet(), trainer_kwargs=data)
    trainer.train()
    assert len(statistics.seen) == 5
    assert_equal_weights(statistics.seen[0], statistics.seen[-1])
    assert score_on_selection(trainer) == pytest.approx(trainer.result.best_score, abs=1e-6)


class FGM:
    """Adversarial training as in GLiNER's trainer: a step up the loss in the embeddings, and back."""

    attacks = 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        backup = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "word_embeddings" in name and parameter.grad.norm() > 0:
                backup[name] = parameter.data.clone()
                parameter.data.add_(parameter.grad / parameter.grad.norm())
                self.attacks += 1
        self.accelerator.backward(self.compute_loss(model, inputs))
        for name, parameter in model.named_parameters():
            if name in backup:
                parameter.data = backup[name]
        return loss.detach()


def test_adversarial_training_goes_on_in_the_metric_phase(tmp_path):
    class FGMTrainer(FGM, MetricOptTrainer):
        pass

    model = tiny_bert()
    at_start = {}

    class Start(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 12:
                at_start.update(weights(model))

    trainer = make(FGMTrainer, tmp_path, model, trainer_kwargs={"callbacks": [Start()]}, logging_steps=1)
    trainer.train()
    assert trainer.ledger.calls["observe"] > 0
    assert trainer.attacks == 16  # the rehearsal's is forgotten
    moved = {name for name, value in weights(model).items() if not torch.equal(value, at_start[name])}
    assert moved and all("layer.1" in name and "LayerNorm" in name or name == "classifier.bias" for name in moved)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(rates) == 16 and min(rates) > 0


def test_the_first_phase_of_a_subclass_is_that_of_a_shorter_trainer(tmp_path):
    """Bit for bit, with a step of its own that draws random numbers and writes to the weights in the rehearsal too."""

    class Noisy:
        def training_step(self, model, inputs, num_items_in_batch=None):
            with torch.no_grad():
                model.bert.embeddings.word_embeddings.weight.add_(0.01 * torch.randn(8, 16))
            self.calls = getattr(self, "calls", 0) + 1
            self.log({"calls": self.calls})
            return super().training_step(model, inputs, num_items_in_batch)

    class Plain(Noisy, Trainer):
        pass

    class Ours(Noisy, MetricOptTrainer):
        pass

    at_start = {}

    class Start(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 12:
                at_start.update(weights(model))

    plain = make(Plain, tmp_path, classes=TrainingArguments, max_steps=12)
    plain.train()
    ours = make(Ours, tmp_path, trainer_kwargs={"callbacks": [Start()]})
    ours.train()
    assert_equal_weights(weights(plain.model), at_start)
    assert [entry["calls"] for entry in ours.state.log_history if "calls" in entry] == list(range(1, 17))


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        groups = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.seen[state.global_step] = {n: groups.get(id(p)) for n, p in model.named_parameters()}


def body_and_head(model):
    head = [p for n, p in model.named_parameters() if "classifier" in n]
    body = [p for n, p in model.named_parameters() if "classifier" not in n]
    return torch.optim.AdamW([{"params": body, "lr": 1e-5}, {"params": head, "lr": 1e-3}])


@pytest.mark.parametrize("given", ["overridden", "optimizers", "with a schedule"])
def test_each_group_has_its_own_rate_and_phi_its_own_in_the_metric_phase(tmp_path, given):
    """transformers 10140: a head that learns 100 times faster than the body."""

    class OwnGroups(MetricOptTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = body_and_head(self.model)
            return self.optimizer

    model, rates = tiny_bert(), Rates()
    kwargs = {"callbacks": [rates]}
    if given != "overridden":
        optimizer = body_and_head(model)  # before there is a phi
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 100)
        kwargs["optimizers"] = (optimizer, schedule if given == "with a schedule" else None)
    cls = OwnGroups if given == "overridden" else MetricOptTrainer
    trainer = make(
        cls, tmp_path, model, trainer_kwargs=kwargs, lr_scheduler_type="constant", phi_learning_rate=0.01, max_steps=20
    )
    trainer.train()
    for step in range(15):
        factor = 1 - step / 100 if given == "with a schedule" else 1
        assert rates.seen[step]["bert.embeddings.word_embeddings.weight"] == pytest.approx(1e-5 * factor)
        assert rates.seen[step]["classifier.bias"] == pytest.approx(1e-3 * factor)
    first_of_metric_phase = rates.seen[15]
    tuned = {name for name in first_of_metric_phase if "film" in name} | {"classifier.bias"}
    assert len(tuned) == 5 and {first_of_metric_phase[name] for name in tuned} == {0.01}
    assert trainer.result.trajectory


def test_what_the_optimizer_of_the_user_s_leaves_out_stays_as_it_is_in_phase_one(tmp_path):
    class HeadOnly(MetricOptTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD([self.model.classifier.weight], lr=0.1)
            return self.optimizer

    before, at_start = weights(tiny_bert()), {}

    class Start(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 12:
                at_start.update(weights(model))

    trainer = make(HeadOnly, tmp_path, trainer_kwargs={"callbacks": [Start()]})
    trainer.train()
    assert {name for name in before if not torch.equal(before[name], at_start[name])} == {"classifier.weight"}
    assert not torch.equal(trainer.model.classifier.bias, before["classifier.bias"])  # tuned for the metric


def test_a_schedule_of_the_user_s_own_that_cannot_be_shortened(tmp_path):
    """OneCycleLR counts its steps and ends the run at one too many."""

    class OneCycle(MetricOptTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            schedule = torch.optim.lr_scheduler.OneCycleLR
            self.lr_scheduler = schedule(self.optimizer, 1e-3, total_steps=num_training_steps)
            return self.lr_scheduler

    rates = Rates()
    trainer = make(OneCycle, tmp_path, trainer_kwargs={"callbacks": [rates]}, lr_scheduler_type="constant")
    trainer.train()
    assert rates.seen[12]["classifier.bias"] == trainer.args.phi_learning_rate
    assert rates.seen[3]["classifier.bias"] == rates.seen[3]["classifier.weight"] < 1e-3


def test_a_metric_phase_that_does_not_begin_is_an_error_at_its_first_step(tmp_path):
    class OwnLoop(MetricOptTrainer):
        def _run_epoch(self, *args, **kwargs):
            guided, self.training_step = self.training_step, lambda *a: Trainer.training_step(self, *a)
            try:
                return super()._run_epoch(*args, **kwargs)
            finally:
                self.training_step = guided

    trainer = make(OwnLoop, tmp_path)
    with pytest.raises(ConfigurationError, match=r"Step 12 .* not guided: OwnLoop .*self\.training_step"):
        trainer.train()
    assert trainer.state.global_step == 13


def test_methods_set_on_the_trainer_itself_are_still_there_afterwards(tmp_path):
    trainer = make(MetricOptTrainer, tmp_path)
    calls = []
    original = trainer.training_step

    def own(*args):
        calls.append(trainer.state.global_step)
        return original(*args)

    trainer.training_step = own
    trainer.train()
    assert trainer.training_step is own
    assert calls.count(15) == 1 and trainer.ledger.calls["observe"] > 0


def test_an_override_without_num_items_in_batch(tmp_path):
    """As many are written; with a step that does not pass it on, Trainer takes them."""

    class Old:
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

        def compute_loss(self, model, inputs, return_outputs=False):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                outputs = model(**self._prepare_inputs(inputs))
            return outputs.loss, outputs.logits, inputs["labels"]

    class Ours(Old, MetricOptTrainer):
        pass

    trainer = make(Ours, tmp_path)
    trainer.train()
    assert trainer.ledger.calls["observe"] > 0


class SaveAtEnd(TrainerCallback):
    """As trackers' callbacks do."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(self.folder / "callback")
        other = Trainer(model, TrainingArguments(str(self.folder), report_to=[], use_cpu=True))
        other.save_model(self.folder / "other")


def test_what_a_callback_saves_at_the_end_is_the_selected_model(tmp_path):
    """wandb 2949, peft 96."""
    callback = SaveAtEnd(tmp_path)
    trainer = make(MetricOptTrainer, tmp_path, trainer_kwargs={"callbacks": [callback]}, phi_learning_rate=0.1)
    trainer.train()
    expected = weights(trainer.model)
    assert trainer.result.best_step > 0
    for name in ("callback", "other"):
        assert_equal_weights(expected, weights(type(trainer.model).from_pretrained(tmp_path / name)))


def test_whoever_saves_in_the_metric_phase_saves_a_plain_model(tmp_path):
    """A save_model of one's own, `model.state_dict()`, `save_pretrained`, the inner model's; and they are merged."""
    kept = {}
    ids = Texts(20, seed=9).ids

    class OwnSave(MetricOptTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            kept["parameters"] = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            super().save_model(output_dir, _internal_call)

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 14:
                model.save_pretrained(tmp_path / "pretrained")
                kept["state"] = weights(model)
                kept["inner"] = {f"bert.{name}": t.clone() for name, t in model.bert.state_dict().items()}
                with torch.no_grad():
                    kept["logits"] = model.eval()(ids).logits
                control.should_save = True
            if state.global_step == 15:
                assert any("film" in name for name, _ in model.named_parameters())  # put back behind the save

    trainer = make(OwnSave, tmp_path, trainer_kwargs={"callbacks": [Look()]}, phi_learning_rate=0.1)
    trainer.train()
    names = set(tiny_bert().state_dict())
    assert set(kept["parameters"]) == {n for n, _ in tiny_bert().named_parameters()}
    assert set(kept["state"]) == names
    assert {name for name in names if name.startswith("bert.")} == set(kept["inner"])
    for state in (kept["state"], {**kept["state"], **kept["inner"]}, {**kept["state"], **kept["parameters"]}):
        fresh = tiny_bert(seed=5).eval()
        fresh.load_state_dict(state)
        with torch.no_grad():
            assert torch.allclose(fresh(ids).logits, kept["logits"], atol=1e-5)
    loaded = type(trainer.model).from_pretrained(tmp_path / "pretrained")
    assert_equal_weights(kept["state"], weights(loaded))


def test_a_callback_that_puts_plain_weights_back(tmp_path):
    """Best-weights and EMA callbacks load what they saved, in the midst of the metric phase."""

    class PutBack(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 13:
                self.saved = weights(model)
            if state.global_step == 15:
                model.load_state_dict(self.saved)  # strict
                assert_equal_weights(self.saved, weights(model))

    make(MetricOptTrainer, tmp_path, trainer_kwargs={"callbacks": [PutBack()]}).train()


def test_a_direction_that_is_known(tmp_path, caplog):
    """Named nowhere, its direction is its name's; trained to the wrong side nothing would say so."""

    def mse(prediction):
        return {"mse": float((prediction.predictions.argmax(-1) != prediction.label_ids).mean())}

    data = {"compute_metrics": mse}
    with caplog.at_level(logging.WARNING, "metricopt_hf"):
        trainer = make(
            MetricOptTrainer, tmp_path, trainer_kwargs=data, metric_for_best_model="mse", greater_is_better=None
        )
        assert trainer.metric.greater_is_better is False
    assert "smaller values of mse" in caplog.text
    assert trainer.args.greater_is_better is False  # Trainer's own choice of the best checkpoint, too
