"""Run by torchrun from test_distributed.py: what has to hold on every rank. Not a test module of its own."""

import hashlib
import json
import os
import sys

import torch
import torch.distributed as dist
from helpers import Texts, tiny_bert, true_class_probability
from runs import SCORES, planned

from metricopt_hf import MetricOptConfig, MetricOptTrainer


def digest(*tensors):
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()


def same_on_all_ranks(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(v == values[0] for v in values), values


class Checked(MetricOptTrainer):
    """At every step: phi, guide and blended gradient are the same bits on all ranks."""

    steps = 0

    def _guide_update(self, step):
        super()._guide_update(step)
        direction = self.phase.guide.direction(self.phi.read())
        same_on_all_ranks(
            digest(self.phi.read(), self.phi.read_grad(), direction.vector, *self.value_function.state_dict().values())
        )
        same_on_all_ranks([direction.trust, direction.reason, [o.score for o in self.observations]])
        self.steps += 1


def run(name, folder, **kwargs):
    sizes = []

    def metric(prediction):
        sizes.append(len(prediction.label_ids))
        return true_class_probability(prediction)

    model = tiny_bert()
    model.accepts_loss_kwargs = False
    args = {
        "max_steps": 12,
        "per_device_train_batch_size": 8 // int(os.environ.get("WORLD_SIZE", 1)),
        "learning_rate": 1e-2,
        "metric_call_budget": 36,
        "round_size": 5,
        "observe_steps": 1,
        "metric_start_ratio": 0.25,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "greater_is_better": True,
        "optim": "sgd",
        "coordinates": "random",
    }
    settings = {**SCORES, **args, **kwargs}
    trainer = planned(Checked, settings)(
        model,
        MetricOptConfig(folder, **settings),
        train_dataset=Texts(160, seed=1),
        observation_dataset=Texts(41, seed=3),
        selection_dataset=Texts(37, seed=4),
        metric=metric,
    )
    trainer.train()
    ledger = dict(trainer.ledger.calls)
    same_on_all_ranks(ledger)
    assert set(sizes) <= {41, 37}, sizes  # all of either set, without padding duplicates
    counts = [None] * dist.get_world_size()
    dist.all_gather_object(counts, len(sizes))
    assert sum(counts) == sum(ledger.values())
    if dist.get_world_size() > 1:
        assert counts[1] == sum(1 for i in range(36) if i % 5 % 2), counts  # observations were shared out
    assert trainer.steps == 12 - trainer._metric_start
    if trainer.is_world_process_zero():
        scores = [o.score for o in trainer.observations]
        result = {"phi": trainer.result.last_phi.tolist(), "scores": scores, "calls": ledger}
        with open(os.path.join(folder, f"{name}-{dist.get_world_size()}.json"), "w") as file:
            json.dump(result, file)


def run_defaults(folder):
    """An ordinary model and default arguments: Trainer averages tokens across the ranks, in evaluation too."""
    args = MetricOptConfig(
        folder,
        max_steps=8,
        metric_for_best_model="probability",
        greater_is_better=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        include_for_metrics=["loss"],
    )
    assert args.average_tokens_across_devices

    gaps = []  # of the losses; they are means of batches, each of as many rows, where all of a set are there

    def compute_metrics(prediction):
        labels = torch.as_tensor(prediction.label_ids)
        mean = torch.nn.functional.cross_entropy(torch.as_tensor(prediction.predictions), labels)
        gaps.append(abs(float(prediction.losses.mean() - mean)))
        return {"probability": true_class_probability(prediction)}

    trainer = Checked(
        tiny_bert(),
        args,
        train_dataset=Texts(160, seed=1),
        eval_dataset=Texts(80, seed=3),
        compute_metrics=compute_metrics,
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    same_on_all_ranks(dict(trainer.ledger.calls))
    same_on_all_ranks(digest(*trainer.model.state_dict().values()))
    assert max(gaps[:1], default=0) < 1e-4, "the loss counts the labels of other ranks"  # the first is of a real pass
    assert trainer.ledger.calls["observe"] and trainer.args.average_tokens_across_devices


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"])
    run("two_phases", sys.argv[1])
    run("metric_phase_alone", sys.argv[1], metric_start_ratio=0.0)
    run(
        "gradient_pca",
        sys.argv[1],
        coordinates="gradient_pca",
        gradient_accumulation_steps=2,
        phi_dim=3,
        max_grad_norm=0.1,
    )
    run("bf16", sys.argv[1], bf16=True, optim="adamw_torch")
    run_defaults(os.path.join(sys.argv[1], "defaults"))
    dist.barrier()
    print(f"all asserts held on {dist.get_world_size()} ranks", flush=True)
    dist.destroy_process_group()
