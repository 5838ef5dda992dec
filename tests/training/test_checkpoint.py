"""Checkpoints: the state comes back as it was, or not at all."""

import json
import math
import re

import pytest
import torch

from metricopt_hf import CheckpointError
from metricopt_hf.training.checkpoint import JSON_FILE, TENSORS_FILE, check, load, readable, save

SHARED = torch.arange(6.0)


def state():
    return {
        "phi": {"norm/weight": torch.randn(3), "norm": {"weight": torch.randn(3)}},  # both are "norm/weight" as a path
        "basis": torch.randn(4, 3).T,  # not contiguous
        "twice": [1, 2.5, "x"],
        "origin": SHARED,
        "same memory": SHARED,
        "part of it": SHARED[2:],
        "generator": torch.Generator().manual_seed(1).get_state(),
        "scalar": torch.tensor(2.0),
        "no rows": torch.zeros(0, 3),
        "half": torch.randn(3).bfloat16(),
        "nothing": None,
        "not a number": float("nan"),
        "empty": {},
        "tensor": {"value": {"dict": 1}},  # the words of the format itself
        "curve": [{"step": 3, "selection": None}],
        # what an optimizer's state holds: moments by the number of the parameter
        "moments": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2)}, 1: {}},
        "keys": {1: "a number", "1": "a text", -2: None},
        "tensors": [torch.randn(2), torch.zeros(0), torch.tensor(True)],
        "mixed": [1, torch.arange(3), [torch.ones(2), [None, "x"]], {2: [torch.zeros(1)]}],
        "no tensors": [],
    }


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else:
        assert a == b or math.isnan(a) and math.isnan(b)


def test_nested_state_comes_back_as_it_was(tmp_path):
    saved = state()
    save(saved, tmp_path / "made" / "on the way")
    assert_same(saved, load(tmp_path / "made" / "on the way"))


def test_an_optimizer_goes_on_with_its_moments(tmp_path):
    def stepped(parameters, optimizer, times):
        for _ in range(times):
            optimizer.zero_grad()
            sum((p - 1).square().sum() for p in parameters).backward()
            optimizer.step()

    def made():
        parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.full((2,), 4.0))]
        return parameters, torch.optim.Adam(parameters, lr=0.1)

    first, second = made(), made()
    stepped(*first, 3)
    save({"optimizer": first[1].state_dict(), "parameters": [p.detach() for p in first[0]]}, tmp_path)
    saved = load(tmp_path)
    assert list(saved["optimizer"]["state"]) == [0, 1]  # numbers, not texts, which it would take for other parameters
    second[1].load_state_dict(saved["optimizer"])
    for parameter, value in zip(second[0], saved["parameters"], strict=True):
        parameter.data.copy_(value)
    for parts in (first, second):
        stepped(*parts, 3)
    for one, other in zip(first[0], second[0], strict=True):
        assert torch.equal(one, other)


def test_saving_again_replaces_and_leaves_no_other_files(tmp_path):
    save(state(), tmp_path)
    save({"phi": torch.ones(2)}, tmp_path)
    assert_same({"phi": torch.ones(2)}, load(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([JSON_FILE, TENSORS_FILE])


def test_what_cannot_be_saved_leaves_what_was_saved_before(tmp_path):
    save({"phi": torch.ones(2)}, tmp_path)
    with pytest.raises(TypeError):
        save({"phi": torch.zeros(2), "function": print}, tmp_path)
    assert_same({"phi": torch.ones(2)}, load(tmp_path))


def cut_short(name):
    def damage(folder, other):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-7])

    return damage


def without(name):
    return lambda folder, other: (folder / name).unlink()


def flip_a_byte(folder, other):
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / TENSORS_FILE).write_bytes(content)


def swap(name):
    return lambda folder, other: (folder / name).write_bytes((other / name).read_bytes())


def rewrite(**changes):
    def damage(folder, other):
        document = json.loads((folder / JSON_FILE).read_text())
        document = {k: v for k, v in {**document, **changes}.items() if v is not None}
        (folder / JSON_FILE).write_text(json.dumps(document))

    return damage


DAMAGE = {
    "truncated tensors": cut_short(TENSORS_FILE),
    "truncated json": cut_short(JSON_FILE),
    "no tensors": without(TENSORS_FILE),
    "no json": without(JSON_FILE),
    "a flipped byte": flip_a_byte,
    "tensors of another checkpoint": swap(TENSORS_FILE),
    "json of another checkpoint": swap(JSON_FILE),
    "another format": rewrite(format_version=1),
    "no state": rewrite(state=None),
    "a state that names no tensor": rewrite(state={"tensor": "nowhere"}),
    "not an object": lambda folder, other: (folder / JSON_FILE).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    folder, other = tmp_path / "a", tmp_path / "b"
    save(state(), folder)
    save(state(), other)  # other random numbers
    DAMAGE[damage](folder, other)
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        load(folder)
    load(other)


# ---- before a resume


def trainer_checkpoint(folder, step):
    """A folder as Trainer leaves it, which writes its state last."""
    save(state(), folder / f"checkpoint-{step}")
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    return folder / f"checkpoint-{step}"


def test_a_whole_checkpoint_can_be_resumed(tmp_path):
    check(trainer_checkpoint(tmp_path, 10))


@pytest.mark.parametrize(
    ("missing", "reason"), [(JSON_FILE, "no guidance state"), ("trainer_state.json", "not written to its end")]
)
def test_an_unfinished_checkpoint_is_refused_and_the_one_before_it_named(tmp_path, missing, reason):
    for step in (8, 20, 100):
        trainer_checkpoint(tmp_path, step)
    last = trainer_checkpoint(tmp_path, 30)
    (last / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{reason}.*Resume from .*checkpoint-20\\."):
        check(last)


@pytest.mark.parametrize("damage", ["truncated tensors", "truncated json", "tensors of another checkpoint"])
def test_a_damaged_checkpoint_is_refused_before_it_is_resumed(tmp_path, damage):
    first, last = trainer_checkpoint(tmp_path, 10), trainer_checkpoint(tmp_path, 20)
    DAMAGE[damage](last, first)
    with pytest.raises(CheckpointError, match="Resume from .*checkpoint-10"):
        check(last)


def test_other_folders_beside_it_do_not_matter(tmp_path):
    (tmp_path / "checkpoint-5-of-another-run").mkdir()
    only = trainer_checkpoint(tmp_path, 10)
    (only / TENSORS_FILE).unlink()
    with pytest.raises(CheckpointError, match="no earlier one"):
        check(only)


def test_errors_of_reading_become_checkpoint_errors_and_others_stay(tmp_path):
    with pytest.raises(CheckpointError, match="cut short"), readable(tmp_path):
        raise EOFError("cut short")
    with pytest.raises(EOFError), readable(None):  # nothing is being resumed
        raise EOFError("cut short")
    with pytest.raises(ZeroDivisionError), readable(tmp_path):
        raise ZeroDivisionError
