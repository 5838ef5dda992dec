"""PrefixCache: what is replayed equals what would be computed, and where it would not, it is computed."""

from collections import Counter

import numpy as np
import pytest
import timm
import torch
from helpers import tiny_bert
from prefixes import PlainCNN, Residual, Setting
from torch import nn
from transformers import BatchEncoding

from metricopt_hf.evaluation import prefix_cache
from metricopt_hf.evaluation.prefix_cache import nbytes
from metricopt_hf.phi import FiLM, Subset


def images():
    return [torch.randn(size, 3, 32, 32) for size in (4, 4, 2)]


def rows():
    return list(torch.randn(3, 5, 6))


def texts():
    """Padded batches of different lengths."""
    batches = []
    for length in (4, 9, 6):
        ids, mask = torch.randint(2, 8, (3, length)), torch.ones(3, length, dtype=torch.long)
        mask[0, length // 2 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def small_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48, num_classes=5)


SETTINGS = {
    "plain cnn": lambda: Setting(PlainCNN(), images(), lambda model: FiLM(model, layers="5")),
    "residual": lambda: Setting(Residual(), rows()),
    "timm resnet": lambda: Setting(timm.create_model("test_resnet"), images()),
    "timm efficientnet": lambda: Setting(timm.create_model("test_efficientnet"), images()),
    "timm vit": lambda: Setting(small_vit(), images()),
    "bert": lambda: Setting(tiny_bert(), texts(), predict=lambda model, batch: model(**batch).logits),
    "subset": lambda: Setting(Residual(), rows(), lambda model: Subset(model, "head")),
    "class decisions": lambda: Setting(PlainCNN(), images(), predict=lambda model, x: model(x).argmax(-1)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_replayed_equals_the_full_forward_pass(name):
    setting = SETTINGS[name]()
    setting.assert_equal_at_several_phi()
    assert setting.cache.active


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def counted(batches=None, **kwargs):
    model = Residual()
    model.stem = Counted(6, 6)
    return Setting(model, batches or rows(), **kwargs)


def computed_again(setting):
    """Calls of the frozen stem in a sweep over the batches, after the first one."""
    setting.cached()
    before = setting.model.stem.calls
    setting.cached()
    return setting.model.stem.calls - before


def test_the_frozen_part_is_computed_once():
    assert computed_again(counted()) == 0


def test_a_module_used_before_and_behind_phi_is_replayed_before_and_computed_behind():
    model = Residual()
    model.act = nn.Sequential(Counted(6, 6), nn.ReLU())
    setting = Setting(model, rows())
    setting.cached()
    before = model.act[0].calls
    setting.cached()
    assert model.act[0].calls - before == 3  # of three calls per batch, the one behind phi


def with_inputs(model, x):
    return model(x), x


@pytest.mark.parametrize(("room", "calls"), [(0, 6), (1, 4), (2, 2), (3, 0)])
def test_batches_that_find_no_room_are_computed(room, calls):
    kept = 5 * 6 * 4  # bytes of one batch's activations in front of the norm
    assert computed_again(counted(max_bytes=room * kept, predict=with_inputs)) == calls
    setting = counted(max_bytes=room * kept)
    computed_again(setting)
    setting.assert_equal_at_several_phi()


def test_inputs_that_the_prefix_alone_reads_make_room_for_its_outputs():
    setting = counted(max_bytes=1.1 * 5 * 6 * 4)
    assert computed_again(setting) == 0 and nbytes(setting.held) == 3 * 4
    setting.assert_equal_at_several_phi()


def test_inputs_that_predictions_hold_or_phi_reads_are_kept():
    for setting in (
        counted(predict=with_inputs),
        Setting(Residual(), rows(), lambda model: FiLM(model) + Subset(model, "stem")),
    ):
        setting.cached()
        assert all(map(torch.equal, setting.held, setting.batches))


def test_longer_batches_than_the_first_do_not_outgrow_the_memory():
    batches = [torch.randn(size, 6) for size in (1, 50, 50, 50)]
    # there is room for 60 rows; a batch that is kept in full beside them makes none
    assert computed_again(counted(batches, max_bytes=60 * 6 * 4, predict=with_inputs)) == 2 * 2


def test_bytes_are_counted_in_whatever_a_collator_returns():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert nbytes(BatchEncoding({"input_ids": ids, "texts": ["a", "b"]})) == 48
    assert nbytes([{"x": (ids, np.zeros(4, np.float32))}, None]) == 64


@torch.no_grad()
def test_a_run_that_does_not_show_what_is_predicted_takes_no_inputs_out():
    setting = counted(predict=with_inputs)
    for i in range(3):
        setting.cache.forward(i, lambda batch: str(setting.run(batch)), setting.held)
    assert setting.cache.active and all(map(torch.equal, setting.held, setting.batches))


# ---- models for which replaying would be wrong


class ReadsPhiElsewhere(Residual):
    """Uses the norm's scale before the norm runs."""

    def forward(self, x):
        return super().forward(self.act(x * self.norm.weight))


class Noisy(Residual):
    def __init__(self):
        super().__init__()
        self.act = nn.RReLU()

    def train(self, mode=True):  # its noise stays on in eval mode
        super().train(mode)
        self.act.train()
        return self


class Remembers(Residual):
    """The stem leaves something on itself that is used behind phi."""

    def __init__(self):
        super().__init__()
        self.stem = RemembersItsInput(6, 6)

    def forward(self, x):
        return super().forward(x) + self.stem.seen.mean()


class RemembersItsInput(nn.Linear):
    def forward(self, x):
        self.seen = x
        return super().forward(x)


@pytest.mark.parametrize("model", [ReadsPhiElsewhere, Noisy, Remembers])
def test_where_replaying_would_be_wrong_everything_is_computed(model):
    setting = Setting(model(), rows())
    setting.cached()
    assert not setting.cache.active
    if model is not Noisy:
        setting.assert_equal_at_several_phi()


class Notes(nn.Linear):
    """As attention does while generating, notes what it saw in what it was given."""

    def forward(self, x, seen):
        seen.append(super().forward(x))
        return torch.stack(seen).sum(0)


class Generates(Residual):
    def __init__(self):
        super().__init__()
        self.notes = Notes(6, 6)

    def forward(self, x, seen):
        return super().forward(self.notes(x, seen))


def generate(model, x):
    """A second pass where the first one's answer, at this phi, asks for it."""
    seen = []
    answer = model(x, seen)
    return answer if answer.sum() < 0 else model(torch.cat([answer, answer], dim=1), seen)


def test_passes_that_are_made_at_some_phi_only_are_right_too():
    setting = Setting(Generates(), rows(), lambda model: Subset(model, "head.bias"), generate)
    with torch.no_grad():
        setting.phi.write(torch.full((3,), -9.0))
        setting.cached()
        assert setting.cache.active
        setting.phi.write(torch.full((3,), 9.0))
        for got, expected in zip(setting.cached(), setting.full(), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)


class WithAnExtra(Residual):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(6, 6)


class Padded(WithAnExtra):
    """Fills in another module's output, but only in rows that start with a negative number."""

    def forward(self, x):
        start, extra = x[:, :1], self.extra(x)
        x = self.act(self.stem(x))
        return self.head(self.norm(torch.where(start < 0, extra, x)))


class TwoWays(WithAnExtra):
    """Uses phi early, but only for some batches."""

    def forward(self, x):
        return super().forward(x if x.sum() > 0 else self.extra(x * self.norm.weight))


@pytest.mark.parametrize("model", [Padded, TwoWays])
def test_a_batch_that_goes_another_way_than_the_first_is_computed(model):
    first = torch.rand(5, 6)
    setting = Setting(model(), [first, -first, first / 2], lambda model: FiLM(model, output_bias=False))
    setting.assert_equal_at_several_phi()
    assert setting.cache.active


class SharedBias(nn.Module):
    """The bias goes by the name of the layer that does not run."""

    def __init__(self):
        super().__init__()
        self.stem, self.idle, self.head = Counted(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.head.bias = self.idle.bias

    def forward(self, x):
        return self.head(torch.relu(self.stem(x)))


def test_a_parameter_that_two_layers_share_is_phi_in_both():
    setting = Setting(SharedBias(), rows(), lambda model: Subset(model, "idle.bias"))
    setting.assert_equal_at_several_phi()
    assert computed_again(setting) == 0


def test_decisions_that_are_all_alike_do_not_hide_what_is_needed():
    setting = Setting(Residual(), rows(), predict=lambda model, x: model(x).argmax(-1))
    bias = setting.model.head.bias
    with torch.no_grad():
        bias.copy_(torch.tensor([50.0, 0, 0]))
        assert (torch.cat(setting.cached()) == 0).all()
        bias.copy_(-setting.model(torch.cat(setting.batches)).mean(0) + bias)  # now they differ
    got, expected = torch.cat(setting.cached()), torch.cat(setting.full())
    assert torch.equal(got, expected) and len(expected.unique()) == 3


# ---- the model is left as it was


def test_no_module_keeps_a_changed_forward_or_a_hook():
    setting = SETTINGS["timm vit"]()
    own = setting.model.blocks[0]
    own.forward = own.forward  # as accelerate's hooks do
    hooks = Counter(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in setting.model.modules())
    kept = own.__dict__["forward"]
    setting.cached()
    setting.cached()
    assert own.__dict__["forward"] is kept
    assert [m for m in setting.model.modules() if "forward" in m.__dict__] == [own]
    assert hooks == Counter(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in setting.model.modules())


def test_an_error_in_the_forward_pass_leaves_nothing_behind():
    setting = SETTINGS["residual"]()
    setting.cached()
    with pytest.raises(RuntimeError):
        setting.model.head.register_forward_pre_hook(lambda module, args: args[0].reshape(7, 7))
        setting.cached()
    assert not any("forward" in m.__dict__ for m in setting.model.modules())


def test_what_finds_no_room_on_the_device_is_kept_elsewhere_and_brought_back(monkeypatch):
    asked = []
    monkeypatch.setattr(prefix_cache, "_free_bytes", lambda device: asked.append(device) or 0)
    setting = SETTINGS["residual"]()
    setting.assert_equal_at_several_phi()
    assert setting.cache.active and asked
