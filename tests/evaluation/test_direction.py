"""Which way a metric is better: from its name or its module's description, and never guessed."""

import copy
import dataclasses
import json
import pickle

import evaluate
import numpy as np
import pytest
from helpers import Texts, tiny_bert

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptSeq2SeqConfig, MetricOptTrainer
from metricopt_hf.evaluation.direction import by_description, by_name
from metricopt_hf.metrics import greater_is_better, names, path

SMALLER = """mse mae rmse eval_mse mean_squared_error wer cer perplexity eval_ppl log_loss hamming_loss brier_score
error_rate top5_error nll negative_log_likelihood misclassification""".split()
GREATER = """accuracy eval_accuracy weighted_accuracy f1 macro_f1 macroF1 f1-score mean_iou mIoU rougeL rouge2 sacrebleu
roc_auc mAP map_50 recall@5 mcc matthews_correlation R2 exact_match spearmanr neg_mean_squared_error g_mean
log_likelihood""".split()
UNKNOWN = ["score", "metric", "compute_metrics", "<lambda>", "quality", "cer_accuracy", "margin", ""]


@pytest.mark.parametrize(("names", "expected"), [(SMALLER, False), (GREATER, True), (UNKNOWN, None)])
def test_names_in_common_use(names, expected):
    assert {name: by_name(name) for name in names} == dict.fromkeys(names, expected)


@pytest.mark.parametrize("name", names())
def test_the_shipped_modules_say_it_themselves_or_by_their_name(name):
    told = by_description(evaluate.load(path(name)).description)
    assert told in (greater_is_better(name), None)
    assert (by_name(name) if told is None else told) is greater_is_better(name)


def test_a_text_that_says_both_says_nothing():
    assert by_description("Lower is better for a and higher is better for b.") is None
    assert by_description("A number. Larger models do better elsewhere in the world than these") is True
    assert by_description("How good it is.") is None


SCRIPT = """
import datasets
import evaluate

class Oddness(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}})
        return evaluate.MetricInfo(description="{text}", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {{"oddness": float(sum(p != r for p, r in zip(predictions, references)))}}
"""


def trainer(folder, **kwargs):
    data = {"train_dataset": Texts(40, seed=1), "eval_dataset": Texts(40, seed=2)}
    metric = kwargs.pop("metric", None)
    compute = kwargs.pop("compute_metrics", None)
    args = MetricOptConfig(str(folder), report_to=[], use_cpu=True, **kwargs)
    return MetricOptTrainer(tiny_bert(), args, metric=metric, compute_metrics=compute, **data)


@pytest.mark.parametrize(
    ("text", "expected"), [("The lower the value, the better.", False), ("Higher is better", True)]
)
def test_a_module_of_no_known_name_is_asked(tmp_path, text, expected):
    (tmp_path / "oddness").mkdir()
    script = tmp_path / "oddness" / "oddness.py"
    script.write_text(SCRIPT.format(text=text))
    assert trainer(tmp_path, metric_name_or_path=str(script)).metric.greater_is_better is expected
    given = trainer(tmp_path, metric_name_or_path=str(script), greater_is_better=not expected)
    assert given.metric.greater_is_better is not expected


@pytest.mark.parametrize("kind", ["compute_metrics", "callable", "module"])
def test_what_nobody_says_is_refused_before_training(tmp_path, kind):
    if kind == "module":
        (tmp_path / "oddness").mkdir()
        (tmp_path / "oddness" / "oddness.py").write_text(SCRIPT.format(text="How odd it is."))
        kwargs = {"metric_name_or_path": str(tmp_path / "oddness" / "oddness.py")}
    elif kind == "callable":
        kwargs = {"metric": lambda p: 0.5}
    else:
        kwargs = {"compute_metrics": lambda p: {"quality": 0.5}, "metric_for_best_model": "quality"}
    made = trainer(tmp_path, **kwargs)
    with pytest.raises(ConfigurationError, match="greater_is_better=True.*greater_is_better=False"):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.parametrize("name", ["mse", "eval_wer", "accuracy"])
def test_trainer_s_own_choice_of_the_best_checkpoint_follows(name):
    assert MetricOptConfig("out", metric_for_best_model=name).greater_is_better == (name == "accuracy")
    assert MetricOptConfig("out", metric_for_best_model=name, greater_is_better=True).greater_is_better


COPIES = {
    "replace": lambda args, **changes: dataclasses.replace(args, **changes),
    "to_dict": lambda args, **changes: type(args)(**{**args.to_dict(), **changes}),
    "json": lambda args, **changes: type(args)(**{**json.loads(args.to_json_string()), **changes}),
    "twice": lambda args, **changes: dataclasses.replace(dataclasses.replace(args), **changes),
    "copy": lambda args, **changes: dataclasses.replace(copy.deepcopy(args), **changes),
    "pickle": lambda args, **changes: dataclasses.replace(pickle.loads(pickle.dumps(args)), **changes),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("cls", [MetricOptConfig, MetricOptSeq2SeqConfig])
def test_a_copied_config_knows_that_no_direction_was_given(tmp_path, cls, copied):
    args = cls(str(tmp_path), metric_for_best_model="gap", report_to=[], use_cpu=True)
    again = copied(args, seed=1)
    assert again.seed == 1
    for config in (args, again):
        assert config.greater_is_better == 1  # as Trainer's own
        with pytest.raises(ConfigurationError, match="Nothing says which way the metric 'gap' is better"):
            config.direction_of("gap")
    assert copied(args, metric_for_best_model="mse").greater_is_better == 0
    assert copied(args, greater_is_better=False).direction_of("gap") is False


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("given", [True, False, np.True_, 0, "False", "true"], ids=repr)
def test_a_direction_that_was_given_is_kept(tmp_path, copied, given):
    args = MetricOptConfig(
        str(tmp_path), metric_for_best_model="gap", greater_is_better=given, report_to=[], use_cpu=True
    )
    assert copied(args).direction_of("gap") is (str(given).lower() in ("true", "1"))


@pytest.mark.parametrize("given", ["no", "smaller", 2, 0.5, [True], ""], ids=repr)
def test_what_is_no_direction_is_refused(given):
    with pytest.raises(ConfigurationError, match="greater_is_better=.* must be True or False"):
        MetricOptConfig("out", greater_is_better=given, report_to=[], use_cpu=True)
