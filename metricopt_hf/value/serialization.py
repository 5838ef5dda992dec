"""The files of a shared value function. A stranger's files are checked before they are believed.

A folder holds

    config.json            format version, sizes, number of observations; the signature: metric and direction, phi space
                           and coordinates; and the hash of the next, so that files of two saves do not pass for one
    model.safetensors      weights and standardisation, origin phi_0 and basis Q, and the observations that it was
                           fitted to, so that others can refit; all float32
    README.md              the card, for people; not read

No file can hold code. `read` checks a file's size before it reads it, its hash before it parses it, and each number of
the config before it computes anything from it. No run fails on the numbers that pass.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from ..phi.coordinates import GIVEN, JACOBIAN, LOSS, RANDOM
from .signature import MAX_NAME, Signature
from .trajectory import Trajectory

CONFIG_FILE, TENSORS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
# 8: observations are among the tensors; 7: phi sets parameters that the model has, and inserts none
LIBRARY, FORMAT_VERSION = "metricopt_hf", 8
KINDS = (JACOBIAN, LOSS, RANDOM, GIVEN)

# The most that is accepted from a stranger: bytes of a file, each of the sizes in a config, dimensions of a parameter.
MAX_BYTES = {CONFIG_FILE: 2**20, TENSORS_FILE: 2**29}
MAX_SIZES = {"num_coordinates": 2**13, "hidden_size": 2**12, "num_members": 2**8}
MAX_DIMS = 16
LARGEST, SMALLEST = 1e15, 1e-15  # a number, and a divisor: squares and quotients still fit into float32
DIVISORS = ("z_std", "score_std")
ORTHONORMAL_TOLERANCE = 1e-3  # for rounding in the columns of a basis

REMEDY = "Take another copy or revision of it, or start without it."


def write(
    folder: str | os.PathLike,
    sizes: Mapping[str, int],
    state: Mapping[str, Tensor],
    signature: Signature | None,
    observations: Trajectory,
) -> None:
    """Write config and tensors; each file whole or not at all.

    Raises:
        ValueFunctionError: a file would be larger than `read` accepts; nothing is written.
    """
    rows = observations.rows.reshape(len(observations), sizes["num_coordinates"] + 3)
    tensors, described = {**state, "observations": rows}, None
    if signature is not None:
        tensors.update(origin=signature.origin, basis=signature.basis)
        metric = {"name": signature.metric, "greater_is_better": signature.greater_is_better}
        described = {name: getattr(signature, name) for name in ("model", "phi", "coordinates")} | {"metric": metric}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    contents = {TENSORS_FILE: save_tensors(tensors, metadata={"format": "pt"})}
    config = {
        "library_name": LIBRARY,
        "format_version": FORMAT_VERSION,
        **sizes,
        "num_observations": len(observations),
        "signature": described,
        "sha256": hashlib.sha256(contents[TENSORS_FILE]).hexdigest(),
    }
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
        name: the name that the user gave, for messages.

    Raises:
        ValueFunctionError: a file is missing, damaged, too large, of another version, or contradicts itself.
    """
    folder = Path(folder)
    for file in MAX_BYTES:
        check_file(name, file, (folder / file).stat().st_size if (folder / file).is_file() else None)
    try:
        config = _read_config((folder / CONFIG_FILE).read_bytes())
        sizes = {size: config[size] for size in MAX_SIZES}
        shapes = {**_shapes(config), **_signature_shapes(config)}
        content = (folder / TENSORS_FILE).read_bytes()
        # before any of it is parsed: a file that was damaged on its way is nothing for a parser
        if hashlib.sha256(content).hexdigest() != config["sha256"]:
            raise ValueFunctionError(f"{TENSORS_FILE} is damaged, or of another moment than {CONFIG_FILE}.")
        tensors = _read_tensors(content, shapes)
        observations = Trajectory(tensors.pop("observations"))
        signature = _signature(config, tensors.pop("origin", None), tensors.pop("basis", None))
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
    """Write a file whole: first to one beside it, so that a crash or an upload meanwhile finds the old or the new one.

    Links under either name are replaced, and not followed.
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


def _read_config(content: bytes) -> dict[str, Any]:
    config = json.loads(content.decode("utf-8"), parse_int=_whole_number)
    if not isinstance(config, dict) or config.get("library_name") != LIBRARY:
        raise ValueFunctionError(f"{CONFIG_FILE} is not that of a value function of {LIBRARY}.")
    if (version := config.get("format_version")) != FORMAT_VERSION:
        earlier = version in range(1, FORMAT_VERSION)
        remedy = "learn it anew with this version" if earlier else f"pip install --upgrade {LIBRARY}"
        raise ValueFunctionError(
            f"it has format version {brief(version)}, this version of {LIBRARY} reads {FORMAT_VERSION}: {remedy}."
        )
    most = {**MAX_SIZES, "num_observations": MAX_BYTES[TENSORS_FILE]}
    for name, size in ((name, config.get(name)) for name in most):
        least = 0 if name == "num_observations" else 1
        if type(size) is not int or not least <= size <= most[name]:
            raise ValueFunctionError(
                f"{name}={brief(size)} in {CONFIG_FILE} is no whole number from {least} to {most[name]}."
            )
    return config


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the ensemble, and of the observations."""
    k, hidden, members = (config[size] for size in MAX_SIZES)
    layers = list(enumerate(((k, hidden), (hidden, hidden), (hidden, 1))))
    return {
        **{f"weights.{i}": (members, inputs, outputs) for i, (inputs, outputs) in layers},
        **{f"biases.{i}": (members, 1, outputs) for i, (_, outputs) in layers},
        "slopes": (members, k, 1),
        "intercepts": (members, 1, 1),
        **{name: (k,) for name in ("z_mean", "z_std")},
        **{name: () for name in ("score_mean", "score_std", "noise_std")},
        "observations": (config["num_observations"], k + 3),
    }


def _signature_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of origin and basis, from a signature whose every entry has been checked."""
    signature, k = config["signature"], config["num_coordinates"]
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
    dim = sum(math.prod(shape) for _, shape in rows)
    if k > dim:
        raise ValueFunctionError(f"{k} coordinates do not fit a phi of {dim} numbers.")
    return {"origin": (dim,), "basis": (dim, k)}


def _is_name(value: Any) -> bool:
    """Whether a value is one printable line of bounded length, without lone surrogates."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _read_tensors(content: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if 4 * sum(map(math.prod, shapes.values())) > MAX_BYTES[TENSORS_FILE]:
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
    if bad := [name for name in DIVISORS if (tensors[name] < SMALLEST).any()]:
        raise ValueFunctionError(f"{', '.join(bad)} in {TENSORS_FILE} must be positive, and at least {SMALLEST:g}.")
    basis = tensors.get("basis", torch.zeros(0, 0))
    if not torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=ORTHONORMAL_TOLERANCE):
        raise ValueFunctionError(f"the columns of basis in {TENSORS_FILE} are not orthonormal.")
    return tensors


def _signature(config: Mapping[str, Any], origin: Tensor | None, basis: Tensor | None) -> Signature | None:
    if (signature := config["signature"]) is None:
        return None
    phi = {name: signature["phi"][name] for name in ("kind", "parameters")}
    metric = signature["metric"]["name"], signature["metric"]["greater_is_better"]
    return Signature(signature["model"], phi, signature["coordinates"], *metric, origin, basis)
