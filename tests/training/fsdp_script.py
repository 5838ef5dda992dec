"""Run by torchrun from test_fsdp.py: FSDP2 through accelerate and Trainer. Not a test module of its own.

    torchrun --nproc_per_node 2 fsdp_script.py FOLDER cpu       (or cuda; plain: without FSDP, on the CPU)

accelerate leaves FSDP out on the CPU without a word, so there it is made to take the CPU for a GPU. On a GPU nothing is
changed.
"""

import glob
import os
import sys
import time

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from helpers import Texts, tiny_bert
from peft import PeftModel
from safetensors.torch import load_file
from sharded_script import lora, run
from transformers import AutoModelForSequenceClassification

from metricopt_hf import MetricOptTrainer, ValueFunction

folder, MODE = sys.argv[1:]
RANKS = int(os.environ["WORLD_SIZE"])
# what differs with the number of ranks otherwise: dropout in the first phase, batches for the coordinates
SAME = {"metric_start_ratio": 0, "coordinates": "random", "average_tokens_across_devices": False}
# what `accelerate launch --use_fsdp --fsdp_version 2` sets, with its defaults
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
FULL, PARTS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def take_the_cpu_for_a_gpu():
    begin = AcceleratorState.__init__

    def begin_sharded(state, *args, fsdp_plugin=None, **kwargs):
        begin(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)

    AcceleratorState.__init__ = begin_sharded


def train(name, model, state_dict=FULL, resume=None, environment=None, **kwargs):
    """A run under FSDP2, asked for in the arguments, or by `environment`; with neither, without it."""
    for variable in LAUNCHED:  # of the run before
        os.environ.pop(variable, None)
    if environment is not None:
        os.environ.update(environment)
    elif state_dict is not None:
        kwargs["fsdp"] = True
        # by default accelerate 1.15 shards BertEmbeddings, and then once more what is in it
        wrapped = {"transformer_layer_cls_to_wrap": ["BertLayer"]}
        kwargs["fsdp_config"] = {"version": 2, "state_dict_type": state_dict, **wrapped}
    start = time.perf_counter()
    trainer = run(name, model, resume, MetricOptTrainer, use_cpu=MODE != "cuda", **kwargs)
    sharded = state_dict is not None or environment is not None
    kind = trainer.accelerator.distributed_type
    assert trainer.is_fsdp_enabled == (kind == DistributedType.FSDP) == sharded, (name, kind)
    if trainer.is_world_process_zero():
        print(f"{name}: {time.perf_counter() - start:.1f} s on {trainer.args.device}, {kind}", flush=True)
    return trainer


def check_saved(trainer, name, load=AutoModelForSequenceClassification.from_pretrained):
    """What is saved is a model like any other, and says the same."""
    path = os.path.join(folder, f"saved-{name}")
    trainer.save_model(path)
    if trainer.is_world_process_zero():
        for file in glob.glob(os.path.join(path, "*.safetensors")):
            assert not any("film" in key for key in load_file(file))
        ValueFunction.from_pretrained(path)
    dist.barrier()
    ids = torch.stack([Texts(16, seed=5)[i]["input_ids"] for i in range(16)]).to(trainer.args.device)
    with torch.no_grad():
        plain = load(path).to(ids.device).eval()(input_ids=ids).logits
        ours = trainer.model.eval()(input_ids=ids).logits
    assert type(plain) is torch.Tensor and torch.allclose(plain, ours, atol=1e-5), (plain - ours).abs().max()
    assert trainer.evaluate(Texts(33, seed=6))["eval_loss"] > 0


def check_best(state_dict):
    """The best checkpoint, loaded at the end, is what comes out."""
    every = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = train("best", tiny_bert(), state_dict, load_best_model_at_end=True, metric_start_ratio=0.4, **every)
    best, path = trainer.state.best_model_checkpoint, os.path.join(folder, "saved-best")
    trainer.save_model(path)
    if trainer.is_world_process_zero():
        ours, saved = (load_file(os.path.join(where, "model.safetensors")) for where in (path, best))
        assert ours.keys() == saved.keys()
        assert all(torch.allclose(ours[key], saved[key], atol=1e-6) for key in ours)


def empty_but_on_the_first():
    """As from_pretrained may leave a model on the other ranks, with cpu_ram_efficient_loading."""
    model = tiny_bert()
    if dist.get_rank() > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
    return model


def check_resumed(name, make, state_dict, steps, **kwargs):
    """Interrupted in either phase, a run ends as if it had not been."""
    saves = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "metric_start_ratio": 0.4}
    train(f"{name}_whole", make(), state_dict, **saves, **kwargs)
    for step in steps:
        path = os.path.join(folder, f"{name}_whole-{RANKS}", f"checkpoint-{step}")
        assert any("pytorch_model_fsdp" in entry for entry in os.listdir(path))
        train(f"{name}_from_{step}", make(), state_dict, path, **saves, **kwargs)


def on_several():
    check_saved(train("film", tiny_bert(), **SAME), "film")
    adapted = train("lora", lora(), PARTS, **SAME)
    check_saved(adapted, "lora", lambda path: PeftModel.from_pretrained(tiny_bert(), path))
    accumulates = {"per_device_train_batch_size": 4 // RANKS, "gradient_accumulation_steps": 2}
    train("accumulated", tiny_bert(), PARTS, **SAME, **accumulates)
    train("launched", empty_but_on_the_first(), environment=LAUNCHED, **SAME)
    check_best(FULL)
    check_resumed("full", tiny_bert, FULL, [2, 6])
    check_resumed("parts", tiny_bert, PARTS, [2])
    check_resumed("adapter", lora, PARTS, [6])


def on_one():
    train("plain", tiny_bert(), None, **SAME)
    check_saved(train("film", tiny_bert(), **SAME), "film")
    check_saved(train("lora", lora(), PARTS, **SAME), "lora", lambda path: PeftModel.from_pretrained(tiny_bert(), path))
    train("launched", tiny_bert(), environment=LAUNCHED, **SAME)
    train("bf16", tiny_bert(), bf16=True, **SAME)
    check_best(FULL)
    check_resumed("full", tiny_bert, FULL, [6])
    check_resumed("parts", tiny_bert, PARTS, [6])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if MODE != "cuda":
        torch.use_deterministic_algorithms(True)
        take_the_cpu_for_a_gpu()
    if MODE == "plain":
        train("film", tiny_bert(), None, **SAME)
        train("lora", lora(), None, **SAME)
    elif RANKS == 1:
        on_one()
    else:
        on_several()
    print(f"all asserts held on {RANKS} ranks", flush=True)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
