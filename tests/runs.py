"""Runs of seconds, for the tests of every room that needs one."""

from __future__ import annotations

import torch
from helpers import OPTIMUM, Quadratic, Targets, Texts, distance_to_optimum, tiny_bert, true_class_probability

from metricopt_hf import Guide, MetricOptConfig, MetricOptTrainer

# A run of 8 steps on texts, judged by `probability`; the last 3 follow it.
TEXT_RUN = {
    "max_steps": 8,
    "metric_steps": 3,
    "metric_call_budget": 300,
    "phi_dim": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "metric_for_best_model": "probability",
    "greater_is_better": True,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
# Arguments of the trainer, not of its config.
OF_TRAINER = {
    "callbacks", "compute_metrics", "data_collator", "eval_dataset", "guide", "metric", "model_init",
    "observation_dataset", "optimizers", "phi", "post_process_function", "preprocess_logits_for_metrics",
    "selection_dataset", "train_dataset", "value_function",
}


def probability(prediction):
    return {"probability": true_class_probability(prediction)}


def text_trainer(folder, cls=MetricOptTrainer, model=None, config=MetricOptConfig, trainer_kwargs=None, **kwargs):
    """Texts judged by `compute_metrics`; observation and selection sets are cut from `eval_dataset`."""
    data = {
        "train_dataset": Texts(96, seed=1),
        "eval_dataset": Texts(48, seed=2),
        "compute_metrics": probability,
        **(trainer_kwargs or {}),
    }
    if "model_init" not in data:
        data["model"] = model or tiny_bert()
    settings = {**TEXT_RUN, **kwargs}
    ours = {name: value for name, value in settings.items() if name in config.__dataclass_fields__}
    return cls(args=config(str(folder), **ours), **data)


def bert_trainer(folder, cls=MetricOptTrainer, model=None, **kwargs):
    """Texts judged by `metric`, with sets of their own; by default a run of the metric phase alone.

    Takes arguments of the trainer and of its config.
    """
    data = {
        "train_dataset": Texts(96, seed=1),
        "observation_dataset": Texts(40, seed=3),
        "selection_dataset": Texts(40, seed=4),
        **{name: value for name, value in kwargs.items() if name in OF_TRAINER},
    }
    if "metric" not in data and "compute_metrics" not in data:
        data["metric"] = true_class_probability
    if "model_init" not in data:
        data["model"] = model or tiny_bert()
    settings = {name: value for name, value in kwargs.items() if name not in OF_TRAINER}
    settings = {**TEXT_RUN, "metric_for_best_model": None, "max_steps": 4, "metric_steps": 4, **settings}
    return cls(args=MetricOptConfig(str(folder), **settings), **data)


def faulty_trainer(folder, metric, cls=MetricOptTrainer, **kwargs):
    """A run that observes scores, so that a metric that fails does so once per pass."""
    settings = {"observe": "scores", "guide": "pairs", "metric_call_budget": 24, **kwargs}
    return bert_trainer(folder, cls, metric=metric, **settings)


class Truth(Guide):
    """Knows the optimum of the quadratic toy; `sign=-1` is the guide that lies."""

    def __init__(self, sign: int = 1):
        self.sign = sign

    def fit(self, metric, z):
        phi = metric.phi + metric.coordinates.lift(z)
        self.towards = self.sign * metric.coordinates.basis.T @ (torch.as_tensor(OPTIMUM, dtype=torch.float32) - phi)

    def gradient(self, z):
        return self.towards


def quadratic_trainer(folder, guide=None, cls=MetricOptTrainer, model=None, **kwargs):
    """|w - a|^2 for the loss, |w - b|^2 for the metric, which is smaller where it is better."""
    settings = {
        "max_steps": 8,
        "metric_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "phi": "^w$",
        "phi_dim": 6,
        "observe": "scores",
        "guide": "pairs",
        "greater_is_better": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],
        **kwargs,
    }
    return cls(
        model or Quadratic(),
        MetricOptConfig(str(folder), **settings),
        train_dataset=Targets(seed=1),
        observation_dataset=Targets(8, seed=2),
        selection_dataset=Targets(8, seed=3),
        metric=distance_to_optimum,
        guide=guide,
    )
