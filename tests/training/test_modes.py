"""In the metric phase what would move or be random is switched off, and everything else trains as it did."""

import pytest
import torch
from helpers import tiny_bert
from torch import nn
from transformers import BartConfig, BartForSequenceClassification, LlamaConfig, LlamaForCausalLM

from metricopt_hf.training.modes import pinned

IDS = torch.randint(3, 50, (4, 16), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 60, "pad_token_id": 1, "eos_token_id": 2}


def bert():
    return tiny_bert(), {"input_ids": IDS.clamp(max=7), "labels": torch.tensor([0, 1, 2, 0])}


def bart():
    """Drops by its layers' own mode, and whole layers."""
    config = BartConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_layerdrop=0.5,
        decoder_layerdrop=0.5,
        dropout=0.5,
        num_labels=2,
        **SIZES,
    )
    ended = torch.cat([IDS, torch.full((4, 1), 2)], 1)
    return BartForSequenceClassification(config), {"input_ids": ended, "labels": torch.tensor([0, 1, 1, 0])}


def llama():
    """Would fill its cache once more where a layer is computed again."""
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        attention_dropout=0.5,
        **SIZES,
    )
    return LlamaForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def step(model, inputs):
    """Loss, gradients, and bytes that were kept for the backward pass."""
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs)["loss"]
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("make", [bert, bart, llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_that_of_eval_mode_and_checkpointing_goes_on(make, checkpointing):
    torch.manual_seed(0)
    model, inputs = make()
    expected, gradients, plain_bytes = step(model.eval(), inputs)
    if checkpointing:
        model.activation_checkpointing_enable()
    with pinned(model):
        model.train()
        loss, pinned_gradients, kept = step(model, inputs)
        assert step(model, inputs)[0] == loss
    assert loss == expected
    assert all(torch.allclose(pinned_gradients[name], g, atol=1e-6) for name, g in gradients.items())
    assert (kept < plain_bytes / 3) is checkpointing


@pytest.mark.parametrize("everything", [True, False])
def test_everything_is_put_back(everything):
    model = nn.ModuleDict({"bert": bart()[0].train(), "rnn": nn.GRU(4, 4, 2, dropout=0.25), "norm": nn.BatchNorm1d(4)})
    model["bert"].activation_checkpointing_enable()
    model["norm"].eval()
    use_cache = model["bert"].config.use_cache

    def state():
        return [(m.training, set(vars(m)), getattr(m, "dropout", None)) for m in model.modules()]

    before = state()
    with pytest.raises(KeyboardInterrupt), pinned(model, everything):
        model.train()
        assert model["rnn"].training and model["rnn"].dropout == 0
        raise KeyboardInterrupt
    assert state() == before and model["bert"].config.use_cache is use_cache
    model.train()
    assert all(module.training for module in model.modules())


class TorchvisionLike(nn.Module):
    """Gives a loss in train mode only."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))

    def forward(self, x):
        return {"loss": self.net(x).square().mean()} if self.training else {"detections": self.net(x)}


def test_dropout_and_batch_statistics_alone_for_a_loss_of_train_mode():
    model = TorchvisionLike()
    x = torch.randn(4, 3, 8, 8)
    model(x)
    statistics = model.net[1].running_mean.clone()
    with pinned(model, everything=False):
        model.train()
        first, second = model(x)["loss"], model(x)["loss"]
        assert model.net[3].training and not model.net[1].training and not model.net[2].training
    assert torch.equal(first, second)
    assert torch.equal(model.net[1].running_mean, statistics)
    with pinned(model):
        model.train()
        assert "loss" not in model(x)


def test_a_copy_made_inside_keeps_to_itself():
    import copy

    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    with pinned(model):
        twin = copy.deepcopy(model)
        twin.train()
    assert not twin.training
    model.train()
    assert model.training and not twin.training
