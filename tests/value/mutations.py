"""Run by test_mutations.py in a process of its own: value functions with a byte or a few changed. Not a test module.

Arguments: folder of a whole one, file to change, first seed, seeds, whether the hashes are made to fit ("vouched").
Prints each seed before it is tried, and at the end what came of all.
"""

import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

from metricopt_hf import ValueFunction, ValueFunctionError

TENSORS = "model.safetensors"


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, or a piece cut out, doubled, or added; every position is as likely as any other."""
    changed = bytearray(content)
    place = rng.randrange(len(changed))
    match rng.randrange(6):
        case 0 | 1 | 2:
            changed[place] = rng.randrange(256)
        case 3:
            for _ in range(rng.randrange(2, 9)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        case 4:
            del changed[place : place + rng.randrange(1, 64)]
        case _:
            changed[place:place] = rng.choice([bytes(8), b"9" * 30, b"\xff" * 4, bytes(changed[place : place + 40])])
    return bytes(changed)


def main(folder: Path, name: str, first: int, count: int, vouched: bool) -> None:
    content, outcomes = (folder / name).read_bytes(), Counter()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        victim = Path(temporary) / "victim"
        shutil.copytree(folder, victim)
        for seed in range(first, first + count):
            print(seed, flush=True)
            (victim / name).write_bytes(mutated(content, random.Random(f"{name} {seed}")))
            if vouched and name == TENSORS:
                config = json.loads((victim / "config.json").read_text())
                config["sha256"] = hashlib.sha256((victim / name).read_bytes()).hexdigest()
                (victim / "config.json").write_text(json.dumps(config))
            signal.alarm(20)  # ends the process
            try:
                loaded = ValueFunction.from_pretrained(victim)
                loaded.predict(torch.zeros(loaded.num_coordinates))
                loaded.save_pretrained(Path(temporary) / "again")
                outcomes["read"] += 1
            except ValueFunctionError as error:
                outcomes["refused" if len(str(error)) < 2000 else "a long message"] += 1
            except Exception as error:
                outcomes[f"raw {type(error).__name__}: {str(error)[:100]} at seed {seed}"] += 1
    print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "vouched")
