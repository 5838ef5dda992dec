"""Tables, paired differences, plots, and the cheap rival: against numbers worked out by hand."""

import builtins
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import Texts, tiny_bert, worst_class_recall
from transformers import EvalPrediction

from comparison.methods import measured
from comparison.report import (
    Difference,
    MethodRun,
    compare,
    comparison_table,
    details_of,
    mean_and_error,
    paired_difference,
    plot_run,
    require,
    save_results,
    table_note,
)
from metricopt_hf import ConfigurationError, Ledger, Metric, MetricOptConfig, MetricOptTrainer
from metricopt_hf.posthoc import add_bias, tune_bias


def test_mean_and_error_by_hand():
    mean, error = mean_and_error([1.0, 2.0, 4.0, 5.0])
    # deviations -2, -1, 1, 2: variance 10 / 3, error sqrt(10 / 3 / 4)
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(10 / 12))
    assert math.isnan(mean_and_error([1.0])[1])


def test_paired_difference_by_hand():
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3) = 0.577, so 3.46 errors
    difference = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert difference.mean == pytest.approx(2.0)
    assert difference.error == pytest.approx(1 / math.sqrt(3))
    assert difference.verdict == "better"
    assert paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], greater_is_better=False).verdict == "worse"
    assert paired_difference([10.0, 20.0, 30.0], [11.0, 22.0, 33.0]).verdict == "worse"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        # mean 1; deviations -a and a: error a, so a = 0.5 lies on the boundary
        ([0.5, 1.5], "inside noise"),
        ([0.51, 1.49], "better"),
        ([-0.51, -1.49], "worse"),
        ([0.0, 0.0], "inside noise"),
        ([0.25, 0.25], "better"),
        ([3.0], "one seed"),
    ],
)
def test_verdicts(differences, verdict):
    assert paired_difference(differences, [0.0] * len(differences)).verdict == verdict


