"""The files of a shared value function, and how a stranger's are read: checked before they are believed.

A folder holds

    config.json            format version, sizes, normalisation; the signature: metric and direction, phi space and
                           coordinates; and the hashes of the next two, so that files of two saves do not pass for one
    model.safetensors      weights, origin phi_0 and basis Q, all float32
    observations.parquet   what it was fitted to, so that others can refit: see `Trajectory.to_parquet`
    README.md              the card, for people; not read

No file can hold code. A file's size is checked before it is read, its hash before it is parsed, and each
number of the config before anything is computed from it. What passes lies in bounds within which no run fails on it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import ValueFunctionError, brief
from ..evaluation.trajectory import LARGEST, Trajectory
from ..phi.coordinates import GIVEN, JACOBIAN, LOSS, RANDOM
from .signature import MAX_NAME, Signature

CONFIG_FILE, TENSORS_FILE, OBSERVATIONS_FILE = "config.json", "model.safetensors", "observations.parquet"
CARD_FILE = "README.md"
# 7: over parameters that the model has; earlier ones are over parameters that were inserted into it, or over behaviour
LIBRARY, FORMAT_VERSION = "metricopt_hf", 7
KINDS = (JACOBIAN, LOSS, RANDOM, GIVEN)

# The most that is accepted from a stranger: bytes of a file, and each of the sizes in a config.
MAX_BYTES = {CONFIG_FILE: 2**20, TENSORS_FILE: 2**29, OBSERVATIONS_FILE: 2**28}
MAX_SIZES = {"num_coordinates": 2**13, "hidden_size": 2**12, "num_members": 2**8}
# The same for shapes: dimensions of a parameter. Names have `MAX_NAME` characters.
MAX_DIMS = 16
# The smallest divisor: with `LARGEST`, quotients still fit into float32.
SMALLEST = 1e-15
# What standardises z and the score, and the metric's own noise: plain numbers, for people to read, so in the config.
NORMALISATION = ("z_mean", "z_std", "score_mean", "score_std", "noise_std")
# How far the columns of a basis may be from orthonormal: rounding, not another scale.
ORTHONORMAL_TOLERANCE = 1e-3

REMEDY = "Take another copy or revision of it, or start without it."


def network_shapes(num_coordinates: int, hidden_size: int, num_members: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the ensemble."""
    sizes = [num_coordinates, hidden_size, hidden_size, 1]
    layers = list(enumerate(zip(sizes[:-1], sizes[1:], strict=True)))
    return {
        **{f"weights.{i}": (num_members, inputs, outputs) for i, (inputs, outputs) in layers},
        **{f"biases.{i}": (num_members, 1, outputs) for i, (_, outputs) in layers},
        "slopes": (num_members, num_coordinates, 1),
        "intercepts": (num_members, 1, 1),
    }


