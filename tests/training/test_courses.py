"""Scripts with a course of their own, after public reports: flags, several runs, several trainers."""

import dataclasses

import datasets
import pytest
import torch
from forms import PHASE, STEPS, assert_delivered, plain_and_guided
from helpers import Texts, assert_equal_weights, tiny_bert, weights
from runs import TEXT_RUN, probability, text_trainer
from transformers import HfArgumentParser

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptTrainer


@dataclasses.dataclass
class TwoRates(MetricOptConfig):  # urchade/GLiNER 159
    others_lr: float = 1e-2


class OthersFaster:
    def create_optimizer(self, *args):
        named = list(self.model.named_parameters())
        groups = [[p for n, p in named if ("bert" in n) is in_body] for in_body in (True, False)]
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[0]}, {"params": groups[1], "lr": self.args.others_lr}], lr=self.args.learning_rate
        )
        return self.optimizer


def test_arguments_of_a_subclass_with_fields_of_its_own(tmp_path):
    given = {"train_dataset": Texts(96, seed=1), "eval_dataset": Texts(48, seed=2)}
    cls = type("Own", (OthersFaster, MetricOptTrainer), {})
    trainer = text_trainer(tmp_path, cls, config=TwoRates, trainer_kwargs=given, max_steps=STEPS, **PHASE)
    trainer.train()
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-2]
    assert_delivered(trainer)


class TooLarge:  # transformers 27568, 25436
    def training_step(self, model, inputs, num_items_in_batch=None):
        if len(inputs["labels"]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_batch_size_that_is_found_on_the_way(tmp_path):
    given = {"form": TooLarge, "auto_find_batch_size": True, "per_device_train_batch_size": 16}
    plain, trainer = plain_and_guided(tmp_path, **given)
    trainer.train()
    assert trainer._train_batch_size == plain._train_batch_size <= 4 and trainer.state.global_step == STEPS
    assert [row["step"] for row in trainer.result.curve] == [STEPS - 2, STEPS - 1]
    assert_delivered(trainer)


def test_two_trainers_of_one_model_and_folds_with_the_same_arguments(tmp_path):
    """One trains without a metric, one is for evaluation (discuss.huggingface.co 10510)."""
    first, _ = plain_and_guided(tmp_path)
    data, args = Texts(96, seed=1), MetricOptConfig(str(tmp_path), **{**TEXT_RUN, "max_steps": STEPS, **PHASE})
    scores = []
    for fold in range(2):
        parts = [torch.utils.data.Subset(data, range(start, 96, 2)) for start in (fold, 1 - fold)]
        given = {"train_dataset": parts[0], "eval_dataset": parts[1], "compute_metrics": probability}
        trainer = MetricOptTrainer(first.model, args, **given)
        before = weights(trainer.model)
        trainer.evaluate()
        assert_equal_weights(before, weights(trainer.model))
        trainer.train()
        assert_delivered(trainer)
        scores.append(trainer.result.start.score)
    trainer.train()  # once more
    assert_delivered(trainer)
    assert len({*scores, trainer.result.start.score}) == 3


def test_where_nothing_can_be_cut_it_is_said_before_training(tmp_path):
    given = {"eval_dataset": datasets.IterableDataset.from_generator(lambda: iter(Texts(48, seed=2)))}
    trainer = text_trainer(tmp_path, trainer_kwargs=given)
    with pytest.raises(ConfigurationError, match="eval_dataset has no length"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_search_over_learning_rates(tmp_path):  # model_init, one trainer, several runs
    pytest.importorskip("optuna")
    given = {"model_init": lambda trial=None: tiny_bert(), "compute_metrics": probability}
    data = {"train_dataset": Texts(96, seed=1), "eval_dataset": Texts(48, seed=2)}
    trainer = text_trainer(tmp_path, trainer_kwargs={**data, **given}, max_steps=STEPS, eval_strategy="epoch", **PHASE)
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-4, 1e-3])},
        lambda metrics: metrics["eval_probability"], n_trials=2, direction="maximize", backend="optuna",
    )  # fmt: skip
    assert best.objective > 0.33 and trainer.result.curve


def test_frozen_first_then_whole(tmp_path):  # two stages with one trainer
    _, trainer = plain_and_guided(tmp_path)
    trainer.model.bert.requires_grad_(False)
    trainer.train()
    assert_delivered(trainer)
    assert not any(p.requires_grad for p in trainer.model.bert.parameters())
    trainer.model.bert.requires_grad_(True)
    trainer.train()
    assert_delivered(trainer)


def test_a_script_that_parses_its_arguments(tmp_path):  # the examples: HfArgumentParser, log_metrics, save_state
    words = f"--output_dir {tmp_path} --max_steps 8 --metric_steps 2 --metric_call_budget 60 --use_cpu --report_to none"
    words += " --metric_for_best_model eval_probability --greater_is_better True --eval_strategy steps --eval_steps 4"
    (args,) = HfArgumentParser(MetricOptConfig).parse_args_into_dataclasses(words.split())
    data = {"train_dataset": Texts(96, seed=1), "eval_dataset": Texts(48, seed=2)}
    trainer = MetricOptTrainer(tiny_bert(), args, compute_metrics=probability, **data)
    metrics = trainer.train().metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    assert {"train_results.json", "eval_results.json", "trainer_state.json"} <= {p.name for p in tmp_path.iterdir()}
    assert_delivered(trainer)
