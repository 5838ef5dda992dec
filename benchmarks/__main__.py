"""Runs a benchmark command by its name, with the options that follow; without a name, lists all of them.

python -m benchmarks run --jobs 2            (make bench ARGS="run --jobs 2")
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from textwrap import shorten

SHORT = {"bench_report": "report", "bridge_sorting": "bridge", "import_time": "import"}


def commands() -> dict[str, tuple[str, str]]:
    """Name -> (module, first line of its docstring), of every module of this folder that has a `main`."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path != Path(__file__) and any(getattr(node, "name", "") == "main" for node in tree.body):
            name = SHORT.get(path.stem, path.stem.replace("_", "-"))
            found[name] = (path.stem, ast.get_docstring(tree).splitlines()[0])
    return found


def main(argv: list[str]) -> int:
    known = commands()
    if not argv or argv[0] not in known:
        print(*(f"{name:14} {shorten(about, 100)}" for name, (_, about) in known.items()), sep="\n")
        return 2 if argv else 0
    return importlib.import_module(f"benchmarks.{known[argv[0]][0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
