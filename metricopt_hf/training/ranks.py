"""Ranks: the processes that share a run, and the message when one of them has gone."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch.distributed as dist
from accelerate.utils import gather_object
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..errors import RankError, brief

logger = logging.getLogger(__name__)

PATIENCE = 0.05  # seconds in which a process whose connection broke is seen to have gone


@contextmanager
def told_when_lost(args: TrainingArguments) -> Iterator[None]:
    """Inside, an error caused by the end of another rank names that rank and the checkpoint to resume from. Collective.

    Raises:
        RankError: another rank has gone; the backend itself reports only a closed connection.
    """
    if args.world_size == 1:
        yield
        return
    processes = gather_object([(socket.gethostname(), os.getpid())])
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        message = _message(_gone(processes), args, error)
        logger.error(message)  # at once: the launcher ends this process too, in a moment
        raise RankError(message) from error


def _gone(processes: Sequence[tuple[str, int]]) -> list[int]:
    """Ranks of this machine that have ended; other machines cannot be seen."""
    here, until = socket.gethostname(), time.monotonic() + PATIENCE
    while True:
        gone = [rank for rank, (host, pid) in enumerate(processes) if host == here and not _runs(pid)]
        if gone or time.monotonic() > until:
            return gone
        time.sleep(PATIENCE / 10)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _message(gone: Sequence[int], args: TrainingArguments, error: BaseException) -> str:
    who = f"Rank {', '.join(map(str, gone))} of {args.world_size}" if gone else "Another rank"
    last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    remedy = "There is no checkpoint yet: start anew."
    if last is not None:
        remedy = f"Start all ranks again, with trainer.train(resume_from_checkpoint={last!r})."
    this = f"so rank {args.process_index} cannot go on; what it printed last says why"
    return f"{who} has gone, {this}. {remedy} ({brief(error)})"
