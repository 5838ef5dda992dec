"""Every code block of README and docs: Python is run page by page, commands are checked by what they call."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import given
import pytest
from helpers import ROOT, example
from transformers import HfArgumentParser

from benchmarks.__main__ import commands
from metricopt_hf import MetricOptConfig, cli

markdown_it = pytest.importorskip("markdown_it")
for needed in ("tabulate", "matplotlib"):
    pytest.importorskip(needed)

SKILL = "skills/metricopt/SKILL.md"
PAGES = ["README.md", "CONTRIBUTING.md", SKILL, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
NEEDS = {"docs/other_trainers.md": ("trl", "sentence_transformers")}
CODE, COMMANDS, OTHER = "python", "sh", ("text", "bibtex", "yaml")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))
    found = []
    for token in tokens:
        if token.type in ("fence", "code_block"):
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content))
        for child in token.children or ():  # commands in a table or a sentence
            if child.type == "code_inline" and re.match(r"(python|make|pip|torchrun) ", child.content):
                found.append(Block(page, (token.map or [0])[0] + 1, COMMANDS, child.content))
    return found


def of(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_left_out(page):
    for block in blocks(page):
        directive = block.language.startswith("{")  # Sphinx runs these
        assert directive or block.language in (CODE, COMMANDS, *OTHER), f"{block}: what is {block.language!r}?"


@pytest.mark.parametrize("block", of(CODE), ids=str)
def test_no_line_of_code_is_cut_off_on_a_screen_of_1280_pixels(block):
    widest = 91 if block.page.startswith("docs/") else 105  # of the site's theme; of GitHub
    assert [line for line in block.text.splitlines() if len(line) > widest] == []


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return given.hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def small_runs(monkeypatch):
    """Where a page leaves steps and budgets at their defaults, so that it runs in seconds."""
    settle = MetricOptConfig.__post_init__

    def settle_smaller(self):
        settle(self)
        for name, unset, smaller in (
            ("metric_call_budget", None, 140),
            ("max_steps", -1, 12),
        ):
            if getattr(self, name) == unset:
                setattr(self, name, smaller)

    monkeypatch.setattr(MetricOptConfig, "__post_init__", settle_smaller)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({block.page for block in of(CODE)}))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, hub, small_runs, tmp_path, monkeypatch, capsys):
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    given.write_reviews(tmp_path / "reviews.csv")
    script = ModuleType("page")  # what is pickled is looked up by its module
    monkeypatch.setitem(sys.modules, "page", script)
    names = vars(script)
    names.update({} if page == "README.md" else given.names())  # README's runs as it stands
    for block in blocks(page):
        if block.language == CODE:
            code = block.text
            for name, folder in hub.items():
                code = code.replace(f'"{name}"', repr(folder))
            exec(compile("\n" * block.line + code, block.page, "exec"), names)
            assert "trainer.train()" not in code or names["trainer"].result is not None  # it was guided
            assert "trainer.diagnose()" not in code or "Recommendation: " in capsys.readouterr().out


# Commands


@cache
def options(script: str) -> str:
    """What `--help` of an example says."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        example(script).main(["--help"])
    return said.getvalue()


def check(words: list[str]) -> None:
    """That what a command names is there."""
    scripts = [word for word in words if word.endswith(".py")]
    if words[0] in ("git", "cd", "export"):
        return
    if words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
        assert words[1] in targets
        given = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
        assert words[1] != "bench" or not given or given[0].split()[0] in commands()
    elif words[0] == "metricopt":
        name = next(name for name in cli.COMMANDS if words[1 : 1 + len(name.split())] == name.split())
        known = HfArgumentParser(cli.COMMANDS[name][1]).format_help()
        assert [word for word in words if word.startswith("--") and word not in known] == []
    elif words[0] == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert all(f'"{extra}"' in (ROOT / "setup.py").read_text() for extra in ",".join(extras).split(",") if extra)
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None
    else:
        assert words[0] in ("python", "torchrun", "accelerate") and len(scripts) == 1
        script = Path(scripts[0])
        assert (ROOT / script).exists(), f"there is no {script}"
        if script.parent.name == "examples":
            mine = words[words.index(scripts[0]) :]
            assert [word for word in mine if word.startswith("--") and word not in options(script.stem)] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", of(COMMANDS), ids=str)
def test_what_a_command_names_is_there(block):
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("<", "'<").replace(">", ">'"), comments=True)
        if words:
            check(words)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_cards/README.md", SKILL])
def test_links_of_pages_outside_the_site_lead_somewhere(page):
    """Sphinx checks those of docs/."""
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", text)
    assert [t for t in targets if not (ROOT / page).parent.joinpath(t).exists()] == []
