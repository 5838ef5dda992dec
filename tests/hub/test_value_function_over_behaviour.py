"""A value function over behaviour is shared: another model's run starts from it; the wrong kind is refused."""

import pytest
import torch
from runs import bert_trainer

from metricopt_hf import BridgeGuide, Subset, ValueFunction, ValueFunctionError


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Folder of one that a run left."""
    folder = tmp_path_factory.mktemp("learned")
    trainer = named(folder)
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def named(folder, guide="behaviour", **changes):
    """A trainer whose config names the guide."""
    trainer = bert_trainer(folder, **changes)
    trainer.args.guide = guide
    return trainer


def test_a_run_leaves_one_that_says_what_it_is_over(learned):
    value_function = ValueFunction.from_pretrained(learned)
    assert value_function.signature.over == "behaviour" and value_function.signature.behaviour.num_outputs == 3
    assert len(value_function.observations) >= 24


def test_another_model_s_run_starts_from_it(tmp_path, learned):
    """Of another phi, and of as many coordinates as it likes."""
    second = named(
        tmp_path,
        phi=lambda model: Subset(model, "classifier"),
        phi_dim=3,
        value_function_name_or_path=str(learned),
    )
    second.train()
    assert second.result.coordinates.dim == 3 and second.result.coordinates.kind == "gradient_pca"
    assert second.result.curve[0]["rank_correlation"] is not None  # it was asked before it had learned anything here
    assert second.value_function.signature == ValueFunction.from_pretrained(learned).signature


@pytest.mark.parametrize("guide", ["value_function", "shuffled", "random", "bridge"])
def test_every_other_guide_refuses_it_before_training(tmp_path, learned, guide):
    with pytest.raises(ValueFunctionError, match="over behaviour, and the guide takes one over phi"):
        named(tmp_path, guide=guide, value_function_name_or_path=str(learned)).settle()
    with pytest.raises(ValueFunctionError, match="over behaviour, and the guide takes one over phi"):
        bert_trainer(tmp_path, guide=BridgeGuide(), value_function_name_or_path=str(learned)).settle()


def test_it_refuses_one_over_phi_and_one_that_says_nothing(tmp_path, learned):
    over_phi = bert_trainer(tmp_path / "phi")
    over_phi.train()
    over_phi.save_model(str(tmp_path / "phi"))
    with pytest.raises(ValueFunctionError, match="over phi, and the guide takes one over behaviour"):
        named(tmp_path, value_function_name_or_path=str(tmp_path / "phi")).settle()
    ValueFunction(9).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueFunctionError, match="does not say which behaviour it reads"):
        named(tmp_path, value_function_name_or_path=str(tmp_path / "plain")).settle()


def test_a_phase_that_began_from_it_is_resumed(tmp_path, learned):
    whole = named(tmp_path / "whole", value_function_name_or_path=str(learned))
    whole.train()
    first = named(tmp_path / "cut", value_function_name_or_path=str(learned), save_strategy="steps", save_steps=6)
    first.train()
    again = named(tmp_path / "cut", value_function_name_or_path=str(learned), save_strategy="steps", save_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-6"))
    assert torch.equal(again.result.last_phi, whole.result.last_phi)
