"""Files of strangers: what is not whole, or not what it says, is refused with the reason; nothing is believed."""

import hashlib
import json
import pickle
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import config
from safetensors.torch import load_file, save_file

from metricopt_hf import ValueFunction, ValueFunctionError
from metricopt_hf.phi.coordinates import random_directions
from metricopt_hf.value import Signature, fit, serialization

D, K = 12, 4
PHI = {"kind": "Subset", "parameters": [["a.weight", [2, 5]], ["a.bias", [2]]]}


def shared(seed=0):
    """A value function of a run."""
    z = torch.randn(40, K, generator=torch.Generator().manual_seed(seed))
    scores = z @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 7
    made = ValueFunction(K, hidden_size=8, num_members=3)
    fit(made, z, scores, torch.Generator().manual_seed(seed))
    basis = random_directions(D, K, torch.Generator().manual_seed(seed))
    made.signature = Signature("Linear", PHI, "random", "f1", True, torch.randn(D), basis)
    made.observations.extend(z, scores, step=3, seconds=0.5)
    return made


@pytest.fixture
def folder(tmp_path):
    shared().save_pretrained(tmp_path)
    return tmp_path


def load(folder):
    return ValueFunction.from_pretrained(folder)


def tensors(folder, **changes):
    path = folder / "model.safetensors"
    held = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)
    vouch(folder)


def vouch(folder):
    """The hash of what lies there now, as a stranger would write it who means harm."""
    config(folder, sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def test_what_is_written_is_read_again(folder):
    first, second = shared(), load(folder)
    z = torch.randn(5, K)
    for a, b in zip((*first.predict(z), first.gradient(z)), (*second.predict(z), second.gradient(z)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(second.signature.basis, first.signature.basis)
    for name in ("model", "phi", "coordinates", "metric", "greater_is_better"):
        assert getattr(second.signature, name) == getattr(first.signature, name)
    assert len(second.observations) == 40 and torch.equal(second.observations.rows, first.observations.rows)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*serialization.MAX_BYTES, "README.md"])


def test_the_config_tells_people_what_it_is_of(folder):
    told = json.loads((folder / "config.json").read_text())
    assert told["format_version"] == serialization.FORMAT_VERSION and told["num_observations"] == 40
    assert told["signature"]["phi"] == PHI and told["signature"]["coordinates"] == "random"
    assert told["signature"]["metric"] == {"name": "f1", "greater_is_better": True}
    expected = {"origin", "basis", "observations", *shared().state_dict()}
    assert set(load_file(folder / "model.safetensors")) == expected


def test_files_of_two_moments_are_not_taken_for_one(folder, tmp_path):
    """A process that is killed while it writes, or a push while a run goes on."""
    shared(seed=1).save_pretrained(tmp_path / "later")
    (folder / "model.safetensors").write_bytes((tmp_path / "later" / "model.safetensors").read_bytes())
    with pytest.raises(ValueFunctionError, match="model.safetensors is damaged, or of another moment than config.json"):
        load(folder)


def test_others_can_refit_it_to_its_observations(folder):
    loaded = load(folder)
    seen = loaded.observations
    again = ValueFunction(loaded.num_coordinates)
    fit(again, seen.z, seen.scores, torch.Generator().manual_seed(1))
    assert np.corrcoef(again.predict(seen.z)[0], seen.scores)[0, 1] > 0.9


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
    "another library's config": (lambda f: config(f, library_name="timm"), "not that of a value function"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "JSONDecodeError"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not that of a value function"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "RecursionError|JSONDecodeError"),
    "a later version": (
        lambda f: config(f, format_version=serialization.FORMAT_VERSION + 1),
        "format version 9, .* reads 8: pip install --upgrade",
    ),
    "an earlier version": (lambda f: config(f, format_version=5), "format version 5.*learn it anew with this version"),
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
    "a scale of nearly nothing": (lambda f: tensors(f, score_std=torch.tensor(1e-30)), "score_std .* at least 1e-15"),
    "a scale beyond all": (lambda f: tensors(f, z_std=torch.full((K,), 1e30)), "z_std .* beyond 1e.15"),
    "a mean beyond all": (lambda f: tensors(f, score_mean=torch.tensor(-3e38)), "score_mean .* beyond 1e.15"),
    "no hash": (lambda f: config(f, sha256=None), "damaged"),
    "an astronomical number": (lambda f: config(f, num_observations=10**400), "whole number of 401 digits"),
    "a huge number of observations": (lambda f: config(f, num_observations=2**28), "more than 536870912 bytes"),
    "observations that are not there": (lambda f: config(f, num_observations=41), r"instead of \S+ \[41, 7\]"),
    "fewer than none": (lambda f: config(f, num_observations=-1), "num_observations=-1"),
    "nan observations": (lambda f: tensors(f, observations=torch.full((40, K + 3), NAN)), "observations .* not finite"),
    "a mean of another size": (lambda f: tensors(f, z_mean=torch.zeros(1)), r"z_mean is \S+ \[1\]"),
    "huge numbers": (
        lambda f: config(f, signature__phi__parameters=[["a", [10**4000] * 50]]),
        "whole number of 4001 digits",
    ),
    "a nan mean": (lambda f: tensors(f, score_mean=torch.tensor(NAN)), "score_mean .* not finite"),
    "no scale": (lambda f: tensors(f, score_std=torch.tensor(0.0)), "score_std .* must be positive"),
    "a negative scale": (lambda f: tensors(f, z_std=torch.tensor([1.0, 1, 1, -1])), "z_std .* must be positive"),
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
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueFunctionError):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueFunctionError, match="is missing"):
        load(folder)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("file", serialization.MAX_BYTES)
def test_a_huge_file_is_not_opened(folder, file):
    with open(folder / file, "r+b") as opened:
        opened.truncate(serialization.MAX_BYTES[file] + 1)  # sparse: takes no space
    with pytest.raises(ValueFunctionError, match=f"{file} has .* bytes; at most"):
        load(folder)


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
