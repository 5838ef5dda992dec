"""Run by torchrun from test_deepspeed.py: DeepSpeed's ZeRO through accelerate and Trainer. Not a test module itself.

    torchrun --nproc_per_node 2 deepspeed_script.py FOLDER
"""

import os
import sys

import torch
import torch.distributed as dist
from distributed_script import RANKS, digest, same_on_all_ranks
from helpers import Texts, tiny_bert, true_class_probability
from transformers import AutoModelForSequenceClassification

from metricopt_hf import MetricOptConfig, MetricOptTrainer

FOLDER = sys.argv[1]
AUTO = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")


def train(stage, name, resume=None, **kwargs):
    """By stage 1 or 2 of ZeRO, or, in stage 0, by DDP."""
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    config |= dict.fromkeys(AUTO, "auto")
    settings = {
        "max_steps": 4, "metric_steps": 3, "per_device_train_batch_size": 8 // RANKS, "learning_rate": 1e-2,
        "phi_dim": 4, "metric_call_budget": 60, "greater_is_better": True, "save_strategy": "no", "report_to": [],
        "disable_tqdm": True, "use_cpu": True, "deepspeed": config if stage else None, **kwargs,
    }  # fmt: skip
    trainer = MetricOptTrainer(
        tiny_bert(), MetricOptConfig(os.path.join(FOLDER, f"{name}-{stage}"), **settings),
        train_dataset=Texts(160, seed=1), observation_dataset=Texts(41, seed=3), selection_dataset=Texts(37, seed=4),
        metric=true_class_probability,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    result = trainer.result
    assert trainer.is_deepspeed_enabled == (stage > 0) and result.observed == "predictions"
    assert trainer.phase.linearizer.way == "row by row" and len(result.curve) == 3
    assert result.chosen.phi.any()  # moved
    same_on_all_ranks([dict(trainer.ledger.calls), result.chosen.phi.tolist(), result.why])
    return trainer


def weights(trainer):
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


def check_saved(trainer):
    """What is saved is the tuned model, and not the engine's copy of what it was before."""
    path = os.path.join(trainer.args.output_dir, "saved")
    trainer.save_model(path)
    dist.barrier()
    saved = AutoModelForSequenceClassification.from_pretrained(path).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in weights(trainer).items())
    assert torch.equal(trainer.setup.phi.read(), trainer.result.chosen.phi)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    ends = {}
    for stage in (0, 1, 2):  # DDP first: what accelerate has set up for DeepSpeed stays
        for guide, weight in (("auto", float("inf")), ("pairs", 1.0)):
            ends[stage, guide] = train(stage, guide, guide=guide, value_weight=weight).result.chosen.phi
            assert torch.allclose(ends[0, guide], ends[stage, guide], atol=1e-3), ends
    for stage in (1, 2):
        whole = train(stage, "whole", save_strategy="steps", save_steps=1)
        check_saved(whole)
        for step in (1, 3):  # before the metric phase, and in it
            checkpoint = os.path.join(whole.args.output_dir, f"checkpoint-{step}")
            resumed = train(stage, f"resumed{step}", checkpoint)
            assert digest(*weights(resumed).values()) == digest(*weights(whole).values())
    dist.barrier()
    print(f"all asserts held on {RANKS} ranks", flush=True)
    dist.destroy_process_group()
