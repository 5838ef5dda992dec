"""What `import metricopt_hf` takes, beside `from transformers import Trainer`, each in processes of their own.

    python -m benchmarks.import_time            (make bench ARGS=import)

Processor time of one thread, the least of several tries. The ratio should be at most 1.1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

STATEMENTS = ("from transformers import Trainer", "import metricopt_hf")
TARGET = 1.1


@dataclass
class ImportArguments:
    """How often."""

    tries: int = field(default=5, metadata={"help": "Processes for each of the two, by turns."})


def seconds(statement: str) -> float:
    """Processor time of a Python that does this and ends."""
    code = f"import time\n{statement}\nprint(time.process_time())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(ImportArguments).parse_args_into_dataclasses(argv)
    found: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for _ in range(args.tries):
        for statement, tries in found.items():
            tries.append(seconds(statement))
    theirs, ours = (min(tries) for tries in found.values())
    for statement, tries in found.items():
        print(f"{statement:34} {min(tries):.2f} s")
    print(f"ratio {ours / theirs:.2f}, target at most {TARGET}")
    return 0 if ours <= TARGET * theirs else 1


if __name__ == "__main__":
    sys.exit(main())
