"""Callbacks that keep an average of the weights, in the forms in which users publish them."""

import copy

import pytest
import torch
from forms import FIRST_PHASE, by_trainer, guided
from helpers import assert_equal_weights, tiny_bert, weights
from transformers import TrainerCallback


class ByName(TrainerCallback):
    """Finds the parameters by their names."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.shadow[name].lerp_(p.detach(), 0.5)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        parameters = dict(model.named_parameters())
        for name, average in self.shadow.items():
            parameters[name].data.copy_(average)


class ByOrder(TrainerCallback):
    """Finds them by their order, as `EMAModel(model.parameters())` of diffusers does."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.shadow = [p.detach().clone() for p in model.parameters()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for average, p in zip(self.shadow, model.parameters(), strict=True):
            average.lerp_(p.detach(), 0.5)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for average, p in zip(self.shadow, model.parameters(), strict=True):
            p.data.copy_(average)


class ByState(TrainerCallback):
    """Writes to the state dict of a copy, as `ModelEmaV2` of timm does."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.copy = tiny_bert()
        self.copy.load_state_dict(model.state_dict())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for average, value in zip(self.copy.state_dict().values(), model.state_dict().values(), strict=True):
                average.lerp_(value, 0.5)
        if state.global_step == FIRST_PHASE:
            self.weights = weights(self.copy)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.copy.state_dict())


@pytest.mark.parametrize("average", [ByName, ByOrder, ByState])
def test_an_average_of_the_weights_is_put_in_place_and_said_not_to_be_what_was_selected(tmp_path, average, caplog):
    trainer = guided(tmp_path, trainer_kwargs={"callbacks": [average()]})
    trainer.train()
    assert trainer.ledger.calls["observe"] > 0
    assert "the weights were changed behind the selection" in caplog.text


def test_a_copy_that_follows_the_state_dict_follows_every_weight_and_is_not_spoken_of(tmp_path, caplog):
    class Follows(ByState):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.copy = copy.deepcopy(model)

        def on_train_end(self, args, state, control, model=None, **kwargs):
            pass

    kept = []
    for make in (guided, by_trainer):
        average = Follows()
        make(tmp_path / make.__name__, trainer_kwargs={"callbacks": [average]}).train()
        kept.append(average.weights)
    assert_equal_weights(*kept)
    assert "changed behind the selection" not in caplog.text
