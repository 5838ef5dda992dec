"""FiLM: the identity at first, on the norms of the last block and the output bias, and plain weights when merged."""

import copy
import re

import pytest
import torch
from helpers import tiny_bert
from phi_models import ZOO, build, llama, outputs, somewhere, timm_model
from torch import nn

from metricopt_hf.errors import PhiError
from metricopt_hf.phi import FiLM


@pytest.mark.parametrize("name", ZOO)
def test_film_is_the_identity_at_first_and_folds_into_plain_weights(name):
    model, inputs = build(name)
    keys, before = list(model.state_dict()), outputs(model, inputs)
    phi = FiLM(model)
    assert torch.equal(outputs(model, inputs), before)

    phi.write(somewhere(phi))
    tuned = outputs(model, inputs)
    assert (tuned - before).abs().max() > 1e-3
    merged = model.state_dict()
    phi.merge()
    assert torch.allclose(outputs(model, inputs), tuned, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys == list(merged)
    assert all(torch.equal(merged[key], tensor) for key, tensor in model.state_dict().items())

    fresh = ZOO[name][0]().eval()
    fresh.load_state_dict(merged, strict=True)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", ZOO)
def test_film_chooses_the_norms_of_the_last_block_and_the_output_bias(name):
    *_, hosts, bias = ZOO[name]
    phi = FiLM(build(name)[0])
    assert list(dict.fromkeys(n.rpartition(".")[0] for n in phi.inserted)) == hosts
    assert phi.names == phi.inserted + ((bias,) if bias else ())


def test_a_norm_without_bias_gets_a_scale_only():
    assert {n.rpartition(".")[2] for n in FiLM(llama()).names} == {"film_scale"}


def test_film_acts_alike_with_and_without_gradients():
    model, inputs = build("torch encoder")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    assert torch.allclose(model(inputs), outputs(model, inputs), atol=1e-5)


def test_layers_are_chosen_by_a_regular_expression():
    phi = FiLM(tiny_bert(), layers=r"layer\.0\.output", output_bias=False)
    assert phi.names == tuple(f"bert.encoder.layer.0.output.LayerNorm.film_{part}" for part in ("scale", "shift"))


def test_building_film_leaves_modes_weights_and_random_state_alone():
    model = timm_model("test_resnet").train()
    weights, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    FiLM(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_a_copy_of_a_modulated_model_is_independent():
    model, inputs = build("bert")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    twin, before = copy.deepcopy(phi), outputs(model, inputs)
    assert torch.equal(outputs(twin.model, inputs), before)

    phi.write(somewhere(phi))
    assert torch.equal(outputs(twin.model, inputs), before)
    twin.merge()
    assert torch.allclose(outputs(twin.model, inputs), before, atol=1e-6)
    assert phi.inserted and not torch.allclose(outputs(model, inputs), before, atol=1e-3)


def test_the_saved_weights_fold_with_the_phi_that_was_saved_with_them():
    model, inputs = build("bert")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    saved, then = copy.deepcopy(model.state_dict()), outputs(model, inputs)
    phi.write(somewhere(phi))
    fresh = tiny_bert().eval()
    fresh.load_state_dict(saved)
    assert torch.allclose(outputs(fresh, inputs), then, atol=1e-5)


def test_folding_twice_changes_nothing_more():
    model, inputs = build("bert")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    phi.merge()
    once = outputs(model, inputs)
    phi.merge()
    assert torch.equal(outputs(model, inputs), once)
    assert list(model.state_dict()) == list(model.state_dict())
    assert FiLM(model).inserted  # and another can be built


def test_in_bfloat16_a_step_smaller_than_its_resolution_still_acts():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 3)).bfloat16()
    phi, x = FiLM(model), torch.randn(8, 64, dtype=torch.bfloat16)
    before = model[0](x).float().abs().sum()
    phi.write(torch.full((phi.dim,), 2e-3))
    assert model[0](x).float().abs().sum() > before
    assert phi.read().dtype == torch.float32 and phi.read()[0] == 2e-3
    assert model(x).dtype == torch.bfloat16


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


def test_two_films_on_one_layer_are_refused():
    model = tiny_bert()
    FiLM(model)
    with pytest.raises(PhiError, match="merge the first FiLM"):
        FiLM(model)
