"""What several ranks of a run must agree on, since a black box may answer otherwise the next time it is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from ..errors import MetricError

T = TypeVar("T")


def agreed(rank: int, world_size: int, compute: Callable[[], T]) -> T:
    """What `compute` gives on the first rank, on every rank.

    Raises:
        MetricError: it raised one there; the same on every rank.
    """
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            outcome = [compute()]
        except MetricError as error:
            if world_size == 1:
                raise
            outcome = [error]
    if world_size > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], MetricError):
        raise outcome[0]
    return outcome[0]


def shared_out(rank: int, world_size: int, count: int, compute: Callable[[int], T]) -> list[T]:
    """`compute` of each of 0, ..., count - 1, each on one rank, and all of it on every rank, in order."""
    mine = [(i, compute(i)) for i in range(rank, count, world_size)]
    if world_size > 1:
        mine = sorted(gather_object(mine), key=lambda pair: pair[0])
    return [value for _, value in mine]