def write(
    folder: str | os.PathLike,
    sizes: Mapping[str, int],
    state: Mapping[str, Tensor],
    signature: Signature | None,
    observations: Trajectory,
) -> None:
    """Write config, tensors and observations; each file whole or not at all.

    Raises:
        ValueFunctionError: a file would be larger than `read` accepts; nothing is written.
    """
    tensors = dict(state)
    normalisation = {name: tensors.pop(name).tolist() for name in NORMALISATION}
    config: dict[str, Any] = {"library_name": LIBRARY, "format_version": FORMAT_VERSION, **sizes}
    config.update(normalisation=normalisation, signature=None)
    if signature is not None:
        tensors.update(origin=signature.origin, basis=signature.basis)
        config["signature"] = {
            "model": signature.model,
            "phi": signature.phi,
            "coordinates": signature.coordinates,
            "metric": {"name": signature.metric, "greater_is_better": signature.greater_is_better},
        }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    contents = {
        TENSORS_FILE: save_tensors(tensors, metadata={"format": "pt"}),
        OBSERVATIONS_FILE: observations.to_parquet(),
    }
    config["sha256"] = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    contents[CONFIG_FILE] = (json.dumps(config, indent=2) + "\n").encode()
    for file, content in contents.items():
        if len(content) > MAX_BYTES[file]:
            raise ValueFunctionError(
                f"The value function is not saved: its {file} would have {len(content)} bytes, and at most "
                f"{MAX_BYTES[file]} are read. Tune fewer parameters (`phi`), or in fewer coordinates (`phi_dim`)."
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        replace_file(folder / file, content)


def read(
    folder: str | os.PathLike, name: str
) -> tuple[dict[str, int], dict[str, Tensor], Signature | None, Trajectory]:
    """Sizes, state, signature and observations of a value function in a folder, or nothing at all.

    Args:
        name: by which it was asked for, for messages.

    Raises:
        ValueFunctionError: a file is missing, damaged, too large, of another version, or contradicts itself.
    """
    folder = Path(folder)
    for file in MAX_BYTES:
        check_file(name, file, (folder / file).stat().st_size if (folder / file).is_file() else None)
    try:
        contents = {file: (folder / file).read_bytes() for file in MAX_BYTES}
        sizes, config = _read_config(contents[CONFIG_FILE])
        # before any of it is parsed: a file that was damaged on its way is nothing for a parser
        for file in (TENSORS_FILE, OBSERVATIONS_FILE):
            if hashlib.sha256(contents[file]).hexdigest() != config["sha256"][file]:
                raise ValueFunctionError(f"{file} is damaged, or of another moment than {CONFIG_FILE}.")
        shapes = {**network_shapes(**sizes), **_signature_shapes(config, sizes["num_coordinates"])}
        tensors = {**_read_tensors(contents[TENSORS_FILE], shapes), **_normalisation(config, sizes["num_coordinates"])}
        signature = _signature(config, tensors.pop("origin", None), tensors.pop("basis", None))
        observations = Trajectory.from_parquet(
            contents[OBSERVATIONS_FILE], sizes["num_coordinates"], MAX_BYTES[OBSERVATIONS_FILE]
        )
    except ValueFunctionError as error:
        raise ValueFunctionError(f"{name}: {error} {REMEDY}") from error
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, SafetensorError) as error:
        raise ValueFunctionError(f"{name} cannot be read ({type(error).__name__}: {brief(error)}). {REMEDY}") from error
    return sizes, tensors, signature, observations


def check_file(name: str, file: str, size: int | None) -> None:
    """Refuse a value function that lacks a file (its size is None), or whose file is too large to be read."""
    if size is None:
        raise ValueFunctionError(f"{name} holds no whole value function: {file} is missing. {REMEDY}")
    if size > (most := MAX_BYTES[os.path.basename(file)]):
        raise ValueFunctionError(f"{name}: {file} has {size} bytes; at most {most} are read. {REMEDY}")


