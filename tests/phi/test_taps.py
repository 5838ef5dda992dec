"""Taps: a row's derivatives by phi are those that autograd and finite differences give."""

import peft
import pytest
import torch
from helpers import tiny_bert
from phi_models import hf_resnet, llama, lora, timm_model, tokens
from torch import nn

from metricopt_hf.linear.row_derivatives import differentiable
from metricopt_hf.phi import FiLM, Subset, adapter
from metricopt_hf.phi.taps import NotRowByRow, check_taps, jacobian_rows, tapped

STEP = 2.0**-12  # exact in float32


def padded():
    ids, mask = torch.randint(2, 8, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[0, 4:], mask[2, 7:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def images():
    return {"x": torch.randn(3, 3, 32, 32)}


def rows():
    return {"x": torch.randn(5, 6)}


def run(model, inputs):
    output = model(*inputs.values()) if "x" in inputs else model(**inputs)
    return getattr(output, "logits", output)


class MLP(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, x):
        return super().forward(x)


def group_norms():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def batch_norm_of_rows():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    model[1].running_mean.normal_()
    return model


def rms_norms():
    return nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.GELU(), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3))


def of_sequences(norm):
    """Norms of [rows, channels, length]."""
    return lambda: nn.Sequential(
        nn.Conv1d(6, 8, 3), norm(8), nn.ReLU(inplace=True), nn.Conv1d(8, 8, 3), norm(8),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def rms_norms_of_tokens():
    return nn.Sequential(
        nn.Linear(6, 8), nn.RMSNorm(8), nn.GELU(), nn.Linear(8, 8), nn.RMSNorm(8), nn.Flatten(), nn.Linear(7 * 8, 3)
    )


def small_vit(**kwargs):
    return timm_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48, **kwargs)


def checkpointed_vit():
    model = small_vit()
    model.set_grad_checkpointing()  # timm's holds in eval mode too
    return model


def checkpointed_bert():
    model = tiny_bert()
    model.gradient_checkpointing_enable()
    return model


class TwoHeads(nn.Module):
    """One bias for two heads."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.second.bias = self.first.bias

    def forward(self, x):
        return self.first(self.norm(x)) + torch.tanh(self.second(x))


class Tied(nn.Module):
    """The output layer's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.norm = nn.Embedding(8, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 8)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        return self.head(self.norm(self.mid(torch.tanh(self.embed(input_ids)))))[:, -1]


def with_a_bias(model):
    return FiLM(model, output_bias=False) + Subset(model, r"classifier\.bias")


def many_heads_lora():
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value", "dense"], init_lora_weights=False
    )
    return peft.get_peft_model(tiny_bert(), config)


MODELS = {
    "mlp": (MLP, rows, FiLM),
    "batch norm, rows": (batch_norm_of_rows, rows, FiLM),
    "batch norm, sequences": (of_sequences(nn.BatchNorm1d), lambda: {"x": torch.randn(4, 6, 7)}, FiLM),
    "group norm, sequences": (of_sequences(lambda n: nn.GroupNorm(2, n)), lambda: {"x": torch.randn(4, 6, 7)}, FiLM),
    "rms norm": (rms_norms, rows, FiLM),
    "rms norm, tokens": (rms_norms_of_tokens, lambda: {"x": torch.randn(4, 7, 6)}, FiLM),
    "group norm": (group_norms, images, FiLM),
    "hf resnet": (hf_resnet, images, FiLM),
    "all norms of a resnet": (hf_resnet, images, lambda model: FiLM(model, layers=".")),
    "timm vit": (small_vit, images, FiLM),
    "checkpointed vit": (checkpointed_vit, images, FiLM),
    "timm efficientnet": (lambda: timm_model("test_efficientnet"), images, FiLM),
    "timm convnext": (lambda: timm_model("test_convnext"), images, FiLM),
    "bert": (tiny_bert, padded, FiLM),
    "bert, sdpa": (lambda: tiny_bert(attn_implementation="sdpa"), padded, FiLM),
    "bert, eager": (lambda: tiny_bert(attn_implementation="eager"), padded, FiLM),
    "checkpointed bert": (checkpointed_bert, padded, FiLM),
    "llama": (llama, lambda: {"input_ids": tokens()}, FiLM),
    "film and subset": (tiny_bert, padded, with_a_bias),
    "tied output layer": (Tied, lambda: {"input_ids": torch.randint(8, (4, 5))}, FiLM),
    "linear layers": (tiny_bert, padded, lambda model: Subset(model, r"layer\.1\.attention.*(query|value)|classifier")),
    "weights only": (MLP, rows, lambda model: Subset(model, r"^[03]\.weight")),
    "lora": (lora, padded, adapter),
    "lora on many": (many_heads_lora, padded, adapter),
}


