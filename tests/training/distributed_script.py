"""Run by torchrun from test_distributed.py: what has to hold on every rank. Not a test module of its own."""

import hashlib
import json
import os
import sys

import torch
import torch.distributed as dist
from helpers import Texts, tiny_bert, true_class_probability
from linear_models import evaluator, linearizer, texts

from metricopt_hf import FiLM, Metric, MetricOptConfig, MetricOptTrainer, ValueFunction
from metricopt_hf.linear.cost import DIFFERENCES, ROW_BY_ROW
from metricopt_hf.training import checkpoint
from metricopt_hf.training.observing import Observing

FOLDER = sys.argv[1]
RANKS = int(os.environ["WORLD_SIZE"])


def digest(*tensors):
    return hashlib.sha256(b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)).hexdigest()


def same_on_all_ranks(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(v == values[0] for v in values), values


def run(name, resume=None, metric=None, model=None, **kwargs):
    sizes = []

    def counted(prediction):
        sizes.append(len(prediction.label_ids))
        return true_class_probability(prediction)

    settings = {
        "max_steps": 4,
        "metric_steps": 4,
        "per_device_train_batch_size": 8 // RANKS,
        "learning_rate": 1e-2,
        "phi_dim": 6,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "greater_is_better": True,
        **kwargs,
    }
    trainer = MetricOptTrainer(
        model or tiny_bert(),
        MetricOptConfig(os.path.join(FOLDER, f"{name}-{RANKS}"), **settings),
        train_dataset=Texts(160, seed=1),
        observation_dataset=Texts(41, seed=3),
        selection_dataset=Texts(37, seed=4),
        metric=None if "metric_command" in kwargs else metric or counted,
    )
    trainer.train(resume_from_checkpoint=resume)
    result = trainer.result
    ledger = {purpose: dict(getattr(trainer.ledger, purpose)) for purpose in ("calls", "passes")}
    same_on_all_ranks([ledger, result.why, result.chosen.score, result.trajectory.scores.tolist()])
    same_on_all_ranks(digest(*trainer.model.state_dict().values()))
    counts = [None] * RANKS
    dist.all_gather_object(counts, len(sizes))
    assert result.failed_calls == 0
    if metric is None and "metric_command" not in kwargs:
        assert set(sizes) <= {41, 20, 37, 18}, sizes  # all of either set or half of it, without padding duplicates
        if resume is None:
            assert sum(counts) == sum(ledger["calls"].values()), (counts, ledger)
        if result.observed == "predictions":
            assert min(counts) > 0.4 / RANKS * sum(counts), counts  # calls were shared out
    if trainer.is_world_process_zero():
        document = {
            "phi": result.chosen.phi.tolist(), "kind": result.chosen.kind, "ledger": ledger, "why": result.why,
            "values": [row["value"] for row in result.curve], "weights": digest(*trainer.model.state_dict().values()),
        }  # fmt: skip
        with open(os.path.join(FOLDER, f"{name}-{RANKS}.json"), "w") as file:
            json.dump(document, file)
    dist.barrier()
    return trainer


class Batchwise:
    right = ()

    def __call__(self, prediction, compute_result):
        self.right = (*self.right, *(prediction.predictions.argmax(-1) == prediction.label_ids).tolist())
        if compute_result:
            score, self.right = sum(self.right) / len(self.right), ()
            return {"accuracy": score}


def detached_on_the_last_rank():
    """A model whose outputs have no derivatives there."""
    model = tiny_bert()

    def detach(module, args, output):
        return output if module.training else type(output)(**{k: v.detach() for k, v in output.items()})

    if dist.get_rank() == RANKS - 1:
        model.register_forward_hook(detach)
    return model


def run_defaults():
    """An ordinary model and default arguments: Trainer averages tokens across the ranks; a checkpoint each step."""
    folder = os.path.join(FOLDER, f"defaults-{RANKS}")
    args = MetricOptConfig(
        folder, max_steps=6, metric_steps=3, metric_for_best_model="probability", greater_is_better=True, save_steps=1,
        save_total_limit=4, report_to=[], use_cpu=True, disable_tqdm=True, include_for_metrics=["loss"],
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    trainer = MetricOptTrainer(
        tiny_bert(), args, train_dataset=Texts(160, seed=1), eval_dataset=Texts(80, seed=3),
        compute_metrics=lambda prediction: {"probability": true_class_probability(prediction)},
    )  # fmt: skip
    assert args.average_tokens_across_devices and trainer.model_accepts_loss_kwargs
    trainer.train()
    same_on_all_ranks(digest(*trainer.model.state_dict().values()))
    assert trainer.result.failed_calls == 0 and trainer.args.average_tokens_across_devices
    trainer.save_model()
    dist.barrier()
    ValueFunction.from_pretrained(folder)
    checkpoint.check(os.path.join(folder, "checkpoint-6"))


def check_linearisation():
    """Each rank differentiates its own batches, and all have what one process has."""
    found = {}
    for ranks in (1, RANKS):
        torch.manual_seed(0)
        rank = dist.get_rank() if ranks > 1 else 0
        taken = evaluator(FiLM(tiny_bert().eval()), 2 * texts(), rank=rank, world_size=ranks)
        made, prediction, passes = linearizer(taken), taken.predictions(), []
        basis = made.coordinates(prediction).basis
        first = made.linearize(basis, prediction)
        taken.phi.model.register_forward_hook(lambda *_, passes=passes: passes.append("of a batch"))
        again = made.linearize(basis, prediction)
        assert made.way == ROW_BY_ROW
        assert torch.allclose(first.leaves[0].jacobian, again.leaves[0].jacobian, atol=1e-5)
        found[ranks] = basis, again.leaves[0].jacobian, len(passes)
    for one, several in zip(found[1], found[RANKS], strict=True):
        assert one == 6 and several == 6 / RANKS if isinstance(one, int) else torch.allclose(one, several, atol=1e-4)

    # one that alone meets outputs that cannot be differentiated leaves none waiting
    predict = taken.predict

    def failing(batch):
        if dist.get_rank() == RANKS - 1 and taken.phi.model._forward_pre_hooks:
            raise RuntimeError("no derivatives here")
        return predict(batch)

    taken.predict = failing
    linear = made.linearize(basis, prediction)
    assert made.way == DIFFERENCES and (linear.leaves[0].jacobian - again.leaves[0].jacobian).abs().max() < 0.05
    same_on_all_ranks(digest(linear.leaves[0].jacobian))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (row for row in Texts(96, 1))


def check_gradients_of_a_stream():
    """Each rank gets rows of its own, and all have the gradients of the first one."""
    args = MetricOptConfig(os.path.join(FOLDER, f"stream-{RANKS}"), max_steps=4, greater_is_better=True, use_cpu=True,
                           report_to=[])  # fmt: skip
    parts = {name: Texts(16, seed) for seed, name in enumerate(("observation_dataset", "selection_dataset"))}
    trainer = MetricOptTrainer(tiny_bert(), args, train_dataset=Stream(), metric=true_class_probability, **parts)
    gradients = Observing(trainer, trainer.metric, trainer.phi).loss_gradients(3)
    assert gradients.shape == (3, trainer.phi.dim) and gradients.any()
    same_on_all_ranks(digest(gradients))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    run("predictions")
    check_linearisation()
    check_gradients_of_a_stream()
    run("scores", observe="scores", guide="pairs", metric_call_budget=30)
    run("blended", value_weight=1.0, gradient_accumulation_steps=2, per_device_train_batch_size=4 // RANKS)
    run("batchwise", metric=Metric(Batchwise(), "accuracy", batchwise=True), guide="pairs", metric_call_budget=30)
    run("command", metric_command="/bin/sh -c 'wc -c < $1/model.safetensors' x {model}", metric_for_best_model="size",
        metric_call_budget=8, max_steps=1, metric_steps=1)  # fmt: skip
    run("whole", max_steps=6, metric_steps=3, save_strategy="steps", save_steps=1)
    for step in (2, 4):
        run(f"resumed{step}", os.path.join(FOLDER, f"whole-{RANKS}", f"checkpoint-{step}"), max_steps=6, metric_steps=3)
    run_defaults()
    detached = run("detached", model=detached_on_the_last_rank(), max_steps=1, metric_steps=1)
    assert detached.phase.linearizer.way == DIFFERENCES
    dist.barrier()
    print(f"all asserts held on {RANKS} ranks", flush=True)
    dist.destroy_process_group()
