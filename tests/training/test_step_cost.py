"""Between rounds a guided step asks no tensor for its numbers: on an accelerator each such question waits for it."""

import torch
from runs import bert_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from metricopt_hf import MetricOptTrainer


class Questions(TorchDispatchMode):
    """Counts `float(tensor)`, `if tensor`, `tensor.item()` and the like."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Asked(MetricOptTrainer):
    """Notes the questions of each update."""

    def _guide_update(self, step):
        with Questions() as questions:
            super()._guide_update(step)
        self.asked = {**getattr(self, "asked", {}), step: (questions.count, self.phase.guide.standing[0])}


def test_between_rounds_no_tensor_is_asked(tmp_path):
    trainer = bert_trainer(
        tmp_path, cls=Asked, max_steps=24, observe_steps=4, select_steps=8, metric_call_budget=48
    )
    trainer.train()
    rounds = {step for step in range(24) if step % 4 == 0}
    between = [asked for step, (asked, trust) in trainer.asked.items() if step not in rounds and trust > 0]
    assert len(between) > 5 and set(between) == {0}
    assert all(trainer.asked[step][0] > 0 for step in rounds)
