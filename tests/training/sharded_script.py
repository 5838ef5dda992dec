"""Run by torchrun from test_sharded.py: a model that FSDP2 has sharded. Not a test module of its own.

accelerate leaves FSDP out on the CPU, so what it does on a GPU is done here: sharding, and putting the whole together
to save it.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from distributed_script import digest, same_on_all_ranks
from helpers import Texts, tiny_bert, true_class_probability
from peft import LoraConfig, get_peft_model
from runs import planned
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from metricopt_hf import FiLM, MetricOptConfig, MetricOptTrainer, ValueFunction
from metricopt_hf.phi.coordinates import loss_gradients
from metricopt_hf.phi.space import _like, whole

folder = sys.argv[1]
RANKS = int(os.environ["WORLD_SIZE"])


class Sharded(MetricOptTrainer):
    """With two processes, sharded as accelerate would; with one, an ordinary model."""

    def settle(self):
        super().settle()
        model = self.model
        if RANKS > 1 and not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            shard(model)
            model._is_accelerate_prepared = True

    def save_model(self, output_dir=None, _internal_call=False):
        state = {name: whole(tensor) for name, tensor in self.model.state_dict().items()}
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = load_file(os.path.join(resume_from_checkpoint, "model.safetensors"))
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(_like(saved[name], tensor))
        self._load_phi(resume_from_checkpoint)


def shard(model):
    for layer in next(m for n, m in model.named_modules() if n.endswith("encoder.layer")):
        fully_shard(layer)
    fully_shard(model)


def check_gradients():
    """Coordinates come of the gradients that an ordinary model has on the same batches; what was there is put back."""
    batches = [{name: column[None] for name, column in Texts(8)[i].items()} for i in range(3)]
    found = []
    for sharded in (False, RANKS > 1):
        model = tiny_bert().eval()
        phi = FiLM(model)
        if sharded:
            shard(model)
        phi.add_grad(torch.ones(phi.dim))
        found.append(loss_gradients(phi, batches, lambda batch, model=model: model(**batch).loss))
        assert torch.equal(phi.read_grad(), torch.ones(phi.dim))
    assert found[0].abs().max() > 1e-3 and torch.allclose(*found, atol=1e-6)


def lora():
    torch.manual_seed(1)
    return get_peft_model(tiny_bert(), LoraConfig(target_modules=["query", "value"], r=2))


def run(name, model, resume=None, cls=Sharded, **kwargs):
    model.accepts_loss_kwargs = False
    torch.manual_seed(0)
    args = {
        "max_steps": 9,
        "per_device_train_batch_size": 8 // RANKS,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-2,
        "metric_start_ratio": 0.2,
        "optim": "sgd",
        "phi_dim": 3,
        "metric_call_budget": 160,
        "forward_pass_budget": 24,
        "select_steps": 3,
        "greater_is_better": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    settings = {**args, **kwargs}
    trainer = planned(cls, settings)(
        model,
        MetricOptConfig(os.path.join(folder, f"{name}-{RANKS}"), **settings),
        train_dataset=Texts(160, seed=1),
        eval_dataset=Texts(24, seed=2),
        observation_dataset=Texts(41, seed=3),
        selection_dataset=Texts(37, seed=4),
        metric=true_class_probability,
    )
    trainer.train(resume_from_checkpoint=resume)
    same_on_all_ranks(dict(trainer.ledger.calls))
    last = trainer.result.last_phi  # None where the best checkpoint was loaded instead
    last = trainer.phi.read() if last is None else last
    same_on_all_ranks(digest(last, trainer.phi.read()))
    if RANKS > 1 or trainer.is_fsdp_enabled:
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    weights = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    assert not any("film" in name for name in weights)
    if trainer.is_world_process_zero():
        result = trainer.result
        told = {
            "phi": last.tolist(),
            "scores": [o.score for o in trainer.observations],
            "selections": [row["selection"] for row in result.curve],
            "calls": dict(trainer.ledger.calls),
            "passes": dict(trainer.ledger.passes),
            "trust": result.trust,
            "model": result.value_function.signature.model if result.value_function else None,
            "weights": digest(*weights.values()),
        }
        with open(os.path.join(folder, f"{name}-{RANKS}.json"), "w") as file:
            json.dump(told, file)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    # what differs with the number of ranks otherwise: dropout in the first phase, batches for the coordinates
    same = {"metric_start_ratio": 0, "coordinates": "random"}
    check_gradients()
    run("film", tiny_bert(), **same)
    run("lora", lora(), **same)
    if RANKS > 1:
        whole_run = run("saved", tiny_bert(), save_strategy="steps", save_steps=5)
        whole_run.save_model(os.path.join(folder, "end"))
        dist.barrier()
        model = type(tiny_bert()).from_pretrained(os.path.join(folder, "end"))
        same_on_all_ranks(digest(*model.state_dict().values()))
        ValueFunction.from_pretrained(os.path.join(folder, "end"))
        run("resumed", tiny_bert(), os.path.join(folder, "saved-2", "checkpoint-5"))
    dist.barrier()
    print(f"all asserts held on {RANKS} ranks", flush=True)
    dist.destroy_process_group()
