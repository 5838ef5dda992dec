"""State on disk: nested dicts and lists of tensors and JSON values, without pickle, whole or not at all."""

from __future__ import annotations

import hashlib
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
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME

from ..errors import CheckpointError, brief
from ..value.serialization import replace_file

logger = logging.getLogger(__name__)

TENSORS_FILE, JSON_FILE = "metricopt_state.safetensors", "metricopt_state.json"
# The list of what a checkpoint consists of, written when all of it is there; and which of its files are listed.
FILES_FILE = "metricopt_files.json"
HASHED = {".safetensors", ".bin", ".pt", ".pth", ".distcp"}
PARTS = "*/*.distcp"  # of model and optimizer, where FSDP2 saves them as they are shared out
OF_A_RANK = re.compile(r"rng_state_\d+\.pth")
FORMAT_VERSION = 3  # 2: dicts as pairs, lists of tensors; 3: rounds apart, without folds and branches


def save(state: dict[str, Any], folder: str | os.PathLike) -> None:
    """Write `state` into `folder`. The JSON file comes last and vouches for the tensors by their hash."""
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = f"{len(tensors)}{path}"  # numbered, because keys may hold a slash
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # no two share memory
            return {"tensor": name}
        if isinstance(value, dict):  # as pairs, because JSON would make every key a string
            return {"dict": [[key, strip(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)) and any(isinstance(item, (Tensor, dict, list, tuple)) for item in value):
            return {"list": [strip(item, f"{path}/{i}") for i, item in enumerate(value)]}
        return {"value": value}

    tree = strip(state, "")
    blob = save_tensors(tensors)
    document = {"format_version": FORMAT_VERSION, "sha256": hashlib.sha256(blob).hexdigest(), "state": tree}
    text = json.dumps(document)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TENSORS_FILE, blob)
    replace_file(folder / JSON_FILE, text.encode())


def load(folder: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        CheckpointError: a file is missing, cut off, or does not belong to the other.
    """
    folder = Path(folder)

    def fill(node: dict[str, Any]) -> Any:
        if "tensor" in node:
            return tensors[node["tensor"]]
        if "dict" in node:
            return {key: fill(item) for key, item in node["dict"]}
        if "list" in node:
            return [fill(item) for item in node["list"]]
        return node["value"]

    try:
        document = json.loads((folder / JSON_FILE).read_bytes())
        blob = (folder / TENSORS_FILE).read_bytes()
        if document["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / JSON_FILE} has format version {document['format_version']}, this version of metricopt_hf "
                f"reads {FORMAT_VERSION}: resume with the version that saved it, or begin a new run from its weights."
            )
        if hashlib.sha256(blob).hexdigest() != document["sha256"]:
            raise CheckpointError(f"{folder / TENSORS_FILE} is damaged or from another moment than {JSON_FILE}.")
        tensors = load_tensors(blob)
        return fill(document["state"])
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The guidance state in {folder} cannot be read ({type(error).__name__}: {error})."
        ) from error


def vouch(folder: str | os.PathLike) -> None:
    """List what a checkpoint consists of, once all of it is there: the hash of every file that people do not edit.

    JSON files are left out because people edit them; so are other ranks' random states, which may not be written yet.
    """
    folder = Path(folder)
    every = [*folder.iterdir(), *folder.glob(PARTS)]
    files = sorted(path for path in every if path.suffix in HASHED and not OF_A_RANK.fullmatch(path.name))
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    replace_file(folder / FILES_FILE, json.dumps(digests, indent=1).encode())


def check(folder: str | os.PathLike) -> None:
    """Before a resume: is the checkpoint whole, and as it was saved?

    Raises:
        CheckpointError: it was not written to its end, is damaged, or holds no guidance state; names the one before.
    """
    folder = Path(folder)
    if not (folder / JSON_FILE).exists():
        problem = (
            f"holds no guidance state ({JSON_FILE}): it was written by a plain Trainer, with save_only_model, or "
            "not to its end. To start from its weights, load them into the model and begin a new run"
        )
    elif not (folder / TRAINER_STATE_NAME).exists():  # what Trainer writes last
        problem = f"was not written to its end: {TRAINER_STATE_NAME} is missing"
    else:
        with readable(folder):
            load(folder)
        problem = _damage(folder)
    if problem is not None:
        raise CheckpointError(f"{folder} {problem}. {_before(folder)}")


def _damage(folder: Path) -> str | None:
    """What is wrong with the files that are not ours; None where nothing is."""
    try:
        for path in (folder / name for name in (TRAINER_STATE_NAME, CONFIG_NAME, FILES_FILE)):
            if path.exists() and not isinstance(json.loads(path.read_bytes()), dict):
                return f"is damaged: {path.name} holds something else than it should"
    except (ValueError, RecursionError) as error:
        return f"is damaged: {path.name} cannot be read ({type(error).__name__}: {brief(error)})"
    if not (folder / FILES_FILE).exists():  # a process that was killed just before
        empty = [path.name for path in folder.iterdir() if path.suffix in HASHED and not path.stat().st_size]
        return f"is damaged: {', '.join(sorted(empty))} is empty" if empty else None
    for name, digest in json.loads((folder / FILES_FILE).read_bytes()).items():
        if not (folder / name).is_file():
            return f"is not whole: {name} is missing, which was saved with it"
        if _digest(folder / name) != digest:
            return f"is damaged: {name} is not what was saved"
    return None


def _digest(path: Path) -> str:
    """A hash that keeps up with a disk."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written(folder: str | os.PathLike) -> Iterator[None]:
    """Inside, a checkpoint is written: what ends that, such as a full disk, is told with where to go on from."""
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
    except (CheckpointError, OSError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
        if folder is None:
            raise
        raise CheckpointError(
            f"{folder} cannot be read ({type(error).__name__}: {error}). {_before(Path(folder))}"
        ) from error


def _before(folder: Path) -> str:
    """The remedy: the last checkpoint in front of this one."""

    def step(path: Path) -> int:
        number = path.name.removeprefix("checkpoint-")
        return int(number) if number.isdigit() else -1

    earlier = [path for path in folder.parent.glob("checkpoint-*") if 0 <= step(path) < step(folder)]
    return f"Resume from {max(earlier, key=step)}." if earlier else "There is no earlier one beside it; start anew."
