"""A black box that wants the model: it gets a plain copy, and a command's last line is read as a number."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_equal_weights, tiny_bert, weights
from torch import nn
from transformers import BertForSequenceClassification, EvalPrediction

from metricopt_hf import ConfigurationError, FiLM, Ledger, MetricError, ModelMetric
from metricopt_hf.evaluation import evaluator as evaluator_module
from metricopt_hf.evaluation import processes
from metricopt_hf.evaluation.model_metric import CommandMetric, ModelEvaluator

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
IDS = torch.arange(2, 6)[None]


def command(code, **options):
    return CommandMetric(f"{sys.executable} -c '{code}' {{model}} {{split}}", "quality", **options)


def evaluator(metric, model, dataset=None, split="observation"):
    return ModelEvaluator(FiLM(model), None, tuple, metric, Ledger(), 0, dataset=dataset, split=split)


def test_it_gets_a_plain_copy_in_eval_mode_of_the_model_at_each_phi():
    seen = []

    def spoil(model):
        seen.append(model)
        logits = model(input_ids=IDS).logits
        for parameter in model.parameters():
            parameter.zero_()
        return float(logits[0, 0])

    model = tiny_bert().train()
    taken = evaluator(ModelMetric(spoil, "first logit"), model)
    phi = taken.phi
    points = phi.read() + 0.1 * torch.randn(2, phi.dim, generator=torch.Generator().manual_seed(0))
    before, modes = weights(model), [module.training for module in model.modules()]
    scores = []
    for point in points:
        with phi.restored():
            phi.write(point)
            scores.append(taken.evaluate("observe"))
    assert_equal_weights(before, weights(model))
    assert modes == [module.training for module in model.modules()]
    for copied, point, score in zip(seen, points, scores, strict=True):
        assert copied is not model and not copied.training
        with phi.restored(), torch.no_grad():
            phi.write(point)
            expected = float(model.eval()(input_ids=IDS).logits[0, 0])
        assert score == pytest.approx(expected, rel=1e-5)
    assert scores[0] != scores[1] and taken.ledger.calls["observe"] == taken.ledger.passes["observe"] == 2


def test_one_with_two_parameters_gets_the_data_set_too():
    assert evaluator(ModelMetric(lambda model, rows: len(rows), "rows"), tiny_bert(), [1, 2]).evaluate("check") == 2
    assert not ModelMetric(lambda model, scale=1.0: 0.5, "alone").takes_dataset


@pytest.mark.parametrize("answer", [float("nan"), "text", [1.0, 2.0], None])
def test_garbage_is_a_failed_call(answer):
    with pytest.raises(MetricError):
        evaluator(ModelMetric(lambda model: answer, "quality"), tiny_bert()).evaluate("check")


def test_an_error_and_a_time_out_are_failed_calls():
    with pytest.raises(MetricError, match="ZeroDivisionError"):
        ModelMetric(lambda model: 1 / 0, "quality")(nn.Linear(1, 1))
    with pytest.raises(MetricError, match="metric_timeout=0.05"):
        ModelMetric(lambda model: time.sleep(5), "quality", timeout=0.05)(nn.Linear(1, 1))


def test_it_says_so_when_it_is_asked_about_predictions():
    with pytest.raises(MetricError, match="one of the model"):
        ModelMetric(lambda model: 1.0, "quality")(EvalPrediction(np.zeros((2, 2)), np.zeros(2)))


def test_a_command_reads_the_saved_model_and_its_last_line_is_the_number(tmp_path):
    class Processor:
        def save_pretrained(self, folder):
            open(os.path.join(folder, "processor.txt"), "w").close()

    keep = f'import sys, os, shutil; shutil.copytree(sys.argv[1], "{tmp_path}/kept"); '
    say = 'print("1.5 of chatter"); print(0.25 if sys.argv[2] == "selection" else 0.5); print()'
    model = tiny_bert()
    taken = evaluator(command(keep + say, processor=Processor()), model, split="selection")
    phi = taken.phi
    phi.write(phi.read() + 0.1)
    assert taken.evaluate("check") == 0.25
    kept = BertForSequenceClassification.from_pretrained(tmp_path / "kept")
    with torch.no_grad():
        torch.testing.assert_close(kept(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    assert (tmp_path / "kept" / "processor.txt").exists()


def test_a_model_that_is_none_of_transformers_is_saved_as_trainer_would():
    load = "import sys; from safetensors.numpy import load_file as load; "
    code = load + 'print(load(sys.argv[1] + "/model.safetensors")["bias"].item())'
    linear = nn.Linear(1, 1)
    linear.bias.data.fill_(0.75)
    assert command(code)(linear) == 0.75


def test_a_command_may_answer_several_numbers_by_name():
    metric = command('print({1: 2}); print("{\\"quality\\": 0.5, \\"size\\": 2}")')
    assert metric(nn.Linear(1, 1)) == 0.5


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print(0.5); sys.exit(3)", "exit status 3"),
        ("raise ValueError(5)", "said 'ValueError: 5'"),
        ("print(0.5, 0.6)", "it was '0.5 0.6'"),
        ("pass", "it was ''"),
        ("print(float(chr(110) + chr(97) + chr(110)))", "must be a number|not a finite"),
        ("print(chr(91) * 100000)", "must be a number"),
        ("import os; os.write(1, bytes([255, 254]))", "must be a number"),
        ("import os; os.kill(os.getpid(), 9)", "exit status -9"),
    ],
)
def test_a_command_that_fails_or_talks_garbage_is_a_failed_call(code, message):
    with pytest.raises(MetricError, match=message):
        command(code)(nn.Linear(1, 1))


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    late = f'import time, os; time.sleep(1.0); open("{tmp_path}/late", "w")'
    start = f'subprocess.Popen([sys.executable, "-c", """{late}"""])'
    code = f"import subprocess, sys, time; {start}; time.sleep(9)"
    begun = time.monotonic()
    with pytest.raises(MetricError, match=r"metric_timeout=0\.6 s"):
        CommandMetric(f"{sys.executable} -c '{code}' {{model}}", "quality", timeout=0.6)(nn.Linear(1, 1))
    assert time.monotonic() - begun < 5
    time.sleep(0.9)
    assert not (tmp_path / "late").exists()


def running(tag):
    """The processes with this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found += [path.parent.name] * (tag.encode() in path.read_bytes().split(b"\0"))
    return found