def test_pairs_must_match():
    with pytest.raises(ConfigurationError, match="Cannot pair 2 values with 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ConfigurationError, match="paired by seed"):
        compare([MethodRun("a", 0, {"report": 1.0}), MethodRun("b", 1, {"report": 1.0})], "a", "report")


def runs() -> list[MethodRun]:
    """Two methods, three seeds in different orders: on report, b - a = 0.1, 0.2, 0.3 by seed."""
    a = {0: 0.1, 1: 0.5, 2: 0.3}
    b = {2: 0.6, 0: 0.2, 1: 0.7}
    rows = [MethodRun("a", s, {"selection": v, "report": v}, {"select": 5}, 1.0) for s, v in a.items()]
    return rows + [
        MethodRun("b", s, {"selection": v, "report": v}, {"observe": 8, "select": 5}, 2.5) for s, v in b.items()
    ]


def test_compare_pairs_by_seed():
    (difference,) = compare(runs(), "a", "report").values()
    assert difference.mean == pytest.approx(0.2)
    assert difference.error == pytest.approx(0.1 / math.sqrt(3))
    assert compare(runs(), "no such method", "report") == {}


def test_a_metric_that_fails_at_the_end_costs_its_figure_and_no_more(caplog):
    """Once: it is asked again. For good: a seed without that figure is left out of the differences."""
    answers = iter([0.5, None, 0.6, None, None])

    def fails(prediction):
        if (answer := next(answers)) is None:
            raise OSError("the server does not answer")
        return answer

    predictions = {name: EvalPrediction(np.eye(2), np.array([0, 1])) for name in ("observation", "selection", "report")}
    scores = measured(SimpleNamespace(metric=Metric(fails, "f1")), predictions, predictions)
    assert scores["observation"] == 0.5 and scores["selection"] == 0.6 and math.isnan(scores["report"])
    assert caplog.text.count("It is asked once more") == 2 and "figure on the report split is left out" in caplog.text
    rows = [*runs(), MethodRun("a", 3, {"report": 0.5}), MethodRun("b", 3, {"report": scores["report"]})]
    assert compare(rows, "a", "report") == compare(runs(), "a", "report")
    assert compare(rows[-2:], "a", "report")["b"].verdict == "no figure"


def test_comparison_table():
    pytest.importorskip("tabulate")
    table = comparison_table(runs(), "a", ("selection", "report"))
    row = next(line for line in table.splitlines() if line.startswith("b"))
    assert [cell.strip() for cell in row.split("  ") if cell.strip()] == [
        *("b", "0.500±0.153", "0.500±0.153", "+0.200±0.058 better", "8 / 5 / -", "2.5")
    ]
    markdown = comparison_table(runs(), "a", ("selection", "report"), tablefmt="github").splitlines()
    assert len(markdown) == 4 and all(line.startswith("|") and line.endswith("|") for line in markdown)


def test_table_note_tells_how_often_chance_suffices():
    # Student's t with two degrees of freedom: P(|t| > 2) = 1 - 2 / sqrt(2 + 4) = 0.1835
    assert "3 seeds a mere chance exceeds that in 18 %" in table_note(3)
    assert "chance" not in table_note(1)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    args = MetricOptConfig(
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_steps=6,
        metric_call_budget=12,
        phi_dim=2,
        observe="scores",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = MetricOptTrainer(
        tiny_bert(),
        args,
        train_dataset=Texts(32),
        observation_dataset=Texts(24, seed=1),
        selection_dataset=Texts(24, seed=2),
        metric=worst_class_recall,
    )
    trainer.train()
    return trainer


def test_results_are_strict_json(trainer, tmp_path):
    details = details_of(trainer)
    assert 0 < details["calls"]["observe"]
    assert [c["kind"] for c in details["candidates"]][0] == "start" and details["why"]
    run = MethodRun("MetricOpt", 0, {"report": float("nan")}, details["calls"], 1.0, {**details, "bias": np.ones(2)})
    save_results(tmp_path / "results.json", [run], differences={"b": Difference(0.0, float("nan"), "one seed").error})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    (stored,) = document["runs"]
    assert stored["scores"] == {"report": None} and document["differences"] == {"b": None}
    assert stored["details"]["bias"] == [1.0, 1.0]
    assert [row["step"] for row in stored["details"]["curve"]] == [3, 4, 5]


def test_plot(trainer, tmp_path):
    pytest.importorskip("matplotlib")
    details = details_of(trainer)
    plot_run(tmp_path / "run.png", details, "worst-class recall", reference=("loss only", 0.5), title="tiny")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    plot_run(tmp_path / "bare.png", {**details, "curve": []}, "worst-class recall")  # it ended before its first step
    assert (tmp_path / "bare.png").exists()


def test_missing_extra_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("tabulate", "no_such_module"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "metricopt_hf\[report\]"'):
        require("no_such_module", "report")


# The class bias


def accuracy(prediction: EvalPrediction) -> float:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return float((logits.argmax(-1) == prediction.label_ids).mean())


def shifted_logits(n: int = 300, scale: float = 1.0) -> EvalPrediction:
    """Right everywhere but for class 2, whose logit is too low by 3 (before scaling)."""
    labels = np.arange(n) % 3
    logits = np.eye(3)[labels] + np.random.default_rng(0).normal(0, 0.05, (n, 3))
    logits[:, 2] -= 3
    return EvalPrediction(scale * logits, labels)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_bias_repairs_a_shifted_logit_at_any_scale(scale):
    prediction, ledger = shifted_logits(scale=scale), Ledger()
    metric = Metric(accuracy, "accuracy")
    before = prediction.predictions.copy()
    bias = tune_bias(metric, prediction, ledger)
    assert metric(prediction) < 0.7
    assert metric(add_bias(prediction, bias)) == 1.0
    np.testing.assert_array_equal(prediction.predictions, before)
    assert 0 < ledger.calls["post-hoc"] <= 160
    assert ledger.calls["observe"] == 0


def test_bias_follows_the_direction_of_the_metric():
    prediction = shifted_logits()
    error = Metric(lambda p: 1 - accuracy(p), "error", greater_is_better=False)
    assert error(add_bias(prediction, tune_bias(error, prediction, Ledger()))) == 0.0


@pytest.mark.parametrize("max_calls", [0, 1, 7])
def test_bias_keeps_to_its_calls(max_calls):
    ledger = Ledger()
    tune_bias(Metric(accuracy, "accuracy"), shifted_logits(), ledger, max_calls)
    assert ledger.calls["post-hoc"] == max_calls


def test_bias_never_makes_its_own_split_worse_and_survives_failing_calls():
    calls = 0

    def fragile(prediction):
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("now and then")
        return accuracy(prediction)

    prediction = shifted_logits()
    bias = tune_bias(Metric(fragile, "fragile"), prediction, Ledger())
    assert accuracy(add_bias(prediction, bias)) >= accuracy(prediction)


def test_bias_of_one_logit_is_a_threshold():
    labels = np.array([0, 0, 1, 1])
    metric = Metric(lambda p: float(((p.predictions.reshape(-1) > 0) == p.label_ids).mean()), "accuracy")
    for logits in (np.array([1.0, 2.0, 3.0, 4.0]), np.array([[1.0], [2.0], [3.0], [4.0]])):
        prediction = EvalPrediction(logits, labels)
        bias = tune_bias(metric, prediction, Ledger())
        assert bias.shape == (1,) and -3 < bias[0] < -2
        assert metric(add_bias(prediction, bias)) == 1.0


def test_bias_on_a_tuple_of_outputs_touches_the_logits_only():
    hidden = np.ones((300, 4))
    plain = shifted_logits()
    prediction = EvalPrediction((plain.predictions, hidden), plain.label_ids)
    biased = add_bias(prediction, np.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(biased.predictions[0], plain.predictions + [1, 0, 0])
    assert biased.predictions[1] is hidden
    assert tune_bias(Metric(accuracy, "accuracy"), prediction, Ledger()).shape == (3,)
