"""Runs of seconds, for the tests of every room that needs one."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers import OPTIMUM, Quadratic, Targets, Texts, distance_to_optimum, tiny_bert, true_class_probability

from metricopt_hf import DirectionGuide, MetricOptConfig, MetricOptTrainer

# A run that observes scores, and does nothing behind the last step: what many tests are about.
SCORES = {"observe": "scores", "phi_dim": 6, "tune_output_bias": False}

# A run of 16 steps on texts, judged by `probability`.
TEXT_RUN = {
    "max_steps": 16,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "metric_for_best_model": "probability",
    "greater_is_better": True,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


# numbers of `PhasePlan` that no user sets, and a test may
PLANNED = {"select_steps", "observe_steps", "round_size", "perturbation_std", "max_failures"}


def planned(cls, settings):
    """`cls` with what of `settings` is no argument of the config (coordinates, the plan): that is taken out of them."""
    numbers = {name: settings.pop(name) for name in PLANNED & settings.keys()}
    numbers = {name: number for name, number in numbers.items() if number is not None}
    options = {name: settings.pop(name) for name in {"coordinates"} & settings.keys()}

    class Planned(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **options, **kwargs)

        def _make_plan(self, *args, **kwargs):
            return replace(super()._make_plan(*args, **kwargs), **numbers)

    return Planned if numbers or options else cls


def probability(prediction):
    return {"probability": true_class_probability(prediction)}


def text_trainer(folder, cls=MetricOptTrainer, model=None, config=MetricOptConfig, trainer_kwargs=None, **kwargs):
    data = {
        "train_dataset": Texts(160, seed=1),
        "eval_dataset": Texts(80, seed=2),
        "compute_metrics": probability,
        **(trainer_kwargs or {}),
    }
    if "model_init" not in data:
        data["model"] = model or tiny_bert()
    settings = {**TEXT_RUN, **kwargs}
    cls = planned(cls, settings)
    return cls(args=config(str(folder), **settings), **data)


class Truth(DirectionGuide):
    """Knows the optimum of the quadratic toy; `sign=-1` is the guide that lies."""

    def __init__(self, sign: int = 1):
        self.factor = sign

    def predict(self, z):
        w = (self.context.coordinates.origin + torch.as_tensor(z) @ self._basis().T).numpy()
        return self.factor * ((w - OPTIMUM) ** 2).sum(1)

    def fit(self, trajectory):
        pass

    def ascent(self, phi):
        return self.factor * 2 * (phi - torch.as_tensor(OPTIMUM, dtype=torch.float32))

    def _basis(self):
        basis = self.context.coordinates.basis
        return torch.eye(len(OPTIMUM)) if basis is None else basis


def quadratic_trainer(folder, guide=None, cls=MetricOptTrainer, model=None, **kwargs):
    defaults = {
        "max_steps": 20,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "phi": "^w$",
        "coordinates": "identity",
        "phi_learning_rate": None,
        "metric_start_ratio": 0,
        "select_steps": 1,
        "observe_steps": 1,
        "greater_is_better": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "label_names": ["labels"],
    }
    settings = {**SCORES, **defaults, **kwargs}
    return planned(cls, settings)(
        model or Quadratic(),
        MetricOptConfig(str(folder), **settings),
        train_dataset=Targets(seed=1),
        observation_dataset=Targets(8, seed=2),
        selection_dataset=Targets(8, seed=3),
        metric=distance_to_optimum,
        guide=guide,
    )


class Recorder(MetricOptTrainer):
    """Keeps .grad before and after blending, step by step."""

    def _guide_update(self, step):
        before = self.phi.read_grad()
        phi = self.phi.read()
        super()._guide_update(step)
        direction = self.phase.direction
        self.records = getattr(self, "records", []) + [(before, self.phi.read_grad(), phi, direction)]


def bert_trainer(folder, model=None, **kwargs):
    trainer_kwargs = {
        name: kwargs.pop(name)
        for name in ("metric", "phi", "guide", "compute_metrics", "eval_dataset", "optimizers", "model_init", "cls")
        if name in kwargs
    }
    for name in ("observation_dataset", "selection_dataset", "train_dataset"):
        if name in kwargs:
            trainer_kwargs[name] = kwargs.pop(name)
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "metric_start_ratio": 0,
        "metric_call_budget": 24,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "greater_is_better": True,
    }
    cls = trainer_kwargs.pop("cls", MetricOptTrainer)
    data = {
        "train_dataset": Texts(160, seed=1),
        "observation_dataset": Texts(60, seed=3),
        "selection_dataset": Texts(60, seed=4),
    }
    if "metric" not in trainer_kwargs and "compute_metrics" not in trainer_kwargs:
        trainer_kwargs["metric"] = true_class_probability
    if "model_init" not in trainer_kwargs:
        trainer_kwargs["model"] = model or tiny_bert()
    settings = {**SCORES, **defaults, **kwargs}
    cls = planned(cls, settings)
    return cls(args=MetricOptConfig(str(folder), **settings), **{**data, **trainer_kwargs})


def faulty_trainer(folder, metric, cls=MetricOptTrainer, guide=None, **kwargs):
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "metric_start_ratio": 0,
        "metric_call_budget": 24,
        "select_steps": 2,
        "observe_steps": 2,
        "round_size": 4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "greater_is_better": True,
        "phi_dim": 4,
    }
    settings = {**SCORES, **defaults, **kwargs}
    return planned(cls, settings)(
        tiny_bert(),
        MetricOptConfig(str(folder), **settings),
        train_dataset=Texts(160, seed=1),
        observation_dataset=Texts(40, seed=3),
        selection_dataset=Texts(40, seed=4),
        metric=metric,
        guide=guide,
    )
