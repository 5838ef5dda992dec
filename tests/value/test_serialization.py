"""Files of strangers: what is not whole, or not what it says, is refused with the reason; nothing is believed."""

import hashlib
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
from safetensors.torch import load_file, save_file
from test_trainer import bert_trainer, quadratic_trainer

from metricopt_hf import (
    ConfigurationError,
    Metric,
    Observation,
    Trajectory,
    ValueFunction,
    ValueFunctionError,
    ValueFunctionGuide,
)
from metricopt_hf.guides.trust import NOT_PREDICTIVE
from metricopt_hf.phi import Coordinates, random_basis
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
    basis = random_basis(D, K, torch.Generator().manual_seed(seed))
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


def config(folder, **changes):
    path = folder / "config.json"
    document = json.loads(path.read_text())
    for name, value in changes.items():
        node, *keys = document, *name.split("__")
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
    path.write_text(json.dumps(document))


def tensors(folder, **changes):
    path = folder / "model.safetensors"
    held = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)
    config(folder, sha256={**json.loads((folder / "config.json").read_text())["sha256"], path.name: digest(path)})


def observations(folder, **changes):
    path = folder / "observations.parquet"
    table = pyarrow.parquet.read_table(path)
    columns = {name: changes.get(name, table[name]) for name in table.column_names}
    pyarrow.parquet.write_table(pyarrow.table({n: c for n, c in columns.items() if c is not None}), path)


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
    assert told["format_version"] == 2 and told["signature"]["phi"] == PHI
    assert told["signature"]["coordinates"] == {"kind": "random", "identity": False}
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
    shared().save_pretrained(folder, {"rank_correlation": 0.875, "trust": 0.5})
    assert "0.875" in (folder / "README.md").read_text() != before
    (folder / "README.md").write_text("# Mine")
    shared().save_pretrained(folder, {"rank_correlation": 0.875})
    assert (folder / "README.md").read_text() == "# Mine"


