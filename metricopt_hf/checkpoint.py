"""State on disk: nested dicts of tensors and JSON values, without pickle, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .errors import CheckpointError

TENSORS_FILE, JSON_FILE = "metricopt_state.safetensors", "metricopt_state.json"


def save(state: dict[str, Any], folder: str | os.PathLike) -> None:
    """Write `state` into `folder`. The JSON file comes last and vouches for the tensors by their hash."""
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous()
            return {"tensor": path}
        if isinstance(value, dict):
            return {"dict": {key: strip(item, f"{path}/{key}") for key, item in value.items()}}
        return {"value": value}

    tree = strip(state, "")
    blob = save_tensors(tensors)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TENSORS_FILE, blob)
    document = {"format_version": 1, "sha256": hashlib.sha256(blob).hexdigest(), "state": tree}
    _write(folder / JSON_FILE, json.dumps(document).encode())


def load(folder: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        CheckpointError: a file is missing, cut off, or does not belong to the other.
    """
    folder = Path(folder)
    try:
        document = json.loads((folder / JSON_FILE).read_bytes())
        blob = (folder / TENSORS_FILE).read_bytes()
        if document["format_version"] != 1:
            raise CheckpointError(
                f"{folder / JSON_FILE} has format version {document['format_version']}, this version of metricopt_hf "
                "reads 1."
            )
        if hashlib.sha256(blob).hexdigest() != document["sha256"]:
            raise CheckpointError(f"{folder / TENSORS_FILE} is damaged or from another moment than {JSON_FILE}.")
        tensors = load_tensors(blob)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The guidance state in {folder} cannot be read ({type(error).__name__}: {error}). "
            "Resume from the checkpoint before it."
        ) from error

    def fill(node: dict[str, Any]) -> Any:
        if "tensor" in node:
            return tensors[node["tensor"]]
        if "dict" in node:
            return {key: fill(item) for key, item in node["dict"].items()}
        return node["value"]

    return fill(document["state"])


def _write(path: Path, content: bytes) -> None:
    """Write to a file beside it first: a process that dies leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
