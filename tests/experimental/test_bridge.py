"""Bridge: hard forward, the approximator's gradient backward, and its own training in any model under any Trainer."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from metricopt_hf import ConfigurationError
from metricopt_hf.experimental import Bridge

B, D, H, C = 12, 3, 6, 4


def approximator(inputs=H, outputs=H, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def batch(seed=1, size=B, **kwargs):
    return torch.randn(size, H, generator=torch.Generator().manual_seed(seed)).requires_grad_(kwargs.get("grad", True))


def gradients(bridge, x, weights, scale=1.0):
    """Of x, and of the approximator's parameters, where the loss is linear in the output."""
    bridge.zero_grad()
    x = x.detach().requires_grad_()
    (bridge(x) * weights).sum().mul(scale).backward()
    return [x.grad, *(p.grad for p in bridge.approximator.parameters())]


WEIGHTS = torch.randn(B, H, generator=torch.Generator().manual_seed(2)) / B


def assert_close(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_is_the_hard_function(gradient, mode):
    bridge, x = Bridge(torch.sign, approximator()), batch()
    getattr(bridge, mode)()
    with torch.set_grad_enabled(gradient):
        y = bridge(x)
    assert torch.equal(y, torch.sign(x)) and y.requires_grad is gradient
    assert torch.equal(bridge(x.detach()), torch.sign(x)) and not bridge(x.detach()).requires_grad


def test_backward_is_the_approximators_for_the_input_and_the_distances_for_the_approximator():
    bridge, x = Bridge(torch.sign, approximator(), gamma=7.0), batch()
    to_x, *to_parameters = gradients(bridge, x, WEIGHTS)
    soft = bridge.approximator(x)
    (expected,) = torch.autograd.grad(soft, x, WEIGHTS, retain_graph=True)
    distances = (soft - torch.sign(x)).square().sum(1)
    objective = 7.0 * (WEIGHTS.norm(dim=1) * distances).sum()
    by_hand = torch.autograd.grad(objective, [*bridge.approximator.parameters()])
    assert_close([to_x, *to_parameters], [expected, *by_hand])


def test_both_follow_the_scale_of_the_loss_as_of_a_gradient_scaler():
    bridge, x = Bridge(torch.sign, approximator()), batch()
    scaled = gradients(bridge, x, WEIGHTS, scale=65536.0)
    assert_close([g / 65536 for g in scaled], gradients(bridge, x, WEIGHTS))


def test_accumulated_gradients_are_those_of_a_larger_batch():
    bridge, x = Bridge(torch.sign, approximator()), batch()
    whole = gradients(bridge, x, WEIGHTS)[1:]
    parts = [gradients(bridge, x[i : i + 4], WEIGHTS[i : i + 4])[1:] for i in range(0, B, 4)]
    parts = [[p.clone() for p in part] for part in parts]
    assert_close([sum(grads) for grads in zip(*parts, strict=True)], whole)


def test_an_approximator_that_is_frozen_passes_the_gradient_and_stays():
    bridge, x = Bridge(torch.sign, approximator()), batch()
    free = gradients(bridge, x, WEIGHTS)[0]
    bridge.approximator.requires_grad_(False)
    frozen = gradients(bridge, x, WEIGHTS)
    assert torch.equal(frozen[0], free) and all(grad is None for grad in frozen[1:])


def test_several_inputs_of_which_one_needs_no_gradient():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = approximator(2 * H, H)

        def forward(self, x, mask):
            return self.net(torch.cat([x, mask], 1))

    bridge, x, mask = Bridge(lambda x, mask: torch.sign(x) * mask, Both()), batch(), (batch(3) > 0).float()
    y = bridge(x, mask)
    assert torch.equal(y, torch.sign(x) * mask)
    y.sum().backward()
    assert x.grad.norm() > 0


def test_whole_numbers_become_numbers_that_gradients_pass():
    bridge, x = Bridge(lambda x: (x > 0).long(), approximator()), batch()
    y = bridge(x)
    assert y.is_floating_point() and torch.equal(y.long(), (x > 0).long())
    y.sum().backward()
    assert x.grad.norm() > 0


def test_it_can_be_gone_back_through_twice_and_be_computed_anew():
    bridge, x = Bridge(torch.sign, approximator()), batch()
    once = gradients(bridge, x, WEIGHTS)
    loss = (bridge(x) * WEIGHTS).sum()
    for _ in range(2):
        bridge.zero_grad()
        loss.backward(retain_graph=True)
    assert_close([p.grad for p in bridge.approximator.parameters()], once[1:])
    bridge.zero_grad()
    (checkpoint(bridge, x, use_reentrant=False) * WEIGHTS).sum().backward()
    assert_close([p.grad for p in bridge.approximator.parameters()], once[1:])


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigurationError, match=r"\[12, 5\].*\[12, 6\]"):
        Bridge(torch.sign, approximator(H, 5))(batch())
    with pytest.raises(ConfigurationError, match="gamma=0"):
        Bridge(torch.sign, approximator(), gamma=0)


