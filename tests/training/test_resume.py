"""A run that is interrupted and resumed ends with the same bits as one that was not."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, true_class_probability, weights
from runs import SCORES, planned
from transformers import TrainerCallback

from metricopt_hf import CheckpointError, MetricOptConfig, MetricOptTrainer
from metricopt_hf.training.checkpoint import JSON_FILE, TENSORS_FILE


def make(folder, trainer_kwargs=None, **kwargs):
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "metric_call_budget": 24,
        "select_steps": 2,
        "observe_steps": 2,
        "phi_learning_rate": 0.02,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "greater_is_better": True,
        "phi_dim": 4,
    }
    settings = {**SCORES, **defaults, **kwargs}
    return planned(MetricOptTrainer, settings)(
        tiny_bert(),
        MetricOptConfig(str(folder), **settings),
        train_dataset=Texts(160, seed=1),
        observation_dataset=Texts(40, seed=3),
        selection_dataset=Texts(40, seed=4),
        metric=true_class_probability,
        **(trainer_kwargs or {}),
    )


def outcome(trainer):
    return (
        weights(trainer.model),
        [(o.step, o.score, o.z.tolist()) for o in trainer.observations],
        dict(trainer.ledger.calls),
        [(candidate.step, candidate.score) for candidate in trainer.phase.selection.candidates],
        trainer.result.last_phi,
    )


def assert_same(first, second):
    assert_equal_weights(first[0], second[0])
    assert first[1:4] == second[1:4]
    assert torch.equal(first[4], second[4])


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("guide", ["value_function", "random"])
def test_three_steps_and_resume_are_eight_in_one_go(tmp_path, ratio, guide):
    """The checkpoint at step 3 lies in the metric phase, in it but with its start before, and in the first phase."""
    whole = make(tmp_path / "whole", metric_start_ratio=ratio, guide=guide)
    whole.train()
    assert len(whole.observations) == 24 or ratio > 0
    resumed = make(tmp_path / "resumed", metric_start_ratio=ratio, guide=guide)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(outcome(whole), outcome(resumed))


def test_resume_with_accumulation_and_a_scheduler_of_either_phase(tmp_path):
    kwargs = {"metric_start_ratio": 0.5, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    whole = make(tmp_path / "whole", **kwargs)
    whole.train()
    for step in (4, 6):
        resumed = make(tmp_path / f"resumed-{step}", **kwargs)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(outcome(whole), outcome(resumed))


def test_what_was_selected_before_the_interruption_is_still_the_best(tmp_path):
    kwargs = {"metric_start_ratio": 0.0, "greater_is_better": False, "value_weight": 0.0}  # the loss leads away from it
    whole, resumed = make(tmp_path / "whole", **kwargs), make(tmp_path / "resumed", **kwargs)
    whole.train()
    assert whole.result.best_step == 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same(outcome(whole), outcome(resumed))


def test_the_best_checkpoint_is_loaded_with_its_phi(tmp_path):
    """Trainer's own load_best_model_at_end wins over the selection split: it was asked for by name."""
    trainer = make(
        tmp_path,
        {
            "eval_dataset": Texts(40, seed=5),
            "compute_metrics": lambda p: {"true_class_probability": true_class_probability(p)},
        },
        metric_start_ratio=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="true_class_probability",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
    )
    trainer.train()
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_true_class_probability"] == pytest.approx(best, abs=1e-6)


def test_save_total_limit_keeps_what_resume_needs(tmp_path):
    whole = make(tmp_path, metric_start_ratio=0.25, save_total_limit=2)
    whole.train()
    kept = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-7", "checkpoint-8"]
    resumed = make(tmp_path / "resumed", metric_start_ratio=0.25)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert_same(outcome(whole), outcome(resumed))


@pytest.mark.parametrize("file", [JSON_FILE, TENSORS_FILE])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_works(tmp_path, file, damage):
    make(tmp_path, metric_start_ratio=0.0, max_steps=4).train()
    path = tmp_path / "checkpoint-4" / file
    if damage == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-9] + b"#" * 9)
    with pytest.raises(CheckpointError):
        make(tmp_path, metric_start_ratio=0.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer = make(tmp_path, metric_start_ratio=0.0)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.state.global_step == 8


def test_a_half_written_checkpoint_is_named(tmp_path):
    """Killed while writing: the trainer's own state comes last and is not there."""
    make(tmp_path, metric_start_ratio=0.0, max_steps=4).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-3"):
        make(tmp_path, metric_start_ratio=0.0).train(resume_from_checkpoint=True)


def test_another_phi_is_refused(tmp_path):
    make(tmp_path, metric_start_ratio=0.0, max_steps=4).train()
    with pytest.raises(Exception, match="phi"):
        make(tmp_path, metric_start_ratio=0.0, phi="classifier").train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )


def test_state_on_disk_is_json_and_safetensors(tmp_path):
    make(tmp_path, metric_start_ratio=0.0, max_steps=2).train()
    json.loads((tmp_path / "checkpoint-2" / JSON_FILE).read_text())
    assert (tmp_path / "checkpoint-2" / TENSORS_FILE).exists()


def resume_until_done(folder, progress):
    """What a user's restart script does: the last checkpoint that can be read, and on."""
    torch.set_num_threads(1)

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            progress.value += 1

    trainer = make(folder, metric_start_ratio=0.25, max_steps=60)
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
    whole = make(tmp_path / "whole", metric_start_ratio=0.25, max_steps=60)
    whole.train()
    folder = tmp_path / "killed"
    processes = multiprocessing.get_context("forkserver")  # imports once, not once per process
    processes.set_forkserver_preload(["metricopt_hf", "helpers"])
    draw = random.Random(0)
    kills = 0
    while not (folder / "final.pt").exists():
        progress = processes.Value("i", 0, lock=False)
        process = processes.Process(target=resume_until_done, args=(folder, progress))
        process.start()
        if kills < 10:
            while process.is_alive() and progress.value == 0:
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.05))
            if process.is_alive():
                process.kill()
                kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills == 10
    assert_equal_weights(weights(whole.model), torch.load(folder / "final.pt", weights_only=True))