NAN = float("nan")
STRANGE = {
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no observations": (lambda f: (f / "observations.parquet").unlink(), "observations.parquet is missing"),
    "another library's config": (lambda f: config(f, library_name="timm"), "not that of a value function"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "JSONDecodeError"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "not that of a value function"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "RecursionError|JSONDecodeError"),
    "a later version": (lambda f: config(f, format_version=3), "format version 3, .* reads 2: pip install --upgrade"),
    "no version": (lambda f: config(f, format_version=None), "format version None"),
    "a size that is text": (lambda f: config(f, hidden_size="8"), "hidden_size='8'"),
    "a size that is a truth": (lambda f: config(f, num_members=True), "num_members=True"),
    "a huge size": (lambda f: config(f, hidden_size=10**12), "hidden_size=1000000000000 .* to 4096"),
    "huge sizes together": (lambda f: config(f, hidden_size=4096, num_members=256), "more than 536870912 bytes"),
    "a huge phi": (
        lambda f: config(f, signature__phi__parameters=[["a", [2**40, 2**40]]]),
        "more than 536870912 bytes",
    ),
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
    "a surplus tensor": (lambda f: tensors(f, extra=torch.zeros(2)), "extra is surplus"),
    "another shape": (lambda f: tensors(f, origin=torch.zeros(D + 1)), r"origin is F32 \[13\] instead of F32 \[12\]"),
    "another type": (lambda f: tensors(f, origin=torch.zeros(D).double()), r"origin is F64 \[12\] instead of F32"),
    "nan weights": (lambda f: tensors(f, weights__1=torch.full((3, 8, 8), NAN)), "weights.1 .* not finite"),
    "an infinite origin": (lambda f: tensors(f, origin=torch.full((D,), torch.inf)), "origin .* not finite"),
    "weights that overflow": (lambda f: tensors(f, weights__1=torch.full((3, 8, 8), 1e38)), "predicts .* not finite"),
    "no hashes": (lambda f: config(f, sha256={}), "KeyError"),
    "no normalisation": (lambda f: config(f, normalisation=None), "TypeError"),
    "half a normalisation": (lambda f: config(f, normalisation={"z_mean": [0.0] * K}), "has not the entries z_mean, "),
    "a mean of another size": (lambda f: config(f, normalisation__z_mean=[0.0]), r"z_mean .* has the shape \[1\]"),
    "a ragged mean": (lambda f: config(f, normalisation__z_mean=[0.0, [0.0]]), "TypeError|ValueError"),
    "a mean of text": (lambda f: config(f, normalisation__score_mean="0.9"), "TypeError"),
    "no mean": (lambda f: config(f, normalisation__score_mean=None), "TypeError|RuntimeError"),
    "an astronomical mean": (lambda f: config(f, normalisation__score_mean=10**400), "OverflowError|RuntimeError"),
    "a nan mean": (lambda f: config(f, normalisation__score_mean=NAN), "score_mean .* not finite"),
    "no scale": (lambda f: config(f, normalisation__score_std=0.0), "score_std .* must be positive"),
    "a negative scale": (lambda f: config(f, normalisation__z_std=[1.0, 1.0, 1.0, -1.0]), "z_std .* must be positive"),
    "a basis that stretches": (lambda f: tensors(f, basis=1e3 * torch.eye(D)[:, :K]), "not orthonormal"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "Safetensor",
    ),
    "a pickle": (lambda f: torch.save({}, f / "model.safetensors"), "SafetensorError"),
    "no parquet": (lambda f: (f / "observations.parquet").write_bytes(b"PAR1 no"), "observations cannot be read"),
    "a missing column": (lambda f: observations(f, score=None), "observations cannot be read"),
    "other coordinates": (lambda f: observations(f, z=pyarrow.array([[0.0]] * 40)), "coordinates instead of 4"),
    "nan scores": (lambda f: observations(f, score=pyarrow.array([NAN] * 40)), "not finite"),
    "text for scores": (lambda f: observations(f, score=pyarrow.array(["a"] * 40)), "observations cannot be read"),
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


@pytest.mark.parametrize(("rows", "k"), [(100_000, 1), (1000, 4000)])
def test_a_bomb_in_the_observations_is_not_unpacked(folder, rows, k):
    """Equal numbers are stored once: a small file may hold ever so many."""
    values = pyarrow.array(np.zeros(rows * k, np.float32))
    table = pyarrow.table(
        {
            "z": pyarrow.ListArray.from_arrays(np.arange(0, rows * k + 1, k, dtype=np.int32), values),
            "score": pyarrow.array(np.zeros(rows)),
            "variance": pyarrow.array(np.zeros(rows)),
            "step": pyarrow.array(np.zeros(rows, np.int64)),
            "cost": pyarrow.array(np.zeros(rows)),
            "fold": pyarrow.array(np.zeros(rows, np.int64)),
        }
    )
    path = folder / "observations.parquet"
    pyarrow.parquet.write_table(table, path)
    stored = pyarrow.parquet.read_metadata(path).row_group(0).total_byte_size
    assert stored < 2**17 and path.stat().st_size < 2**17
    with pytest.raises(ValueFunctionError, match="unpack to .* bytes; at most 16777216"):
        Trajectory.from_parquet(path, k, max_bytes=2**24)
    assert len(Trajectory.from_parquet(path, k, max_bytes=2**27)) == rows


def test_sizes_are_refused_before_anything_is_allocated(folder):
    config(folder, hidden_size=4096, num_members=7)  # 470 MB, within bounds, but not what the file holds
    tracemalloc.start()
    with pytest.raises(ValueFunctionError, match="weights.0 is F32"):
        load(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


# ---- in a run


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Folder of a value function that knows the quadratic toy."""
    folder = tmp_path_factory.mktemp("learned")
    # a weight of its own, so that what it has seen, and how well it fits that, does not hang on the default
    settings = {"value_weight": 3.0, "perturbation_std": 0.3, "metric_call_budget": None, "observe_steps": 4}
    run = quadratic_trainer(folder, max_steps=40, **settings)
    run.train()
    run.save_model()
    return folder / "value_function"


@pytest.fixture(scope="module")
def loss_only(tmp_path_factory):
    run = quadratic_trainer(tmp_path_factory.mktemp("loss"), value_weight=0, max_steps=24)
    run.train()
    return run


def warm(tmp_path, start, **kwargs):
    settings = {"max_steps": 24, "perturbation_std": 0.3, "metric_call_budget": None, "observe_steps": 4}
    return quadratic_trainer(tmp_path, value_function_name_or_path=str(start), **{**settings, **kwargs})


def test_a_second_run_trusts_it_from_the_first_round(tmp_path, learned):
    second = warm(tmp_path, learned, seed=7)
    second.train()
    assert second.phase.curve[0]["trust"] > 0.3
    assert len(second.observations) == 48
    assert torch.equal(second.value_function.z_mean, load(learned).z_mean)  # what its weights were learned in
    assert not torch.equal(second.value_function.weights[0], load(learned).weights[0])


def test_learning_on_does_not_spoil_it(learned):
    """A new round is narrower and lies elsewhere; standardised anew, the same weights would be another function."""
    given = load(learned)
    seen = given.observations
    z, scores = seen.z[-8:], seen.scores[-8:]

    def error(function):
        return float(np.mean((function.predict(torch.as_tensor(seen.z))[0].numpy() - seen.scores) ** 2))

    before = error(given)
    fit(given, z, scores, seen.variances[-8:], torch.Generator().manual_seed(0), steps=1, standardise=False)
    assert error(given) < 1.5 * before
    anew = load(learned)
    fit(anew, z, scores, seen.variances[-8:], torch.Generator().manual_seed(0), steps=1)
    assert error(anew) > 3 * before


def turned_round(folder, learned):
    """Predicts the opposite."""
    wrong = load(learned)
    with torch.no_grad():
        wrong.weights[-1].neg_()
        wrong.biases[-1].neg_()
    wrong.save_pretrained(folder)


def says_nothing(folder, learned):
    """Predicts the same everywhere."""
    constant = load(learned)
    with torch.no_grad():
        constant.weights[-1].zero_()
    constant.save_pretrained(folder)


def at_random(folder, learned):
    useless = load(learned)
    useless.reset_parameters(torch.Generator().manual_seed(3))
    useless.save_pretrained(folder)


@pytest.mark.parametrize("spoil", [turned_round, says_nothing])
def test_one_that_misleads_is_not_followed(tmp_path, learned, loss_only, spoil, monkeypatch):
    """As long as it has learned nothing here, the run is that of the loss alone, to the bit."""
    monkeypatch.setattr("metricopt_hf.guides.base.fit", lambda *args, **kwargs: None)
    spoil(tmp_path / "shared", learned)
    misled = warm(tmp_path, tmp_path / "shared")
    misled.train()
    trusts = [(row["trust"], row["reason"]) for row in misled.phase.curve if row["trust"] is not None]
    assert trusts == [(0.0, NOT_PREDICTIVE)] * len(trusts)
    assert torch.equal(misled.phase.last_phi, loss_only.phase.last_phi)


@pytest.mark.parametrize("spoil", [turned_round, says_nothing, at_random])
def test_one_that_misleads_does_no_harm(tmp_path, learned, loss_only, spoil):
    spoil(tmp_path / "shared", learned)
    misled = warm(tmp_path, tmp_path / "shared")
    misled.train()
    # of one drawn at random a single round says little: see below
    assert spoil is at_random or misled.phase.curve[0]["trust"] < 0.2
    assert misled.phase.selection.score <= 1.02 * loss_only.phase.selection.score


def test_those_drawn_at_random_are_hardly_trusted_after_a_round(learned):
    seen, trusts = load(learned).observations, []
    for seed in range(20):
        useless = load(learned)
        useless.reset_parameters(torch.Generator().manual_seed(seed))
        guide = ValueFunctionGuide(useless)
        guide.start(Coordinates(useless.signature.origin, None), False, seed)
        guide.learn(Trajectory(list(seen.last_round)))
        trusts.append(guide.standing[0])
    assert np.mean(trusts) < 0.2


def test_its_coordinates_are_taken_over(tmp_path, learned):
    """z is relative to the origin that it was learned at, wherever this run starts."""
    second = warm(tmp_path, learned, phi_coordinates="gradient_pca", phi_dim=2)
    with torch.no_grad():
        second.model.w.add_(0.5)
    second.train()
    signature = load(learned).signature
    assert signature.basis is None and second.phase.coordinates.kind == signature.coordinates == "identity"
    assert torch.equal(second.phase.coordinates.origin, signature.origin)
    first_round = second.phase.trajectory.z[:8]
    np.testing.assert_allclose(first_round.mean(0), 0.5 - signature.origin.numpy(), atol=1e-5)  # antithetic pairs


def test_a_start_far_from_all_that_it_saw_is_told(tmp_path, learned, caplog):
    second = warm(tmp_path, learned, max_steps=4)
    with torch.no_grad():
        second.model.w.add_(100.0)
    second.train()
    assert "has to learn anew" in caplog.text


def test_another_model_s_phi_is_refused_before_training(tmp_path, learned):
    with pytest.raises(ValueFunctionError, match=r"another phi space.*Quadratic.*only there: w.*only here: .*film"):
        bert_trainer(tmp_path, value_function_name_or_path=str(learned))
    other = load(learned)
    other.signature.phi["parameters"][0][1] = [7]
    other.save_pretrained(tmp_path / "other")
    config(tmp_path / "other", signature__phi__parameters=[["w", [2, 3]]])
    with pytest.raises(ValueFunctionError, match=r"of another shape: w \[2, 3\] there, \[6\] here"):
        warm(tmp_path, tmp_path / "other")


def test_another_metric_is_refused_before_training(tmp_path, learned):
    config(learned, signature__metric__greater_is_better=True)
    try:
        with pytest.raises(ValueFunctionError, match="greater is better.*smaller is better"):
            warm(tmp_path, learned)
    finally:
        config(learned, signature__metric__greater_is_better=False)
    signature = load(learned).signature
    with pytest.raises(ValueFunctionError, match=r"metric=Metric\(function, 'distance_to_optimum', False\)"):
        signature.check(signature.phi, Metric(len, "f1").name, False)


def test_one_without_a_signature_must_fit_the_coordinates(tmp_path):
    ValueFunction(3).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigurationError, match="3 coordinates, this run 6: set phi_dim"):
        warm(tmp_path, tmp_path / "plain")