# ---- in a model


class Nearest(nn.Module):
    """The nearest of some centres."""

    def __init__(self, seed=0):
        super().__init__()
        self.register_buffer("centres", torch.randn(8, H, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x):
        return self.centres[torch.cdist(x.float(), self.centres).argmin(1)].to(x.dtype)


class Classifier(nn.Module):
    """A hard step in the middle, which only its gradient can move: the head is fixed."""

    def __init__(self, bridge):
        super().__init__()
        torch.manual_seed(5)
        self.encoder, self.bridge = nn.Linear(D, H), bridge
        self.head = nn.Linear(H, C).requires_grad_(False)

    def forward(self, x, labels=None):
        logits = self.head(self.bridge(self.encoder(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class NoGradient(Bridge):
    """Broken on purpose: what comes back through the approximator is nothing."""

    def forward(self, *inputs):
        return super().forward(*(x.detach().requires_grad_(x.requires_grad) for x in inputs))


def examples(size=256):
    torch.manual_seed(0)
    x = torch.randn(size, D)
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]


def trained(folder, bridge, steps=120, **kwargs):
    """The mean loss of the first and of the last steps under plain Trainer."""
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        logging_steps=steps // 5,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **kwargs,
    )
    trainer = Trainer(Classifier(bridge), args, train_dataset=examples())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1], trainer


def test_it_trains_what_lies_in_front_of_it_under_a_plain_trainer(tmp_path):
    first, last, trainer = trained(tmp_path, Bridge(Nearest(), approximator()))
    assert last < 0.87 * first
    bridge = trainer.model.bridge
    with torch.no_grad():
        x = trainer.model.encoder(torch.stack([row["x"] for row in examples()]))
        far, near = ((net(x) - bridge.function(x)).square().mean() for net in (approximator(), bridge.approximator))
    assert near < 0.5 * far


def test_without_the_approximators_gradient_nothing_is_learned(tmp_path):
    first, last, _ = trained(tmp_path, NoGradient(Nearest(), approximator()))
    assert last > 0.95 * first


def test_mixed_precision(tmp_path):
    first, last, trainer = trained(tmp_path, Bridge(Nearest(), approximator()), bf16=True)
    assert last < 0.87 * first and trainer.args.bf16


def test_it_is_saved_with_the_model(tmp_path):
    model, other = (Classifier(Bridge(Nearest(seed), approximator(seed=seed))) for seed in (0, 1))
    x = torch.randn(5, D)
    labels = torch.zeros(5, dtype=torch.long)
    save_model(model, str(tmp_path / "model.safetensors"))
    load_model(other, str(tmp_path / "model.safetensors"))
    results = []
    for one in (model, other):
        output = one(x, labels)
        output["loss"].backward()
        results.append([output["logits"], *(p.grad for p in one.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_distributed_data_parallel_reduces_its_gradients(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model = Classifier(Bridge(Nearest(), approximator()))
        reduced, wrapped = [], DistributedDataParallel(model)

        def hook(state, bucket):
            reduced.extend(bucket.parameters())
            return allreduce_hook(state, bucket)

        wrapped.register_comm_hook(None, hook)
        for _ in range(2):  # the second one finds out whether the first was finished
            wrapped(torch.randn(5, D), torch.zeros(5, dtype=torch.long))["loss"].backward()
        names = {id(p): name for name, p in model.named_parameters()}
        assert {names[id(p)] for p in reduced} == {name for name, p in model.named_parameters() if p.requires_grad}
    finally:
        torch.distributed.destroy_process_group()