def made(name, dtype=torch.float64, size=0.1):
    make, make_inputs, space = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, 0, 0.2)
    inputs = {n: x.to(dtype) if x.is_floating_point() else x for n, x in make_inputs().items()}
    phi = space(model.to(dtype))
    phi.write(phi.read() + size * torch.randn(phi.dim))
    return phi, inputs


def jacobian(phi, inputs):
    """[rows, outputs, d]."""
    taps = phi.taps()
    with torch.no_grad(), differentiable(phi.model) as returned, tapped(taps):
        output = run(phi.model, inputs)
        assert len(returned) == 1 and not torch.is_grad_enabled()
        check_taps(taps, len(output))
        with torch.enable_grad():
            output = output.float() if output.dtype == torch.bfloat16 else output
            return torch.stack([jacobian_rows(output[:, i], taps) for i in range(output.shape[1])], 1)


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def by_autograd(phi, inputs, row, column):
    return phi.gradient(lambda: run(phi.model, inputs)[row, column])


@torch.no_grad()
def difference(phi, inputs, step):
    """Central differences of all outputs along a step, [rows, outputs]."""
    with phi.restored():
        here, ends = phi.read(), []
        for sign in (1, -1):
            phi.write(here + sign * step)
            ends.append(run(phi.model, inputs))
    return (ends[0] - ends[1]) / 2


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_of_every_row_are_those_of_autograd_and_of_differences(name):
    phi, inputs = made(name)
    kept = hooks(phi.model)
    with torch.no_grad():
        before = run(phi.model, inputs)
    found = jacobian(phi, inputs)
    assert found.shape == (*before.shape, phi.dim) and found.dtype == torch.float32
    for row, column in ((0, 0), (1, before.shape[1] - 1)):
        expected = by_autograd(phi, inputs, row, column)
        assert torch.allclose(found[row, column], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    step = STEP * torch.randn(phi.dim).sign()
    true, linear = difference(phi, inputs, step), (found @ step).double()
    assert (linear - true).norm() <= 2e-2 * true.norm()
    with torch.no_grad():
        assert torch.equal(run(phi.model, inputs), before)  # nothing is left behind
    assert hooks(phi.model) == kept


@pytest.mark.parametrize("name", ["mlp", "hf resnet", "timm vit", "bert", "llama", "lora", "checkpointed vit"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_in_lower_precision_they_are_about_the_same(name, precision):
    exact = jacobian(*made(name))
    phi, inputs = made(name, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        found = jacobian(phi, inputs)
    off = float((found - exact).norm() / exact.norm())
    assert found.dtype == torch.float32 and off < (1e-4 if precision == "float32" else 0.1)


def test_outputs_are_bit_for_bit_those_without_taps():
    for precision in (torch.float32, torch.bfloat16):
        phi, inputs = made("bert", precision)
        with torch.no_grad():
            plain = run(phi.model, inputs)
            with differentiable(phi.model), tapped(phi.taps()):
                assert torch.equal(run(phi.model, inputs).detach(), plain)


class Twice(MLP):
    def forward(self, x):
        return self[5](self[4](self[4](self[0](x))))


class Flattened(MLP):
    """Layers see four rows for each of the batch."""

    def forward(self, x):
        return super().forward(x.repeat_interleave(4, 0)).reshape(len(x), 4, 3).mean(1)


@pytest.mark.parametrize(("make", "why"), [(Twice, "more than once"), (Flattened, "another number of rows")])
def test_a_layer_without_a_row_for_each_row_is_refused(make, why):
    phi = FiLM(make().eval())
    with pytest.raises(NotRowByRow, match=why):
        jacobian(phi, rows())
    assert hooks(phi.model) == 0


class Idle(MLP):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(6, 3)

    def forward(self, x):
        return nn.Sequential(*list(self)[:6])(x)


def test_a_layer_that_is_not_called_is_refused():
    with pytest.raises(NotRowByRow, match="not called"):
        jacobian(Subset(Idle().eval(), "0|idle"), rows())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), "0"),
        (nn.LSTM(3, 4), "weight"),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)), "0"),
        (nn.Sequential(Doubled(3, 4)), "weight"),  # its derivatives are not those of a linear layer
        (TwoHeads(), r"first\.bias"),  # it acts in two places
    ],
    ids=["convolution", "rnn", "embedding", "a forward of its own", "shared"],
)
def test_other_layers_have_no_taps(model, pattern):
    assert Subset(model, pattern).taps() is None


def test_a_shared_output_bias_has_no_taps():
    assert FiLM(TwoHeads()).taps() is None
    assert FiLM(TwoHeads(), output_bias=False).taps() is not None
