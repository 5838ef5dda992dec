"""Run by torchrun from test_fsdp.py: FSDP2 through accelerate and Trainer. Not a test module of its own.

    torchrun --nproc_per_node 2 fsdp_script.py FOLDER cpu       (or cuda)

accelerate leaves FSDP out on the CPU without a word, so there it is made to take the CPU for a GPU. On a GPU nothing is
changed.
"""

import glob
import os
import sys

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from distributed_script import RANKS, detached_on_the_last_rank, same_on_all_ranks
from helpers import Texts, tiny_bert, true_class_probability
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification

from metricopt_hf import MetricOptConfig, MetricOptTrainer, ValueFunction
from metricopt_hf.linear.cost import DIFFERENCES

FOLDER, MODE = sys.argv[1:]
FULL, PARTS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def take_the_cpu_for_a_gpu():
    begin = AcceleratorState.__init__

    def begin_sharded(state, *args, fsdp_plugin=None, **kwargs):
        begin(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin_sharded


def train(name, state_dict=FULL, resume=None, model=None, **kwargs):
    # by default accelerate 1.15 shards BertEmbeddings, and then once more what is in it
    plugin = {"version": 2, "state_dict_type": state_dict, "transformer_layer_cls_to_wrap": ["BertLayer"]}
    settings = {
        "max_steps": 6, "metric_steps": 3, "per_device_train_batch_size": 8 // RANKS, "learning_rate": 1e-2,
        "phi_dim": 4,
        "metric_call_budget": 24, "greater_is_better": True, "save_strategy": "steps", "save_steps": 2, "report_to": [],
        "disable_tqdm": True, "use_cpu": MODE != "cuda", "fsdp": True, "fsdp_config": plugin, **kwargs,
    }  # fmt: skip
    trainer = MetricOptTrainer(
        model or tiny_bert(), MetricOptConfig(os.path.join(FOLDER, f"{name}-{RANKS}"), **settings),
        train_dataset=Texts(160, seed=1),
        eval_dataset=Texts(24, seed=2), observation_dataset=Texts(41, seed=3), selection_dataset=Texts(37, seed=4),
        metric=true_class_probability,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.is_fsdp_enabled and all(isinstance(p, DTensor) for p in trainer.model.parameters())
    result = trainer.result
    same_on_all_ranks([dict(trainer.ledger.calls), result.chosen.phi.tolist(), result.why])
    assert result.observed == "predictions" and result.failed_calls == 0 and len(result.curve) == 3
    return trainer


def check_saved(trainer, name):
    """What is saved is a model like any other, and says the same."""
    path = os.path.join(FOLDER, f"saved-{name}")
    trainer.save_model(path)
    dist.barrier()
    assert not any("film" in key for file in glob.glob(os.path.join(path, "*.safetensors")) for key in load_file(file))
    ValueFunction.from_pretrained(path)
    ids = Texts(16, seed=5).ids.to(trainer.args.device)
    with torch.no_grad():
        plain = AutoModelForSequenceClassification.from_pretrained(path).to(ids.device).eval()(input_ids=ids).logits
        ours = trainer.model.eval()(input_ids=ids).logits
    assert torch.allclose(plain, ours, atol=1e-5), (plain - ours).abs().max()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if MODE != "cuda":
        torch.use_deterministic_algorithms(True)
        take_the_cpu_for_a_gpu()
    for state_dict in (FULL, PARTS):
        whole = train(f"whole_{state_dict}", state_dict)
        check_saved(whole, state_dict)
        for step in (2, 4):
            path = os.path.join(FOLDER, f"whole_{state_dict}-{RANKS}", f"checkpoint-{step}")
            resumed = train(f"from_{step}_{state_dict}", state_dict, path, save_strategy="no")
            assert resumed.result.chosen.phi.tolist() == whole.result.chosen.phi.tolist()
            assert resumed.result.curve == whole.result.curve
    if RANKS > 1:  # one that alone meets outputs without derivatives leaves none waiting
        detached = train("detached", model=detached_on_the_last_rank(), save_strategy="no")
        assert detached.phase.linearizer.way == DIFFERENCES
    dist.barrier()
    print(f"all asserts held on {RANKS} ranks", flush=True)
    dist.destroy_process_group()
