"""The private hooks of Trainer: all of them listed, all of them there, and one that is gone is named."""

import ast
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from transformers import Seq2SeqTrainer, Trainer

from metricopt_hf.training import hooks

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "metricopt_hf" / "training").glob("*.py"))


def test_the_installed_transformers_has_all_of_them():
    assert hooks.changed() == []


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
    assert defined == set(hooks.OVERRIDDEN) and called == set(hooks.CALLED)
    told = "\n".join(path.read_text() for path in SOURCES)
    assert all(re.search(rf"self\.{name}\b|\"{name}\"", told) for name in hooks.ATTRIBUTES)


def test_each_has_a_reason():
    reasons = [hook.why for hook in (hooks.OVERRIDDEN | hooks.CALLED).values()] + list(hooks.ATTRIBUTES.values())
    assert all(len(why) > 20 for why in reasons) and len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("name", hooks.OVERRIDDEN | hooks.CALLED)
def test_one_that_is_gone_or_changed_is_named(name):
    gone = type("Gone", (Trainer,), {name: None})
    (told,) = hooks.changed(gone)
    assert told.startswith(f"{name} is gone (")
    changed = type("Changed", (Trainer,), {name: lambda self, something_new: None})
    (told,) = hooks.changed(changed)
    assert told.startswith(f"{name} takes ('something_new',) instead of ")


@pytest.mark.parametrize("name", [*hooks.OVERRIDDEN, *hooks.ATTRIBUTES])
def test_one_that_trainer_does_not_use_any_more_is_named(name, monkeypatch):
    getsource = inspect.getsource
    monkeypatch.setattr(
        hooks.inspect, "getsource", lambda cls: re.sub(rf"self\.{name}( = |\()", r"self.another\1", getsource(cls))
    )
    (told,) = hooks.changed()
    assert told.startswith(f"{name} is not ")


def test_the_versions_are_those_of_setup_py():
    assert f'"transformers{hooks.TRANSFORMERS}"' in (ROOT / "setup.py").read_text()
    assert version("transformers") in SpecifierSet(hooks.TRANSFORMERS)
