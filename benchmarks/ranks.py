"""Processor time of a linearisation on each of several ranks, against one process: DDP's way, and sharded by FSDP2.

    python -m benchmarks.ranks            (make bench ARGS=ranks), on the CPU with gloo; writes docs/results/ranks.md

Weights and data are random, which changes no time. A rank's processor time is its share of the work, whatever else the
machine does; it leaves out what a rank waits for the others.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser

from metricopt_hf import FiLM, Ledger, Metric
from metricopt_hf.evaluation.data import InOrder
from metricopt_hf.evaluation.evaluator import BatchOutput, Evaluator
from metricopt_hf.linear.linearizer import Linearizer

from .large_models import DIM, MINILM, TOKENS, VOCABULARY, accuracy
from .looks import CACHE_BYTES, moved
from .pages import page
from .tables import markdown

PAGE = Path(__file__).parents[1] / "docs" / "results" / "ranks.md"
BATCHES = 8, 32  # rows
WAYS = {"DDP": False, "FSDP2": True}  # whether the model is sharded


@dataclass
class RanksArguments:
    """What to measure."""

    ranks: int = field(default=2, metadata={"help": "Processes."})
    rows: int = field(default=256, metadata={"help": f"Texts of {TOKENS} tokens."})
    page: str = field(default=str(PAGE), metadata={"help": "Where the table is written to."})


def linearised(rank: int, world_size: int, sharded: bool, rows: int, size: int) -> tuple[float, torch.Tensor]:
    """Seconds of one linearisation, behind the first, and its derivatives in all of phi.

    Args:
        size: rows in a batch.
    """
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**MINILM)).eval().requires_grad_(False)
    data = [{"input_ids": torch.randint(VOCABULARY, (TOKENS,)), "labels": torch.tensor(0)} for _ in range(rows)]
    phi = FiLM(model)
    if sharded:
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        phi.reset()

    def predict(batch: dict) -> BatchOutput:
        return BatchOutput(model(input_ids=batch["input_ids"]).logits, batch["labels"])

    batches, metric = InOrder(data, size, torch.utils.data.default_collate), Metric(accuracy, "accuracy")
    evaluator = Evaluator(phi, predict, batches, metric, Ledger(), CACHE_BYTES, rank=rank, world_size=world_size)
    evaluator.freeze(partial(moved, phi))
    made, prediction = Linearizer(evaluator, DIM, None, torch.Generator().manual_seed(0)), evaluator.predictions()
    basis = made.coordinates(prediction).basis
    made.linearize(basis, prediction)  # uses what the coordinates were found from
    start = process_time()
    (leaf,) = made.linearize(basis, prediction).leaves.values()
    return process_time() - start, leaf.jacobian @ basis.T


def run(rank: int, world_size: int, sharded: bool, rows: int, size: int, folder: str) -> None:
    """A rank: keeps what it has found in a file."""
    torch.set_num_threads(1)
    if world_size > 1 or sharded:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world_size)
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "localhost"}
        os.environ |= {name: f"{value}" for name, value in places.items()}
        PartialState(cpu=True)  # through which ranks gather
    torch.save(linearised(rank, world_size, sharded, rows, size), f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(world_size: int, sharded: bool, rows: int, size: int) -> list[tuple[float, torch.Tensor]]:
    """What each rank has found, in processes of their own.

    Raises:
        SystemExit: one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        started: list[Any] = [
            get_context("spawn").Process(target=run, args=(rank, world_size, sharded, rows, size, folder))
            for rank in range(world_size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise SystemExit("A rank failed.")
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(world_size)]


def row(name: str, size: int, args: RanksArguments) -> list[str]:
    """The table's row of a way to share the work, in batches of a size."""
    ((alone, exact),) = measured(1, WAYS[name], args.rows, size)
    found = measured(args.ranks, WAYS[name], args.rows, size)
    seconds = [seconds for seconds, _ in found]
    off = max(float((jacobian - exact).norm() / exact.norm()) for _, jacobian in found)
    each = ", ".join(f"{s:.2f}" for s in seconds)
    return [name, f"{size}", f"{alone:.2f}", each, f"{max(seconds) / alone:.2f}", f"{off:.0e}"]


def main(argv: list[str] | None = None) -> int:
    (args,) = HfArgumentParser(RanksArguments).parse_args_into_dataclasses(argv)
    headers = ["", "rows in a batch", "one process, s", f"each of {args.ranks} ranks, s", "share of the slowest"]
    rows = [row(name, size, args) for name in WAYS for size in BATCHES]
    table = markdown([*headers, "derivatives are off by"], rows)
    text = page(
        "# Several ranks",
        "Written by `python -m benchmarks.ranks`; do not edit.",
        f"Processor seconds of one linearisation of {args.rows} texts of {TOKENS} tokens by a text encoder like "
        "MiniLM, on the CPU with gloo, in one thread per rank. With FSDP2, one process is a mesh of one, and what lies "
        "in front of phi is computed anew each time; ranks gather the parameters in each pass of a batch. The last "
        "column is the norm of the difference to one process's derivatives, over the norm of these.",
        table,
    )
    Path(args.page).write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