def replace_file(path: Path, content: bytes) -> None:
    """Write to a file beside it first: a process that dies, or an upload meanwhile, finds the old file or the new.

    Nothing is written through a link that lies under either name: the one is made here, and the other replaced.
    """
    temporary = path.with_name(f"_{path.name}.tmp")  # Trainer's pushes leave out what begins with an underscore
    with suppress(FileNotFoundError):  # left by a process that was killed, or planted
        os.unlink(temporary)
    with open(temporary, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _whole_number(digits: str) -> int:
    """A stranger's integer: without a bound, multiplying a few takes minutes."""
    if len(digits) > 16:
        raise ValueFunctionError(f"{CONFIG_FILE} holds a whole number of {len(digits)} digits.")
    return int(digits)


def _read_config(content: bytes) -> tuple[dict[str, int], dict[str, Any]]:
    config = json.loads(content.decode("utf-8"), parse_int=_whole_number)
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise ValueFunctionError(f"{CONFIG_FILE} is not that of a value function of {LIBRARY}.")
    if (version := config.get("format_version")) != FORMAT_VERSION:
        if version in range(1, FORMAT_VERSION):
            remedy = "that one is over parameters that are not inserted any more. Learn it anew with this version."
        else:
            remedy = f"pip install --upgrade {LIBRARY}."
        raise ValueFunctionError(
            f"it has format version {brief(version)}, this version of {LIBRARY} reads {FORMAT_VERSION}: {remedy}"
        )
    sizes = {name: config.get(name) for name in MAX_SIZES}
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= MAX_SIZES[name]:
            raise ValueFunctionError(
                f"{name}={brief(size)} in {CONFIG_FILE} is no whole number from 1 to {MAX_SIZES[name]}."
            )
    return sizes, config


def _normalisation(config: Mapping[str, Any], num_coordinates: int) -> dict[str, Tensor]:
    given = config["normalisation"]
    if set(given) != set(NORMALISATION):
        raise ValueFunctionError(f"normalisation in {CONFIG_FILE} has not the entries {', '.join(NORMALISATION)}.")
    tensors = {}
    for name in NORMALISATION:
        tensor = torch.tensor(given[name], dtype=torch.float32)
        if tensor.shape != ((num_coordinates,) if name in ("z_mean", "z_std") else ()):
            raise ValueFunctionError(f"{name} in {CONFIG_FILE} has the shape {list(tensor.shape)}.")
        if not tensor.isfinite().all():
            raise ValueFunctionError(f"{name} in {CONFIG_FILE} is not finite.")
        if name in ("z_std", "score_std") and (tensor <= 0).any():
            raise ValueFunctionError(f"{name} in {CONFIG_FILE} must be positive.")
        if (tensor.abs() > LARGEST).any() or (name in ("z_std", "score_std") and (tensor < SMALLEST).any()):
            raise ValueFunctionError(f"{name} in {CONFIG_FILE} is not between {SMALLEST:g} and {LARGEST:g} in size.")
        tensors[name] = tensor
    return tensors


def _signature_shapes(config: Mapping[str, Any], num_coordinates: int) -> dict[str, tuple[int, ...]]:
    """Shapes of origin and basis, from a signature whose every entry has been checked."""
    signature = config["signature"]
    if signature is None:
        return {}
    phi, coordinates, metric = signature["phi"], signature["coordinates"], signature["metric"]
    strings = [signature["model"], phi["kind"], metric["name"]]
    rows = [(name, shape) for name, shape in phi["parameters"]]
    dims = [d for _, shape in rows for d in shape]
    fine = all(_is_name(s) for s in strings + [name for name, _ in rows]) and coordinates in KINDS
    fine &= type(metric["greater_is_better"]) is bool and all(type(shape) is list for _, shape in rows)
    fine &= all(type(d) is int and 0 <= d <= MAX_BYTES[TENSORS_FILE] for d in dims)
    fine &= max((len(shape) for _, shape in rows), default=0) <= MAX_DIMS
    if not fine or not rows:
        raise ValueFunctionError(f"the signature in {CONFIG_FILE} is malformed.")
    dim = sum(_product(shape) for _, shape in rows)
    if num_coordinates > dim:
        raise ValueFunctionError(f"{num_coordinates} coordinates do not fit a phi of {dim} numbers.")
    return {"origin": (dim,), "basis": (dim, num_coordinates)}


def _is_name(value: Any) -> bool:
    """A text that can be shown and written: in a line, of bounded length, without lone surrogates."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _read_tensors(content: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if 4 * sum(_product(shape) for shape in shapes.values()) > MAX_BYTES[TENSORS_FILE]:
        raise ValueFunctionError(f"the sizes in {CONFIG_FILE} ask for more than {MAX_BYTES[TENSORS_FILE]} bytes.")
    tensors = load_tensors(content)
    wrong = [
        *(f"{name} is missing" for name in shapes if name not in tensors),
        *(f"{brief(name)} is surplus" for name in tensors if name not in shapes),
        *(
            f"{name} is {tensor.dtype} {list(tensor.shape)} instead of {torch.float32} {list(shapes[name])}"
            for name, tensor in tensors.items()
            if name in shapes and (tensor.shape, tensor.dtype) != (shapes[name], torch.float32)
        ),
    ]
    if wrong:
        raise ValueFunctionError(f"{TENSORS_FILE} is not what {CONFIG_FILE} says: {'; '.join(wrong[:5])}.")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueFunctionError(f"{', '.join(bad)} in {TENSORS_FILE} holds numbers that are not finite.")
    if bad := [name for name, tensor in tensors.items() if (tensor.abs() > LARGEST).any()]:
        raise ValueFunctionError(f"{', '.join(bad)} in {TENSORS_FILE} holds numbers beyond {LARGEST:g}.")
    if "basis" in tensors:
        basis = tensors["basis"]
        if not torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=ORTHONORMAL_TOLERANCE):
            raise ValueFunctionError(f"the columns of basis in {TENSORS_FILE} are not orthonormal.")
    return tensors


def _signature(config: Mapping[str, Any], origin: Tensor | None, basis: Tensor | None) -> Signature | None:
    if (signature := config["signature"]) is None:
        return None
    phi = {name: signature["phi"][name] for name in ("kind", "parameters")}
    metric = signature["metric"]["name"], signature["metric"]["greater_is_better"]
    return Signature(signature["model"], phi, signature["coordinates"], *metric, origin, basis)
