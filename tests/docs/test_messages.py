"""The page on troubleshooting has every error message of the source, and none that is there no more."""

import sys

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import messages


def test_the_page_and_the_source_have_the_same_messages():
    there, raised = messages.on_page(), messages.messages()
    hint = "run `python docs/messages.py` and bring docs/troubleshooting.md up to date"
    lacking = [f"{stem}  ({message.place})" for stem, message in raised.items() if stem not in there]
    assert lacking == [], hint
    assert [stem for stem in there if stem not in raised] == [], hint
    assert len(there) == len(set(there))


@pytest.mark.parametrize(
    "code, stems",
    [
        ('raise ConfigurationError(f"{a} has no split {b!r}; it has {c}.")', ["… has no split …; it has …"]),
        ('raise ConfigurationError("Say so: now. " f"Not {x}")', ["Say so: now. Not …"]),
        ('raise ConfigurationError("There is no metric to diagnose: give one")', ["There is no metric to diagnose"]),
        ('NONE = "there is nothing in the set"\nraise ConfigurationError(NONE)', ["there is nothing in the set"]),
        ('def why():\n    return f"{a} is gone for good"\nerror = ConfigurationError(why())', ["… is gone for good"]),
        ("raise ConfigurationError(str(error))", []),
        ('raise KeyError("of somebody else")', []),
    ],
)
def test_stems_by_hand(tmp_path, code, stems, monkeypatch):
    monkeypatch.setattr(messages, "ROOT", tmp_path)
    (tmp_path / "module.py").write_text(code)
    found = messages.Module(tmp_path / "module.py").messages({"ConfigurationError"})
    assert [message.stem for message in found] == stems
