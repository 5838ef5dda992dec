"""The private hooks of `transformers.Trainer` that the library overrides or calls, each with the reason.

They are private, so any release may drop or change them, and an override that nobody calls fails in silence. `changed`
names those that differ from what is expected here; an attempt with a new release begins with these tests.
"""

import ast
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.specifiers import SpecifierSet
from transformers import Seq2SeqTrainer, Trainer

# As in setup.py: the releases that have these hooks. An attempt with a new one begins here.
TRANSFORMERS = ">=5.20,<6"


class Hook(NamedTuple):
    """A method of Trainer: the names of its parameters, without self, and what it is needed for."""

    parameters: tuple[str, ...]
    why: str


OVERRIDDEN = {
    "_prepare_for_training": Hook(
        ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        "a run's parts are made before the optimizer and the wrappers are",
    ),
    "_save": Hook(("output_dir", "state_dict"), "the value function is saved beside the model"),
    "_save_checkpoint": Hook(("model", "trial"), "a checkpoint holds the guidance's state too"),
    "_load_from_checkpoint": Hook(
        ("resume_from_checkpoint", "model"), "a checkpoint that cannot be read is an error that says what to do"
    ),
    "_load_optimizer_and_scheduler": Hook(
        ("checkpoint",), "the guidance's state is loaded when optimizer and schedule are, once the model is prepared"
    ),
    "_push_from_checkpoint": Hook(("checkpoint_folder",), "what is pushed along the way has a card"),
    "_finish_current_push": Hook((), "a push in the background that failed is reported"),
}
CALLED = {
    "_get_output_dir": Hook(("trial",), "where the checkpoint goes that the guidance's state belongs to"),
    "_prepare_input": Hook(("data",), "the inputs that a metric asks for are on the model's device"),
    "_prepare_inputs": Hook(("inputs",), "the same for the batches that give the coordinates"),
    "_remove_unused_columns": Hook(
        ("dataset", "description"), "the model sees the columns it takes, as in training"
    ),
    "_get_collator_with_removed_columns": Hook(
        ("data_collator", "description"), "the same where the data set has no columns to remove"
    ),
}
# What Trainer and Seq2SeqTrainer set on themselves, and do not document.
ATTRIBUTES = {
    "current_gradient_accumulation_steps": "how many batches an update has, the last of an epoch included",
    "push_in_progress": "the push in the background, to see whether it failed",
    "_gen_kwargs": "how Seq2SeqTrainer generates; an observation may come before its first evaluation",
}


def changed(trainer: type[Trainer] = Seq2SeqTrainer) -> list[str]:
    """A line for each hook that is not as expected in the release of `trainer`, with what it is needed for."""
    source = "\n".join(inspect.getsource(cls) for cls in (Trainer, Seq2SeqTrainer))
    found = []
    for name, hook in (OVERRIDDEN | CALLED).items():
        method = getattr(trainer, name, None)
        if method is None:
            found.append(f"{name} is gone ({hook.why})")
            continue
        parameters = tuple(inspect.signature(method).parameters)[1:]
        if parameters != hook.parameters:
            found.append(f"{name} takes {parameters} instead of {hook.parameters} ({hook.why})")
        elif name in OVERRIDDEN and f"self.{name}(" not in source:
            found.append(f"{name} is not called any more ({hook.why})")
    for name, why in ATTRIBUTES.items():
        if f"self.{name} = " not in source:
            found.append(f"{name} is not set any more ({why})")
    return found


ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "metricopt_hf" / "training").glob("*.py"))


def test_the_installed_transformers_has_all_of_them():
    assert changed() == []


def private(name):
    return name.startswith("_") and not name.startswith("__") and hasattr(Seq2SeqTrainer, name)


def used():
    """Private methods of Trainer that our trainers define, and those that they call."""
    trees = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    defined = {node.name for node in trees if isinstance(node, ast.FunctionDef) and private(node.name)}
    read = {node.attr for node in trees if isinstance(node, ast.Attribute) and private(node.attr)}
    return defined, read - defined


def test_the_list_is_whole_and_holds_no_more():
    defined, called = used()
    assert defined == set(OVERRIDDEN) and called == set(CALLED)
    told = "\n".join(path.read_text() for path in SOURCES)
    assert all(re.search(rf"(self|trainer)\.{name}\b|\"{name}\"", told) for name in ATTRIBUTES)


def test_each_has_a_reason():
    reasons = [hook.why for hook in (OVERRIDDEN | CALLED).values()] + list(ATTRIBUTES.values())
    assert all(len(why) > 20 for why in reasons) and len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("name", OVERRIDDEN | CALLED)
def test_one_that_is_gone_or_changed_is_named(name):
    gone = type("Gone", (Trainer,), {name: None})
    (told,) = changed(gone)
    assert told.startswith(f"{name} is gone (")
    other = type("Other", (Trainer,), {name: lambda self, something_new: None})
    (told,) = changed(other)
    assert told.startswith(f"{name} takes ('something_new',) instead of ")


@pytest.mark.parametrize("name", [*OVERRIDDEN, *ATTRIBUTES])
def test_one_that_trainer_does_not_use_any_more_is_named(name, monkeypatch):
    getsource = inspect.getsource
    monkeypatch.setattr(
        inspect, "getsource", lambda cls: re.sub(rf"self\.{name}( = |\()", r"self.another\1", getsource(cls))
    )
    (told,) = changed()
    assert told.startswith(f"{name} is not ")


def test_the_versions_are_those_of_setup_py():
    assert f'"transformers{TRANSFORMERS}"' in (ROOT / "setup.py").read_text()
    assert version("transformers") in SpecifierSet(TRANSFORMERS)
