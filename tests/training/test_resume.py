"""A run that is interrupted and resumed ends with the same bits as one that was not; other checkpoints are refused."""

import errno
import json
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, weights
from runs import text_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from metricopt_hf import CheckpointError
from metricopt_hf.training import building, checkpoint

RUN = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "metric_steps": 3}


def make(folder, **kwargs):
    return text_trainer(folder, **{**RUN, **kwargs})


def outcome(trainer):
    result = trainer.result
    candidates = [(c.kind, c.step, c.score) for c in result.candidates]
    ledger = {name: dict(getattr(trainer.ledger, name)) for name in ("calls", "passes")}
    return candidates, list(result.curve), ledger, result.why, result.trajectory.scores.tolist()


def assert_same(first, second):
    assert_equal_weights(weights(first.model), weights(second.model))
    for one, other in zip(outcome(first), outcome(second), strict=True):
        assert one == other


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"observe": "scores", "metric_call_budget": 24},
        {"guide": "random", "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "value_weight": 2.0},
        {"phi_learning_rate": 40.0},
    ],
    ids=["auto", "scores", "blended", "steps taken back"],
)
def test_resumed_before_at_the_start_of_and_in_the_metric_phase(tmp_path, kwargs):
    whole = make(tmp_path / "whole", **kwargs)
    whole.train()
    for step in (2, 3, 4, 5):
        resumed = make(tmp_path / "resumed", save_strategy="no", **kwargs)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(whole, resumed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make(folder).train()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One bit of it."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flipped", "missing"])
