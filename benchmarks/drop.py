"""Drops the records of methods from results and tuning, so that they are run anew; other lines stay byte for byte.

python -m benchmarks.drop --methods metricopt shuffled random            (make bench ARGS="drop --methods ...")
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from .records import RESULTS, TUNING


@dataclass
class DropArguments:
    """What to drop, and where."""

    methods: list[str] = field(metadata={"help": "As they stand in the records, also ones that are run no more."})
    folders: list[str] = field(
        default_factory=lambda: [str(RESULTS), str(TUNING)], metadata={"help": "Folders of records."}
    )


def drop(file: Path, methods: Collection[str]) -> int:
    """How many lines of a file were of these methods."""
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["method"] not in methods]
    if len(kept) < len(lines):
        file.write_bytes(b"".join(kept))
    return len(lines) - len(kept)


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(DropArguments).parse_args_into_dataclasses(argv)
    files = [file for folder in arguments.folders for file in sorted(Path(folder).glob("*.jsonl"))]
    for file in files:
        print(f"{drop(file, arguments.methods)} dropped from {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
