"""Writes BENCHMARKS.md, docs/protocol.md and docs/results/ from the committed records alone: same records, same bytes.

The README's table of what to use is renewed too.

python -m benchmarks.bench_report            (make bench-report)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from . import decision, pages, protocol
from .comparing import results_of
from .curves import plot_curves
from .forest import plot_forest
from .records import RESULTS, read
from .tables import methods_csv

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class ReportArguments:
    """From where to where."""

    results: str = field(default=str(RESULTS), metadata={"help": "Folder of the records."})
    output: str = field(default=str(ROOT), metadata={"help": "Folder for BENCHMARKS.md, and for docs/ beside it."})


def main(argv: list[str] | None = None) -> int:
    (arguments,) = HfArgumentParser(ReportArguments).parse_args_into_dataclasses(argv)
    records = read(Path(arguments.results))
    if not records:
        print(f"There are no records in {arguments.results}: run `make bench ARGS=run` first.")
        return 2
    results, output = results_of(records), Path(arguments.output)
    folder = output / "docs" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        output / "BENCHMARKS.md": pages.front(results),
        output / "docs" / "protocol.md": pages.protocol_page(protocol.load(), records),
        folder / "README.md": pages.all_comparisons(results),
        folder / "harm.md": pages.harm_page(results),
        folder / "decision.md": decision.page(results),
    }
    plot_forest(folder / "forest.png", results)
    for result in results:
        name = result.task.name
        written[folder / f"{name}.md"] = pages.task_page(result)
        written[folder / f"{name}.csv"] = methods_csv(result)
        plot_curves(folder / f"{name}.png", result.task, result.rows)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    decision.write_into(output / "README.md", results)
    print(f"written: BENCHMARKS.md, docs/protocol.md, and {len(results)} tasks in docs/results/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
