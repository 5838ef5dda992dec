"""Run by torchrun from test_fsdp.py: FSDP2 through accelerate and Trainer. Not a test module of its own.

accelerate leaves FSDP out on the CPU without a word, so there it is made to take the CPU for a GPU. On a GPU nothing is
changed.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from distributed_script import digest, same_on_all_ranks
from helpers import Texts, tiny_bert
from safetensors.torch import load_file
from sharded_script import lora, run
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, TrainerCallback

from metricopt_hf import MetricOptTrainer, ValueFunction

folder, DEVICE = sys.argv[1], sys.argv[2]
RANKS = int(os.environ["WORLD_SIZE"])
# what differs with the number of ranks otherwise: dropout in the first phase, batches for the coordinates
SAME = {"metric_start_ratio": 0, "coordinates": "random"}
FULL, PARTS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def take_the_cpu_for_a_gpu():
    begin = AcceleratorState.__init__

    def begin_sharded(state, *args, fsdp_plugin=None, **kwargs):
        begin(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded


class Killed(TrainerCallback):
    """Ends a run at a step without a word, as a lost machine does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(name, model, state_dict=FULL, resume=None, config=None, **kwargs):
    """FSDP2 with all there is but one process on the CPU, which is what the others are held against."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # of the run before
    if state_dict is not None:
        kwargs["fsdp"] = True
        # by default accelerate 1.15 shards BertEmbeddings, and then once more what is in it
        wrapped = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
        kwargs["fsdp_config"] = {"version": 2, "state_dict_type": state_dict, **wrapped, **(config or {})}
    trainer = run(name, model, resume, MetricOptTrainer, use_cpu=DEVICE == "cpu", **kwargs)
    assert trainer.is_fsdp_enabled == (state_dict is not None), name
    assert (trainer.accelerator.distributed_type == DistributedType.FSDP) == (state_dict is not None), name
    return trainer


def check_saved(trainer, name):
    """What is saved is a model like any other, and says the same."""
    path = os.path.join(folder, f"saved-{name}")
    trainer.save_model(path)
    if trainer.is_world_process_zero():
        assert not any("film" in key for key in load_file(os.path.join(path, "model.safetensors")))
        ValueFunction.from_pretrained(path)
    dist.barrier()
    ids = torch.stack([Texts(16, seed=5)[i]["input_ids"] for i in range(16)]).to(trainer.args.device)
    with torch.no_grad():
        plain = AutoModelForSequenceClassification.from_pretrained(path).to(ids.device).eval()(input_ids=ids).logits
        ours = trainer.model.eval()(input_ids=ids).logits
    assert type(plain) is torch.Tensor and torch.allclose(plain, ours, atol=1e-6), (plain - ours).abs().max()
    assert trainer.evaluate(Texts(33, seed=6))["eval_loss"] > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        torch.use_deterministic_algorithms(True)
        take_the_cpu_for_a_gpu()
    if RANKS == 1 and DEVICE == "cpu":
        train("film", tiny_bert(), None, **SAME)
        train("lora", lora(), None, **SAME)
    else:
        check_saved(train("film", tiny_bert(), **SAME), "film")
        train("lora", lora(), PARTS, **SAME)
    print(f"all asserts held on {RANKS} ranks", flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
