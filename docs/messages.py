"""The error messages of the library and of its scripts, as the source has them, for the page on troubleshooting.

    python docs/messages.py            (what the page lacks, and what it has and the source has not)

A message is known by its *stem*: its first clause, with an ellipsis for what is filled in. The page holds each stem
once, as code, at the start of a row.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, COMPARISON = ROOT / "metricopt_hf", ROOT / "examples" / "comparison"
PAGE = ROOT / "docs" / "troubleshooting.md"
LEAST = 20  # characters of a stem, so that it says something
FILLED = "…"


@dataclass(frozen=True)
class Message:
    """An error that is made somewhere.

    Attributes:
        place: file and line.
        error: its class.
        text: the message, with an ellipsis for what is filled in.
    """

    place: str
    error: str
    text: str

    @property
    def stem(self) -> str:
        """The first clause that is long enough to say something."""
        for end in re.finditer(r"[.:;,](?= |$)| \(", self.text):
            if len(self.text[: end.start()].replace(FILLED, "")) >= LEAST:
                return self.text[: end.start()]
        return self.text.rstrip(".")


class Module:
    """A source file, in which names that stand for text can be looked up."""

    def __init__(self, path: Path):
        self.path, self.tree = path, ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(self.tree))
        self.functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
        self.values: dict[str, list[ast.AST]] = {}
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.values.setdefault(node.targets[0].id, []).append(node.value)

    def texts(self, node: ast.AST, depth: int = 0) -> list[str]:
        """What a node may be as text, [] where it is none that stands in this file."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            parts = [self.texts(part, depth) or [FILLED] for part in node.values]
            return ["".join(chosen) for chosen in itertools.islice(itertools.product(*parts), 12)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = [self.texts(side, depth) or [FILLED] for side in (node.left, node.right)]
            return [left + right for left, right in itertools.product(*sides)]
        if isinstance(node, ast.FormattedValue):
            found = self.texts(node.value, depth) if isinstance(node.value, ast.Name) else []
            # a clause, not a word among others
            return list(dict.fromkeys(text if " " in text.strip() else FILLED for text in found))
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, depth) + self.texts(node.orelse, depth)
        if depth < 3 and isinstance(node, ast.Name):
            return [text for value in self.values.get(node.id, ()) for text in self.texts(value, depth + 1)]
        if depth < 3 and isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("rstrip", "strip"):
                return self.texts(node.func.value, depth)
            returns = [n for n in ast.walk(self.functions.get(name, ast.Pass())) if isinstance(n, ast.Return)]
            return [text for found in returns if found.value for text in self.texts(found.value, depth + 1)]
        return []

    def messages(self, errors: set[str]) -> Iterator[Message]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in errors and node.args:
                for text in self.texts(node.args[0]):
                    text = re.sub(f"{FILLED}+", FILLED, " ".join(text.split()))
                    if re.search(r"\w\w+ \w\w+", text):  # else it is another error's, passed on
                        place = f"{self.path.relative_to(ROOT)}:{node.lineno}"
                        yield Message(place, ast.unparse(node.func), text)


def messages() -> dict[str, Message]:
    """Stem -> message, of every error that the library and its scripts raise on purpose."""
    classes = [node for node in Module(PACKAGE / "errors.py").tree.body if isinstance(node, ast.ClassDef)]
    names = {error.name for error in classes} | {"ImportError"}
    # `metrics/*/` holds scripts of `evaluate`, whose errors are the metric's own
    paths = [path for folder in (PACKAGE, COMPARISON) for path in sorted(folder.rglob("*.py"))]
    modules = [Module(path) for path in paths if path.parents[1].name != "metrics"]
    return {message.stem: message for module in modules for message in module.messages(names)}


def on_page() -> list[str]:
    """The stems that the page has: each row of its tables begins with one."""
    return re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.M)


if __name__ == "__main__":
    found, there = messages(), on_page()
    for stem, message in found.items():
        if stem not in there:
            print(f"lacks     {message.place}  {message.error}\n          {message.text}\n          `{stem}`")
    for stem in there:
        if stem not in found:
            print(f"has too much: `{stem}`")
