"""Subsets, adapters, sums, and spaces that a string names."""

import pytest
import torch
from helpers import tiny_bert
from phi_models import lora
from torch import nn

from metricopt_hf.errors import PhiError
from metricopt_hf.phi import FiLM, Subset, adapter, from_spec


def test_a_subset_that_matches_nothing_names_parameters_that_exist():
    with pytest.raises(PhiError, match="classifier.bias"):
        Subset(tiny_bert(), "nowhere")
    with pytest.raises(PhiError, match="no regular expression"):
        Subset(tiny_bert(), "(")


def test_whole_numbers_are_no_part_of_a_subset():
    model = nn.Linear(2, 3)
    model.register_parameter("steps", nn.Parameter(torch.zeros(4, dtype=torch.int64), requires_grad=False))
    assert Subset(model, ".").names == ("weight", "bias")


def test_an_adapter_is_what_peft_trains():
    model = lora()
    names = set(adapter(model).names)
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in names) and not any("embeddings" in name for name in names)


def test_without_an_adapter_the_way_to_one_is_shown():
    with pytest.raises(PhiError, match="get_peft_model"):
        adapter(tiny_bert())
    frozen = lora().requires_grad_(False)
    with pytest.raises(PhiError, match="is_trainable"):
        adapter(frozen)


def test_a_parameter_is_in_a_sum_once_and_of_one_model():
    model = tiny_bert()
    phi = FiLM(model)
    with pytest.raises(PhiError, match="classifier.bias"):
        phi + Subset(model, "classifier")
    with pytest.raises(PhiError, match="same model"):
        phi + Subset(tiny_bert(), "pooler")


@pytest.mark.parametrize(("spec", "kind"), [("film", FiLM), ("adapter", Subset), (r"classifier\.", Subset)])
def test_a_string_names_a_space(spec, kind):
    phi = from_spec(lora() if spec == "adapter" else tiny_bert(), spec)
    assert type(phi) is kind
    assert spec != r"classifier\." or phi.names == ("classifier.weight", "classifier.bias")
