"""Files of strangers: what is not whole, or not what it says, is refused with the reason; nothing is believed."""

import hashlib
import io
import json
import pickle
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import config
from safetensors.torch import load_file, save_file

from metricopt_hf import ValueFunction, ValueFunctionError
from metricopt_hf.evaluation.trajectory import Observation, Trajectory
from metricopt_hf.phi.coordinates import random_directions
from metricopt_hf.value import Signature, fit, serialization

D, K = 12, 4
PHI = {"kind": "Subset", "parameters": [["a.weight", [2, 5]], ["a.bias", [2]]]}


def shared(seed=0):
    """A value function of a run."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(40, K)).astype(np.float32)
    scores = z @ [1.0, -2.0, 0.5, 0.0] + 7
    made = ValueFunction(K, hidden_size=8, num_members=3)
    fit(made, z, scores, np.full(40, np.nan), torch.Generator().manual_seed(seed))
    basis = random_directions(D, K, torch.Generator().manual_seed(seed))
    made.signature = Signature("Linear", PHI, "random", "f1", True, torch.randn(D), basis)
    made.observations = Trajectory(
        [Observation(p, float(s), float("nan"), i // 8, 0.5) for i, (p, s) in enumerate(zip(z, scores, strict=True))]
    )
    return made


@pytest.fixture
def folder(tmp_path):
    shared().save_pretrained(tmp_path)
    return tmp_path


def load(folder):
    return ValueFunction.from_pretrained(folder)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(folder, **changes):
    path = folder / "model.safetensors"
    held = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)
    config(folder, sha256={**json.loads((folder / "config.json").read_text())["sha256"], path.name: digest(path)})


def observations(folder, **changes):
    path = folder / "observations.parquet"
    table = pyarrow.parquet.read_table(path)
    columns = {**{name: table[name] for name in table.column_names}, **changes}
    pyarrow.parquet.write_table(pyarrow.table({n: c for n, c in columns.items() if c is not None}), path)
    vouch(folder)


def vouch(folder):
    """The hashes of what lies there now, as a stranger would write them who means harm."""
    parts = ("model.safetensors", "observations.parquet")
    config(folder, sha256={name: digest(folder / name) for name in parts if (folder / name).exists()})


def test_what_is_written_is_read_again(folder):
    first, second = shared(), load(folder)
    z = torch.randn(5, K)
    for a, b in zip((*first.predict(z), first.gradient(z)), (*second.predict(z), second.gradient(z)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(second.signature.basis, first.signature.basis)
    for name in ("model", "phi", "coordinates", "metric", "greater_is_better"):
        assert getattr(second.signature, name) == getattr(first.signature, name)
    for a, b in zip(first.observations.state_dict().values(), second.observations.state_dict().values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*serialization.MAX_BYTES, "README.md"])


def test_the_config_tells_people_what_it_is_of(folder):
    told, normalised = json.loads((folder / "config.json").read_text()), shared()
    assert told["format_version"] == 7 and told["signature"]["phi"] == PHI
    assert told["signature"]["coordinates"] == "random"
    assert told["signature"]["metric"] == {"name": "f1", "greater_is_better": True}
    assert told["normalisation"]["z_mean"] == normalised.z_mean.tolist()
    assert told["normalisation"]["score_std"] == float(normalised.score_std)
    assert set(load_file(folder / "model.safetensors")) == {"origin", "basis"} | {
        name for name, _ in normalised.named_parameters()
    }


@pytest.mark.parametrize("part", ["model.safetensors", "observations.parquet"])
def test_files_of_two_moments_are_not_taken_for_one(folder, tmp_path, part):
    """A process that is killed while it writes, or a push while a run goes on."""
    shared(seed=1).save_pretrained(tmp_path / "later")
    (folder / part).write_bytes((tmp_path / "later" / part).read_bytes())
    with pytest.raises(ValueFunctionError, match=f"{part} is damaged, or of another moment than config.json"):
        load(folder)


def test_others_can_refit_it_to_its_observations(folder):
    loaded = load(folder)
    seen = loaded.observations
    again = ValueFunction(loaded.num_coordinates)
    fit(again, seen.z, seen.scores, seen.variances, torch.Generator().manual_seed(1))
    assert np.corrcoef(again.predict(torch.as_tensor(seen.z))[0], seen.scores)[0, 1] > 0.9


def test_without_a_run_there_is_no_signature(tmp_path):
    ValueFunction(3).save_pretrained(tmp_path)
    assert load(tmp_path).signature is None and len(load(tmp_path).observations) == 0


def test_a_model_s_folder_holds_it_too(tmp_path):
    shared().save_pretrained(tmp_path / "value_function")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert load(tmp_path).num_coordinates == K


def test_a_card_that_somebody_wrote_stays_and_ours_is_made_anew(folder):
    before = (folder / "README.md").read_text()
    shared().save_pretrained(folder, {"comparison": "as good as new"})
    assert "as good as new" in (folder / "README.md").read_text() != before
    (folder / "README.md").write_text("# Mine")
    shared().save_pretrained(folder, {"comparison": "as good as new"})
    assert (folder / "README.md").read_text() == "# Mine"


NAN = float("nan")
STRANGE = {
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no observations": (lambda f: (f / "observations.parquet").unlink(), "observations.parquet is missing"),
    "another library's config": (lambda f: config(f, library_name="timm"), "not that of a value function"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "JSONDecodeError"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not that of a value function"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "RecursionError|JSONDecodeError"),
    "a later version": (
        lambda f: config(f, format_version=8),
        "format version 8, .* reads 7: pip install --upgrade",
    ),
    "an earlier version": (lambda f: config(f, format_version=5), "format version 5.*Learn it anew with this version"),
    "no version": (lambda f: config(f, format_version=None), "format version None"),
    "a size that is text": (lambda f: config(f, hidden_size="8"), "hidden_size='8'"),
    "a size that is a truth": (lambda f: config(f, num_members=True), "num_members=True"),
    "a huge size": (lambda f: config(f, hidden_size=10**12), "hidden_size=1000000000000 .* to 4096"),
    "huge sizes together": (lambda f: config(f, hidden_size=4096, num_members=256), "more than 536870912 bytes"),
    "a huge phi": (
        lambda f: config(f, signature__phi__parameters=[["a", [2**20, 2**20]]]),
        "more than 536870912 bytes",
    ),
    "an astronomical phi": (lambda f: config(f, signature__phi__parameters=[["a", [2**40]]]), "malformed"),
    "a phi of many dimensions": (lambda f: config(f, signature__phi__parameters=[["a", [1] * 17]]), "malformed"),
    "a shape that is text": (lambda f: config(f, signature__phi__parameters=[["a", "12"]]), "malformed"),
    "coordinates that are a list": (lambda f: config(f, signature__coordinates=["random"]), "malformed"),
    "unknown coordinates": (lambda f: config(f, signature__coordinates="pca"), "malformed"),
    "a heading for a metric": (lambda f: config(f, signature__metric__name="f1\n# Free money"), "malformed"),
    "a long name": (lambda f: config(f, signature__model="x" * 501), "malformed"),
    "an empty name": (lambda f: config(f, signature__model=""), "malformed"),
    "a lone surrogate": (lambda f: config(f, signature__metric__name="\udc80"), "malformed"),
    "a parameter named so": (lambda f: config(f, signature__phi__parameters=[["\udc80", [12]]]), "malformed"),
    "a negative shape": (lambda f: config(f, signature__phi__parameters=[["a", [-12]]]), "malformed"),
    "a signature of text": (lambda f: config(f, signature="anything"), "TypeError"),
    "half a signature": (lambda f: config(f, signature={"model": "Linear"}), "KeyError: 'phi'"),
    "a direction that is text": (lambda f: config(f, signature__metric__greater_is_better="yes"), "malformed"),
    "more coordinates than phi": (
        lambda f: config(f, signature__phi__parameters=[["a", [3]]]),
        "do not fit a phi of 3",
    ),
    "a missing tensor": (lambda f: tensors(f, biases__0=None), "biases.0 is missing"),
    "a missing basis": (lambda f: tensors(f, basis=None), "basis is missing"),
    "a surplus tensor": (lambda f: tensors(f, extra=torch.zeros(2)), "'extra' is surplus"),
    "another shape": (
        lambda f: tensors(f, origin=torch.zeros(D + 1)),
        r"origin is torch.float32 \[13\] instead of \S+ \[12\]",
    ),
    "another type": (
        lambda f: tensors(f, origin=torch.zeros(D).double()),
        r"origin is torch.float64 \[12\] instead of",
    ),
    "nan weights": (lambda f: tensors(f, weights__1=torch.full((3, 8, 8), NAN)), "weights.1 .* not finite"),
    "an infinite origin": (lambda f: tensors(f, origin=torch.full((D,), torch.inf)), "origin .* not finite"),
    "huge weights": (lambda f: tensors(f, weights__1=torch.full((3, 8, 8), 1e38)), "weights.1 .* beyond 1e.15"),
    "weights that overflow": (
        lambda f: tensors(f, weights__0=torch.full((3, K, 8), 1e15), weights__1=torch.full((3, 8, 8), 1e15),
                          weights__2=torch.full((3, 8, 1), 1e15)),
        "predicts .* not finite",
    ),
    "an origin far out": (lambda f: tensors(f, origin=torch.full((D,), -3e38)), "origin .* beyond 1e.15"),
    "a scale of nearly nothing": (lambda f: config(f, normalisation__score_std=1e-44), "score_std .* between"),
    "a scale beyond all": (lambda f: config(f, normalisation__z_std=[1e30] * K), "z_std .* between"),
    "a mean beyond all": (lambda f: config(f, normalisation__score_mean=-3e38), "score_mean .* between"),
    "no hashes": (lambda f: config(f, sha256={}), "KeyError"),
    "no normalisation": (lambda f: config(f, normalisation=None), "TypeError"),
    "half a normalisation": (lambda f: config(f, normalisation={"z_mean": [0.0] * K}), "has not the entries z_mean, "),
    "a mean of another size": (lambda f: config(f, normalisation__z_mean=[0.0]), r"z_mean .* has the shape \[1\]"),
    "a ragged mean": (lambda f: config(f, normalisation__z_mean=[0.0, [0.0]]), "TypeError|ValueError"),
    "a mean of text": (lambda f: config(f, normalisation__score_mean="0.9"), "TypeError"),
    "no mean": (lambda f: config(f, normalisation__score_mean=None), "TypeError|RuntimeError"),
    "an astronomical mean": (lambda f: config(f, normalisation__score_mean=10**400), "whole number of 401 digits"),
    "huge numbers": (
        lambda f: config(f, signature__phi__parameters=[["a", [10**4000] * 50]]),
        "whole number of 4001 digits",
    ),
    "a nan mean": (lambda f: config(f, normalisation__score_mean=NAN), "score_mean .* not finite"),
    "no scale": (lambda f: config(f, normalisation__score_std=0.0), "score_std .* must be positive"),
    "a negative scale": (lambda f: config(f, normalisation__z_std=[1.0, 1.0, 1.0, -1.0]), "z_std .* must be positive"),
    "a basis that stretches": (lambda f: tensors(f, basis=1e3 * torch.eye(D)[:, :K]), "not orthonormal"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "model.safetensors is damaged",
    ),
    "cut off, and vouched for": (
        lambda f: ((f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]), vouch(f)),
        "Safetensor",
    ),
    "a pickle": (lambda f: (torch.save({}, f / "model.safetensors"), vouch(f)), "SafetensorError"),
    "no parquet": (
        lambda f: ((f / "observations.parquet").write_bytes(b"PAR1 no"), vouch(f)),
        "observations cannot be read",
    ),
    "a missing column": (lambda f: observations(f, score=None), "in 7 columns instead of 8"),
    "other coordinates": (lambda f: observations(f, z3=None), "in 7 columns instead of 8"),
    "nan scores": (lambda f: observations(f, score=pyarrow.array([NAN] * 40)), "not finite"),
    "nan coordinates": (lambda f: observations(f, z1=pyarrow.array([NAN] * 40, pyarrow.float32())), "not finite"),
    "missing scores": (lambda f: observations(f, score=pyarrow.array([None] * 40, pyarrow.float64())), "not finite"),
    "another column": (lambda f: observations(f, more=pyarrow.array([0] * 40)), "in 9 columns instead of 8"),
    "huge scores": (lambda f: observations(f, score=pyarrow.array([1e300] * 40)), "observations beyond 1e.15"),
    "text for scores": (lambda f: observations(f, score=pyarrow.array(["a"] * 40)), "another than expected.*string"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_strange_is_refused_with_the_reason_and_a_remedy(folder, what):
    spoil, message = STRANGE[what]
    spoil(folder)
    with pytest.raises(ValueFunctionError, match=f"(?s){message}.*start without it") as refused:
        load(folder)
    assert re.search(re.escape(folder.name), str(refused.value))


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_no_code_that_lies_in_the_folder_is_run(folder, monkeypatch):
    """Neither beside the whole files nor in place of a missing one."""
    monkeypatch.chdir(folder)
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("exploded").exists()
    Path("exploded").unlink()
    for name in ("pytorch_model.bin", "model.pt", "observations.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    config(folder, auto_map={"AutoModel": "modeling.ValueFunction"}, architectures=["ValueFunction"])
    (folder / "modeling.py").write_text('import pathlib; pathlib.Path("exploded").touch()')
    assert load(folder).num_coordinates == K
    for part in ("model.safetensors", "observations.parquet"):
        (folder / part).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueFunctionError):
            load(folder)
        (folder / part).unlink()
        with pytest.raises(ValueFunctionError, match="is missing"):
            load(folder)
        shared().save_pretrained(folder)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("file", serialization.MAX_BYTES)
def test_a_huge_file_is_not_opened(folder, file):
    with open(folder / file, "r+b") as opened:
        opened.truncate(serialization.MAX_BYTES[file] + 1)  # sparse: takes no space
    with pytest.raises(ValueFunctionError, match=f"{file} has .* bytes; at most"):
        load(folder)


@pytest.mark.parametrize(("rows", "k"), [(500_000, 1), (4000, 1000)])
def test_a_bomb_in_the_observations_is_not_unpacked(rows, k):
    """Equal numbers are stored once: a small file may hold ever so many."""
    columns = {f"z{i}": pyarrow.array(np.zeros(rows, np.float32)) for i in range(k)}
    columns.update({name: pyarrow.array(np.zeros(rows)) for name in ("score", "variance")})
    columns["step"] = pyarrow.array(np.zeros(rows, np.int64))
    columns["cost"] = columns["score"]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    content = buffer.getvalue()
    assert len(content) < rows * k / 4
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(ValueFunctionError, match="unpack to more than 16777216 bytes"):
        Trajectory.from_parquet(content, k, max_bytes=2**24)
    assert pyarrow.total_allocated_bytes() - before < 2**24
    assert len(Trajectory.from_parquet(content, k, max_bytes=2**27)) == rows


def test_sizes_are_refused_before_anything_is_allocated(folder):
    config(folder, hidden_size=4096, num_members=7)  # 470 MB, within bounds, but not what the file holds
    tracemalloc.start()
    with pytest.raises(ValueFunctionError, match=r"(weights|biases)\.\d is torch.float32"):
        load(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


NAMES = ["m" * 501, "a\nb", "\u202e", "", "\udc80", "a\u2028b", "\x00", "f1 \u00e9"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_what_is_written_can_be_read_whatever_the_names(tmp_path, name):
    made = shared()
    phi = {"kind": name, "parameters": [[name + ".weight", [2, 5]], ["a.bias", [2]]]}
    made.signature = Signature(name, phi, "random", name, np.True_, made.signature.origin, made.signature.basis)
    made.save_pretrained(tmp_path)
    read = ValueFunction.from_pretrained(tmp_path).signature
    read.check(phi, name, True)
    with pytest.raises(ValueFunctionError, match="judged by"):
        read.check(phi, name + "x", True)
    with pytest.raises(ValueFunctionError, match="another phi space"):
        read.check({**phi, "parameters": [[name + ".weight2", [2, 5]], ["a.bias", [2]]]}, name, True)


@pytest.mark.parametrize("file", [serialization.CONFIG_FILE, serialization.TENSORS_FILE])
def test_what_could_not_be_read_is_not_written(tmp_path, monkeypatch, file):
    monkeypatch.setitem(serialization.MAX_BYTES, file, 100)
    with pytest.raises(ValueFunctionError, match=f"its {file} would have"):
        shared().save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
