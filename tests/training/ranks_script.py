"""Run by torchrun from test_ranks.py: default arguments, a checkpoint at every step. Not a test module of its own.

Arguments: folder, and the step after which rank 1 is killed (0: never).
"""

import json
import os
import signal
import sys

import torch
import torch.distributed as dist
from helpers import Texts, tiny_bert, true_class_probability
from transformers import TrainerCallback

from metricopt_hf import MetricOptConfig, MetricOptTrainer

folder, last_step = sys.argv[1], int(sys.argv[2])


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == last_step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


torch.set_num_threads(1)
args = MetricOptConfig(
    folder,
    max_steps=12,
    per_device_train_batch_size=4,
    metric_start_ratio=0,
    metric_for_best_model="probability",
    greater_is_better=True,
    metric_call_budget=32,
    save_steps=1,
    save_total_limit=2,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
trainer = MetricOptTrainer(
    tiny_bert(),
    args,
    train_dataset=Texts(160, seed=1),
    eval_dataset=Texts(80, seed=3),
    compute_metrics=lambda prediction: {"probability": true_class_probability(prediction)},
    callbacks=[Kill()],
)
assert args.world_size == 2 and args.average_tokens_across_devices
written, save = [], trainer._save_value_function
trainer._save_value_function = lambda output_dir: (written.append(output_dir), save(output_dir))
trainer.train()
trainer.save_model()
with open(os.path.join(folder, f"rank-{args.process_index}.json"), "w") as file:
    json.dump({"should_save": args.should_save, "written": len(written), "calls": trainer.ledger.calls}, file)
dist.barrier()
dist.destroy_process_group()
