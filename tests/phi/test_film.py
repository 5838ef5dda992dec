"""FiLM: the norms of the last block and the output bias, written into plain weights."""

import copy
import re

import pytest
import torch
from helpers import tiny_bert
from phi_models import ZOO, build, llama, lora, outputs, somewhere, timm_model
from torch import nn

from metricopt_hf.errors import PhiError
from metricopt_hf.phi import FiLM


@pytest.mark.parametrize("name", ZOO)
def test_film_scales_and_shifts_the_norms_of_the_last_block_and_the_output_bias(name):
    model, inputs = build(name)
    *_, hosts, bias = ZOO[name]
    keys, before = list(model.state_dict()), outputs(model, inputs)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    phi = FiLM(model)
    norms = [n.rpartition(".")[0] for n in phi.names if n != bias]
    assert list(dict.fromkeys(norms)) == [host.removesuffix(".drop") for host in hosts]
    assert phi.output_bias == bias and (phi.output_bias_slice is None) == (bias is None)

    assert phi.read().shape == (phi.dim,) and not phi.read().any()
    phi.write(torch.zeros(phi.dim))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())  # bit for bit
    where = somewhere(phi)
    phi.write(where)
    tuned = outputs(model, inputs)
    assert (tuned - before).abs().max() > 1e-3 and torch.equal(phi.read(), where)
    assert list(model.state_dict()) == keys
    if bias:
        assert torch.allclose(model.get_parameter(bias) - weights[bias], where[phi.output_bias_slice], atol=1e-6)
    fresh = ZOO[name][0]().eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, inputs), tuned)
    phi.write(torch.zeros(phi.dim))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_what_is_written_is_a_scale_and_a_shift_of_the_norms_output():
    model, inputs = build("bert")
    phi = FiLM(model, layers=r"layer\.1\.output", output_bias=False)
    seen = []
    model.bert.encoder.layer[1].output.LayerNorm.register_forward_hook(lambda m, args, output: seen.append(output))
    outputs(model, inputs)
    phi.write(somewhere(phi))
    outputs(model, inputs)
    scale, shift = phi.read().chunk(2)
    assert torch.allclose(seen[1], (1 + scale) * seen[0] + shift, atol=1e-5)


def test_phi_counts_from_where_it_was_last_reset():
    phi = FiLM(build("bert")[0])
    phi.write(somewhere(phi))
    weights = [p.detach().clone() for p in phi.parameters]
    phi.reset()
    assert not phi.read().any()
    phi.write(somewhere(phi))
    phi.write(torch.zeros(phi.dim))
    assert all(torch.equal(p, w) for p, w in zip(phi.parameters, weights, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_at_zero_the_weights_are_those_at_reset_in_any_precision(dtype):
    phi = FiLM(build("bert")[0].to(dtype))
    weights = [p.detach().clone() for p in phi.parameters]
    phi.write(somewhere(phi))
    phi.write(torch.zeros(phi.dim))
    assert all(torch.equal(p, w) and p.dtype == dtype for p, w in zip(phi.parameters, weights, strict=True))


def test_a_norm_without_bias_gets_a_scale_only():
    assert {n.rpartition(".")[2] for n in FiLM(llama()).names} == {"weight"}


def test_layers_are_chosen_by_a_regular_expression():
    phi = FiLM(tiny_bert(), layers=r"layer\.0\.output", output_bias=False)
    assert phi.names == tuple(f"bert.encoder.layer.0.output.LayerNorm.{part}" for part in ("weight", "bias"))


def test_building_film_leaves_modes_weights_and_random_state_alone():
    model = timm_model("test_resnet").train()
    weights, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    FiLM(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_a_copy_is_independent():
    model, inputs = build("bert")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    twin, before = copy.deepcopy(phi), outputs(model, inputs)
    phi.write(somewhere(phi))
    assert torch.equal(outputs(twin.model, inputs), before) and not torch.equal(twin.read(), phi.read())
    twin.write(torch.zeros(twin.dim))
    assert not torch.allclose(outputs(twin.model, inputs), outputs(model, inputs), atol=1e-3)


def test_the_saved_state_counts_from_the_same_origin():
    model, inputs = build("bert")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    state, weights = phi.state_dict(), copy.deepcopy(model.state_dict())
    phi.write(torch.zeros(phi.dim))
    at_origin = outputs(model, inputs)
    other = tiny_bert().eval()
    other.load_state_dict(weights)
    twin = FiLM(other)
    twin.load_state_dict(state)
    assert all(torch.equal(weights[n], t) for n, t in other.state_dict().items())
    twin.write(torch.zeros(phi.dim))
    assert torch.equal(outputs(other, inputs), at_origin)


def test_in_bfloat16_phi_is_kept_in_float32():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 3)).bfloat16()
    phi = FiLM(model)
    for _ in range(8):  # each step is smaller than what the weights resolve
        phi.write(phi.read() + 2e-3)
    assert phi.read().dtype == torch.float32 and phi.read()[0] == pytest.approx(0.016)
    assert model[0].weight[0] > 1 and model[0].weight.dtype == torch.bfloat16


def test_a_peft_model_is_refused():
    with pytest.raises(PhiError, match="merge_and_unload"):
        FiLM(lora())


@pytest.mark.parametrize("output_bias", ["auto", True])
def test_the_output_bias_is_part_of_phi_where_there_is_one(output_bias):
    assert "classifier.bias" in FiLM(tiny_bert(), output_bias=output_bias).names


def test_without_an_output_bias_one_can_be_named():
    with pytest.raises(PhiError, match="output_bias=False.*Subset"):
        FiLM(llama(), output_bias=True)


def no_norms():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class OffsetNorm(nn.LayerNorm):
    """(1 + weight) * x + bias, as Gemma's: a scale behind it does not merge into the weight."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)


@pytest.mark.parametrize(
    ("make", "layers", "named"),
    [
        (no_norms, None, r"phi='2\\.bias$' takes 2.bias"),
        (no_norms, "norm", r"phi='2\\.bias$' takes 2.bias"),
        (lambda: nn.Sequential(OffsetNorm(4), nn.Linear(4, 2)), None, r"phi='1\\.bias$' takes 1.bias"),
        (lambda: nn.Sequential(OffsetNorm(4), nn.Linear(4, 2)), "0", "OffsetNorm"),
        (tiny_bert, "nowhere", "bert.encoder.layer.1.output.LayerNorm"),
        (tiny_bert, "(", "no regular expression"),
    ],
)
def test_what_film_cannot_reach_is_answered_with_what_could_be_used(make, layers, named):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(PhiError, match=re.escape(named)):
        FiLM(model, layers)
    assert list(model.state_dict()) == keys
