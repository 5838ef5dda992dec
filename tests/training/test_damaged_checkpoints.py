"""A checkpoint that is damaged, in whatever file, is refused before a resume, with what is wrong and what to do."""

import errno
import json
import shutil

import pytest
from helpers import Texts, assert_equal_weights, tiny_bert, true_class_probability, weights
from transformers import TrainerState

from metricopt_hf import CheckpointError, MetricOptConfig, MetricOptTrainer
from metricopt_hf.training import checkpoint


def make(folder, **kwargs):
    args = MetricOptConfig(
        str(folder), max_steps=4, metric_start_ratio=0.5, metric_call_budget=16,
        metric_for_best_model="score", greater_is_better=True, save_steps=2, report_to=[], disable_tqdm=True,
        use_cpu=True, **kwargs,
    )  # fmt: skip
    return MetricOptTrainer(
        tiny_bert(), args, train_dataset=Texts(80, seed=1), eval_dataset=Texts(40, seed=2),
        compute_metrics=lambda prediction: {"score": true_class_probability(prediction)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make(folder).train()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


FILES = [
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json",
    checkpoint.TENSORS_FILE, checkpoint.JSON_FILE, checkpoint.FILES_FILE,
]  # fmt: skip


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 255
    path.write_bytes(content)


def missing(path):
    path.unlink()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [cut, empty, flip, missing])
def test_it_is_refused_and_the_one_before_is_named(folder, name, harm):
    last = folder / "checkpoint-4"
    assert {path.name for path in last.iterdir()} >= set(FILES)
    harm(last / name)
    if harm is missing and name in ("config.json", checkpoint.FILES_FILE):
        checkpoint.check(last)  # Trainer does without the one, and a process killed before the other left all else
        return
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check(last)
    message = str(caught.value)
    assert str(last) in message and f"Resume from {folder / 'checkpoint-2'}" in message
    assert name in message or name in (checkpoint.TENSORS_FILE, checkpoint.JSON_FILE)
    checkpoint.check(folder / "checkpoint-2")


def test_a_resume_looks_before_it_loads(folder):
    flip(folder / "checkpoint-4" / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors is not what was saved"):
        make(folder).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "model.safetensors"])
def test_without_the_list_of_files_an_empty_one_is_still_seen(folder, name):
    last = folder / "checkpoint-4"
    (last / checkpoint.FILES_FILE).unlink()
    empty(last / name)
    with pytest.raises(CheckpointError, match=f"{name} is empty"):
        checkpoint.check(last)


def test_what_people_edit_and_what_other_ranks_write_is_not_held_against_it(folder):
    last = folder / "checkpoint-4"
    state = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps({**state, "best_model_checkpoint": None}))
    (last / "rng_state_1.pth").write_bytes(b"another rank's")
    (last / "notes.txt").write_text("mine")
    checkpoint.check(last)
    checkpoint.vouch(last)
    assert "rng_state_1.pth" not in json.loads((last / checkpoint.FILES_FILE).read_text())
    make(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))


@pytest.mark.parametrize("part", [None, 0, 0.5], ids=["no file", "empty", "half"])
@pytest.mark.parametrize("file", ["trainer_state.json", checkpoint.JSON_FILE, checkpoint.FILES_FILE])
def test_where_the_disk_is_full_it_goes_on_from_the_one_before(tmp_path, saved, file, part, monkeypatch, caplog):
    trainer, last = make(tmp_path), tmp_path / "checkpoint-4"
    save_to_json, replace_file = TrainerState.save_to_json, checkpoint.replace_file

    def save(state, path):
        save_to_json(state, path)
        if path == str(last / file):
            cut_off(last / file)

    def replace(path, content):
        if path == last / file:
            (last / "half.tmp").write_bytes(content)
            cut_off(last / "half.tmp")
        replace_file(path, content)

    def cut_off(path):
        if part is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TrainerState, "save_to_json", save)
        patch.setattr(checkpoint, "replace_file", replace)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    before = tmp_path / "checkpoint-2"
    assert f"{last} was not written to its end (OSError: [Errno 28] No space left on device)" in caplog.text
    assert f"Resume from {before}." in caplog.text
    assert not any("film" in name for name in weights(trainer.model))
    if file != checkpoint.FILES_FILE:  # without that list, all else is there
        with pytest.raises(CheckpointError, match=f"Resume from {before}"):
            make(tmp_path).train(resume_from_checkpoint=True)
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(before))
    resumed, whole = (weights(type(trainer.model).from_pretrained(run / "checkpoint-4")) for run in (tmp_path, saved))
    assert_equal_weights(resumed, whole)


def test_a_limit_on_checkpoints_holds(tmp_path):
    make(tmp_path, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    checkpoint.check(tmp_path / "checkpoint-4")