def test_a_file_that_is_not_what_was_saved_is_named_with_the_checkpoint_before(folder, harm):
    last = folder / "checkpoint-5"
    names = sorted(path.name for path in last.iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < set(names)
    for name in names:
        content = (last / name).read_bytes()
        harm(last / name)
        with pytest.raises(CheckpointError, match=f"Resume from {folder / 'checkpoint-4'}") as caught:
            checkpoint.check(last)
        assert str(last) in str(caught.value)
        (last / name).write_bytes(content)
    checkpoint.check(last)


def test_a_digit_of_a_json_file_is_noticed(folder):
    """The manifest's own too: a hash, a name, or a setting that a run has."""
    ours, last = building.settings_of(make(folder)), folder / "checkpoint-5"
    for path in sorted(last.glob("*.json")):
        content = path.read_text()
        digits = [i for i, letter in enumerate(content) if letter.isdigit()]
        assert len(digits) > 3
        for i in digits[:: 1 + len(digits) // 60]:
            path.write_text(content[:i] + str((int(content[i]) + 1) % 10) + content[i + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.check_settings(last, checkpoint.check(last), ours)
        path.write_text(content)
    checkpoint.check_settings(last, checkpoint.check(last), ours)


def test_a_resume_looks_before_it_loads(folder):
    other = folder / "checkpoint-4" / "trainer_state.json"
    shutil.copy(folder / "checkpoint-3" / "trainer_state.json", other)  # as whole as its own, of another step
    trainer = make(folder)
    before = weights(trainer.model)
    with pytest.raises(CheckpointError, match="trainer_state.json is not as it was saved"):
        trainer.train(resume_from_checkpoint=str(other.parent))
    assert_equal_weights(before, weights(trainer.model))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guide": "random"}, "guide='auto', this one has guide='random'"),
        ({"phi": "classifier"}, "phi='FiLM on .*Subset on"),
        ({"phi_dim": 3}, "phi_dim=6"),
        ({"observe": "scores"}, "observe='predictions'"),
        ({"seed": 7}, "seed=42"),
        ({"observation_size": 10}, "observation_size=None"),
        ({"greater_is_better": False}, "greater_is_better=True"),
        ({"metric_call_budget": 90}, "metric_call_budget=300"),
        ({"phi_learning_rate": 2.0}, "phi_learning_rate=1.0"),
        ({"metric_kwargs": {"average": "macro"}}, "metric_kwargs='None', this one has .*average"),
        ({"trainer_kwargs": {"eval_dataset": Texts(40, seed=2)}}, r"selection=\[24, 24\], .*\[20, 20\]"),
        ({"metric_steps": 2}, "began at step 3; in this run it begins at 4, and step 5 lies behind"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_another_run_is_not_gone_on_with(saved, tmp_path, changes, told):
    trainer = make(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=told):
        trainer.train(resume_from_checkpoint=str(saved / "checkpoint-5"))


def test_a_checkpoint_of_plain_trainer_and_none_at_all(tmp_path):
    plain = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    text_trainer(tmp_path, Trainer, config=TrainingArguments, **plain).train()
    with pytest.raises(CheckpointError, match="holds no guidance state .* plain Trainer"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_finished_run_goes_on_with_more_steps_and_is_guided_anew(folder, caplog):
    trainer = make(folder, max_steps=10)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10 and trainer.result.start_step == 7
    assert "metric phase that began at step 3" in caplog.text and "begins at step 7" in caplog.text
    score = trainer.predict(trainer.selection_dataset).metrics["test_probability"]
    assert score == pytest.approx(trainer.result.best_score, abs=1e-6)


def test_the_best_checkpoint_is_loaded_as_trainer_does(tmp_path):
    trainer = make(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert trainer.evaluate()["eval_probability"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_a_limit_on_checkpoints_holds(tmp_path):
    make(tmp_path, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    checkpoint.check(tmp_path / "checkpoint-6")


@pytest.mark.parametrize("file", [checkpoint.STATE_FILE, checkpoint.MANIFEST_FILE])
def test_where_the_disk_is_full_it_goes_on_from_the_one_before(tmp_path, saved, file, monkeypatch, caplog):
    trainer, last = make(tmp_path), tmp_path / "checkpoint-5"
    replace_file = checkpoint.replace_file

    def replace(path, content):
        if path == last / file:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "replace_file", replace)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    before = tmp_path / "checkpoint-4"
    assert f"{last} was not written to its end" in caplog.text and f"Resume from {before}." in caplog.text
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(before))
    loaded = [weights(tiny_bert().from_pretrained(run / "checkpoint-6")) for run in (tmp_path, saved)]
    assert_equal_weights(*loaded)


class Once(TrainerCallback):
    """Ends the run at a step, the first time."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_is_interrupted_leaves_an_ordinary_model_and_another_can_follow(tmp_path, step):
    trainer = text_trainer(tmp_path, trainer_kwargs={"callbacks": [Once(step, KeyboardInterrupt())]}, max_steps=5)
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert set(weights(trainer.model)) == set(weights(tiny_bert()))
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.result.why


def resume_until_done(folder, progress):
    """What a user's restart script does: the last checkpoint that can be read, and on."""
    torch.set_num_threads(1)

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            progress.value += 1

    trainer = make(folder, max_steps=24, metric_steps=12)
    trainer.add_callback(Progress())
    candidates = sorted(Path(folder).glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1]))
    for candidate in [*candidates, None]:
        try:
            trainer.train(resume_from_checkpoint=None if candidate is None else str(candidate))
            break
        except CheckpointError:
            continue
    torch.save(trainer.model.state_dict(), Path(folder) / "final.pt")


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes_to_the_same_weights(tmp_path):
    """Ten times -9, at moments drawn with a seed. A half-written checkpoint is refused, and the one before used."""
    whole = make(tmp_path / "whole", max_steps=24, metric_steps=12)
    whole.train()
    folder = tmp_path / "killed"
    processes = multiprocessing.get_context("forkserver")  # imports once, not once per process
    processes.set_forkserver_preload(["metricopt_hf", "helpers"])
    draw, kills = random.Random(0), 0
    while not (folder / "final.pt").exists():
        progress = processes.Value("i", 0, lock=False)
        process = processes.Process(target=resume_until_done, args=(folder, progress))
        process.start()
        if kills < 10:
            while process.is_alive() and progress.value == 0:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.2))
            if process.is_alive():
                process.kill()
                kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills >= 5
    assert_equal_weights(weights(whole.model), torch.load(folder / "final.pt", weights_only=True))


def test_state_comes_back_as_it_was_and_runs_no_code(tmp_path):
    state = {"phi": {"a.b": torch.randn(3)}, "list": [1, None, {"x": torch.arange(3)}], "nan": float("nan"), 3: "x"}
    checkpoint.save(state, tmp_path / "on the way")
    loaded = checkpoint.load(tmp_path / "on the way")
    assert torch.equal(loaded["phi"]["a.b"], state["phi"]["a.b"]) and loaded[3] == "x" and loaded["list"][1] is None
    checkpoint.save({"code": Path}, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="no earlier one"):
        checkpoint.check(tmp_path)


def test_a_manifest_of_another_version_is_refused(folder):
    path = folder / "checkpoint-6" / checkpoint.MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    with pytest.raises(CheckpointError, match="format version 1, this version of metricopt_hf reads"):
        checkpoint.check(path.parent)


def test_other_ranks_and_users_files_do_not_matter(folder):
    last = folder / "checkpoint-6"
    (last / "rng_state_1.pth").write_bytes(b"another rank's")
    (last / "notes.txt").write_text("mine")
    assert checkpoint.check(last)["metric"] == "probability"
