"""Records of runs: JSON lines, a file per task."""

from __future__ import annotations

import fcntl
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
TUNING = RESULTS / "tuning"
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "fairlearn", "cma")
Key = tuple[str, str, int]  # task, method, seed


def read(folder: Path) -> list[dict[str, Any]]:
    """All records of a results folder. A last line cut off by a kill is none."""
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def setting(config: Mapping[str, Any]) -> str:
    """A config as a key."""
    return json.dumps(config, sort_keys=True)


def key_of(record: dict[str, Any]) -> Key:
    return record["task"], record["method"], record["seed"]


def write(record: dict[str, Any], folder: Path) -> None:
    """Append a line; processes wait for each other."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{record['task']}.jsonl", "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torn = file.tell() and not _ends_line(file)
        file.write("\n" * bool(torn) + json.dumps(record, allow_nan=False) + "\n")


def _ends_line(file) -> bool:
    file.seek(file.tell() - 1)
    return file.read(1) == "\n"


def context() -> dict[str, Any]:
    """What the code is, and what it runs on."""

    def git(*words: str) -> str:
        answer = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return answer.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "../metricopt_hf", "*.py", "protocol.json")),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def rounded(value: Any) -> Any:
    """With six digits a number, and null for one that is not finite."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