@LINUX
@pytest.mark.parametrize("detached", ["", "setsid "])
@pytest.mark.parametrize(("then", "timeout"), [("echo 0.5", None), ("sleep 98761", 0.5), ("exit 3", None)])
def test_a_command_leaves_no_process_behind(detached, then, timeout):
    metric = CommandMetric(f"/bin/sh -c '{detached}sleep 98761 & {then}' x {{model}}", "quality", timeout=timeout)
    with nullcontext() if then == "echo 0.5" else pytest.raises(MetricError):
        metric(nn.Linear(1, 1))
    assert not running("98761")


def test_where_no_group_can_be_killed_the_command_itself_is(monkeypatch):  # Windows
    monkeypatch.setattr(processes, "kill_all", lambda group, mark: None)
    begun = time.monotonic()
    with pytest.raises(MetricError, match=r"metric_timeout=0\.5 s"):
        CommandMetric(f"{sys.executable} -c 'import time; time.sleep(60)' {{model}}", "quality", timeout=0.5)(
            nn.Linear(1, 1)
        )
    assert time.monotonic() - begun < 30


@LINUX
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_neither_its_command_nor_its_files(tmp_path, how):
    started = tmp_path / "started"
    command = f"/bin/sh -c 'setsid sleep 98762 & touch {started}; sleep 98762' x {{model}}"
    code = f"""if True:
        import signal
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, by these tests too
        from torch import nn
        from metricopt_hf.evaluation.model_metric import CommandMetric
        CommandMetric({command!r}, "quality")(nn.Linear(1, 1))
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    run = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(temporary)})
    while not started.exists() and run.poll() is None:
        time.sleep(0.05)
    until = time.monotonic() + 10
    while not running("98762") and time.monotonic() < until:  # on a busy machine it starts later than the file is made
        time.sleep(0.05)
    seen = running("98762") and list(temporary.glob("metricopt-*"))
    run.send_signal(how)
    run.wait()
    assert seen
    until = time.monotonic() + 10
    while (running("98762") or list(temporary.glob("metricopt-*"))) and time.monotonic() < until:
        time.sleep(0.05)
    assert not running("98762") and not list(temporary.glob("metricopt-*"))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('print("{" + " " * 70000 + "7")', "must be a number"),
        ('print("0" * 2**21)', "longer than 1048576 bytes"),
        ('print(7); print(" " * 2**21)', "longer than 1048576 bytes"),
    ],
)
def test_a_long_last_line_is_not_taken_for_its_end(code, message):
    with pytest.raises(MetricError, match=message):
        command(code)(nn.Linear(1, 1))


def test_a_last_line_of_many_numbers_is_read_whole():
    numbers = 'import json; numbers = {f"class {i} recall": i / 9000 for i in range(9000)}; '
    code = f'{numbers} print("x" * 2**21); print(json.dumps(dict(numbers, quality=0.25)))'
    assert command(code)(nn.Linear(1, 1)) == 0.25


def test_a_command_is_given_no_secrets_of_the_environment_but_those_that_it_names(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "SECRET")
    monkeypatch.setenv("PWD", os.getcwd())
    code = 'import os; print(sum(v == "SECRET" for v in os.environ.values())); os.environ["PATH"], os.environ["PWD"]'
    assert command(code)(nn.Linear(1, 1)) == 0
    script = f"env PASS=OPENAI_API_KEY {sys.executable} -c '{code}' {{model}}"
    assert CommandMetric(script, "quality")(nn.Linear(1, 1)) == 1
    with pytest.raises(MetricError, match="It was not given .*HF_TOKEN.*if metric_command names it"):
        command('import os; print(os.environ["HF_" + "TOKEN"])')(nn.Linear(1, 1))


@pytest.mark.parametrize(
    "line",
    [
        "nowhere_to_be_found --token SECRETword {model}",
        "HF_TOKEN=SECRETword score.py {model}",
        "score.py --token SECRETword",
        "score.py --token SECRETword 'x {model}",
    ],
)
def test_a_refusal_shows_no_secrets_of_the_command(line):
    with pytest.raises(ConfigurationError) as refused:
        CommandMetric(line, "quality")
    assert "SECRETword" not in str(refused.value) and "metric_command=" in str(refused.value)


@pytest.mark.parametrize("code", ['print("--token SECRETword")', 'import sys; sys.exit("unknown: --token SECRETword")'])
def test_a_failure_shows_no_secrets_that_the_command_printed(code):
    with pytest.raises(MetricError) as failed:
        command(code)(nn.Linear(1, 1))
    assert "SECRETword" not in str(failed.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("score.py", "where the folder"),
        ("'unbalanced {model}", "no command line"),
        ("nowhere_to_be_found {model}", "PATH"),
    ],
)
def test_a_command_that_cannot_work_is_refused(line, message):
    with pytest.raises(ConfigurationError, match=message):
        CommandMetric(line, "quality")


@pytest.mark.parametrize(("of_command", "expected"), [(False, [1, 1]), (True, [1, 0])])
def test_ranks_call_a_function_equally_often_and_a_command_where_it_is_needed(
    monkeypatch, tmp_path, of_command, expected
):
    """A function may wait for the other ranks, so none lies behind a test of the rank; a command waits for nobody."""
    called = []
    monkeypatch.setattr(evaluator_module, "broadcast_object_list", lambda outcome: outcome.__setitem__(0, 0.5))
    for rank in range(2):
        log = tmp_path / str(rank)
        log.touch()
        metric = ModelMetric(lambda model, log=log, own=0.5 + rank: log.write_text("x") and own, "quality")
        if of_command:
            metric = command(f"open(\"{log}\", \"w\").write(\"x\"); print(0.5)")
        taken = evaluator(metric, tiny_bert())
        taken.rank, taken.world_size = rank, 2
        assert taken.evaluate("check") == 0.5 and taken.ledger.calls["check"] == 1
        called.append(log.stat().st_size)
    assert called == expected
