"""The state of the guidance in a checkpoint, and a manifest of all of the checkpoint's files.

The manifest is written last. It holds a hash of every file, and the settings that a run cannot go on without, so that
a damaged or edited file, and a run that is another one, are found before anything is trained.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from ..errors import CheckpointError, brief
from ..value.serialization import replace_file

logger = logging.getLogger(__name__)

STATE_FILE, MANIFEST_FILE = "metricopt_state.pt", "metricopt_manifest.json"
FORMAT_VERSION = 5  # of both files; 5: observations are one tensor
PARTS = "*/*.distcp"  # the shards of model and optimizer under FSDP2
OF_A_RANK = re.compile(r"rng_state_\d+\.pth")  # other ranks may not have written theirs yet


def save(state: dict[str, Any], folder: str | os.PathLike) -> None:
    """Write nested dicts and lists of tensors and plain values into a checkpoint's folder."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / STATE_FILE, buffer.getvalue())


def load(folder: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` wrote; no code in it is run.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with readable(folder):
        return torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)


def complete(folder: str | os.PathLike, settings: dict[str, Any]) -> None:
    """Write the manifest, when all else is there.

    Args:
        settings: those that a resuming run must share, as JSON values.
    """
    folder = Path(folder)
    every = sorted(path for path in [*folder.iterdir(), *folder.glob(PARTS)] if path.is_file())
    digests = {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in every
        if path.name != MANIFEST_FILE and not OF_A_RANK.fullmatch(path.name)
    }
    document = {"format_version": FORMAT_VERSION, "settings": settings, "files": digests}
    replace_file(folder / MANIFEST_FILE, json.dumps(document, indent=1).encode())


def resumed(asked: str | bool | None, output_dir: str) -> dict[str, Any] | None:
    """Settings of the checkpoint that a run resumes from, after a check of its files; None where there is none.

    Args:
        asked: the argument of `Trainer.train`: a folder, True for the last one, else nothing.

    Raises:
        CheckpointError: see `check`.
    """
    folder = get_last_checkpoint(output_dir) if asked is True else asked
    return check(folder) if folder else None  # without a folder, Trainer raises


def check(folder: str | os.PathLike) -> dict[str, Any]:
    """Before a resume: is the checkpoint whole, and as it was saved? Gives its settings.

    Raises:
        CheckpointError: it was not written to its end, is damaged, or holds no guidance state; names the one before.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).exists():
        problem = (
            f"holds no guidance state ({STATE_FILE}): it was written by a plain Trainer, by an earlier version, with "
            "save_only_model, or not to its end. To start from its weights, load them into the model and begin a new "
            "run"
        )
        raise CheckpointError(f"{folder} {problem}. {_before(folder)}")
    if not (folder / MANIFEST_FILE).exists():
        raise CheckpointError(f"{folder} was not written to its end: {MANIFEST_FILE} is missing. {_before(folder)}")
    with readable(folder):
        document = json.loads((folder / MANIFEST_FILE).read_bytes())
        if document.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has format version {brief(document.get('format_version'))}, this version of metricopt_hf "
                f"reads {FORMAT_VERSION}: resume with the version that saved it, or begin a new run from its weights."
            )
        for name, digest in document["files"].items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} is not whole: {name} is missing. {_before(folder)}")
            if _digest(folder / name) != digest:
                raise CheckpointError(f"{folder} is damaged: {name} is not as it was saved. {_before(folder)}")
        if TRAINER_STATE_NAME not in document["files"]:
            raise CheckpointError(f"{folder} lacks {TRAINER_STATE_NAME}. {_before(folder)}")
        return document["settings"]


def check_settings(folder: str | os.PathLike, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Compare the settings of the run that saved with those of this one.

    Raises:
        CheckpointError: names the setting that differs.
    """
    for name, value in ours.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{folder} was saved by a run with {name}={saved.get(name)!r}, this one has {name}={value!r}: resume "
                "with the same, or begin a new run from its weights (load the model from that folder, and call train() "
                "without resume_from_checkpoint)."
            )


def _digest(path: Path) -> str:
    """A fast hash of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written(folder: str | os.PathLike) -> Iterator[None]:
    """Inside, a checkpoint is written. If that fails (for example, disk full), log which one to resume from."""
    try:
        yield
    except Exception as error:
        logger.error(
            f"{folder} was not written to its end ({type(error).__name__}: {brief(error)}), and is not to be resumed. "
            f"Mend that first (is the disk full?), and remove the folder. {_before(Path(folder))}"
        )
        raise


@contextmanager
def readable(folder: str | os.PathLike | None) -> Iterator[None]:
    """Turn whatever goes wrong while reading a checkpoint's files into a `CheckpointError` that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError, ValueError, RecursionError, LookupError,
        TypeError, AttributeError,
    ) as error:
        if folder is None:
            raise
        raise CheckpointError(
            f"{folder} cannot be read ({type(error).__name__}: {brief(error)}). {_before(Path(folder))}"
        ) from error


def _before(folder: Path) -> str:
    """The remedy: the last checkpoint before this one."""

    def step(path: Path) -> int:
        number = path.name.removeprefix("checkpoint-")
        return int(number) if number.isdigit() else -1

    earlier = [path for path in folder.parent.glob("checkpoint-*") if 0 <= step(path) < step(folder)]
    return f"Resume from {max(earlier, key=step)}." if earlier else "There is no earlier one beside it; start anew."
