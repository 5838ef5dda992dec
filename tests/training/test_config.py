"""The configuration: every field explained, reachable from the command line, saved, and checked."""

import dataclasses
import json
import logging
import re

import pytest
from transformers import HfArgumentParser, TrainingArguments

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptSeq2SeqConfig
from metricopt_hf.training.config import GONE

INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
FIELDS = {field.name: field for field in dataclasses.fields(MetricOptConfig) if field.name not in INHERITED}
# a value of each that is not the default
OTHERS = {
    "metric_name_or_path": "worst_class_recall",
    "metric_inputs": "scores",
    "metric_kwargs": {"average": "macro", "k": 3},
    "metric_timeout": 2.5,
    "metric_command": "python score.py {model}",
    "metric_steps": 7,
    "observe": "scores",
    "metric_call_budget": 0,
    "phi": r"\.bias$",
    "phi_dim": 3,
    "phi_learning_rate": 1e-4,
    "guide": "random",
    "value_weight": 0.0,
    "observation_size": 100,
}


def own_values(args):
    return {name: getattr(args, name) for name in FIELDS}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_explained(name):
    text = FIELDS[name].metadata["help"]
    assert len(text) > 20 and text.rstrip(")").endswith((".", "'"))


def test_the_help_can_be_printed():
    text = " ".join(HfArgumentParser(MetricOptConfig).format_help().split())
    for name, field in FIELDS.items():
        assert f"--{name}" in text
        assert " ".join(field.metadata["help"].split())[:60] in text


def test_the_docstring_lists_the_fields():
    listed = re.findall(r"`([a-z_]+)`", MetricOptConfig.__doc__.partition("do nothing:")[2].partition("Raises:")[0])
    assert sorted(listed) == sorted(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_can_be_given_on_the_command_line(name):
    value = OTHERS[name]
    assert value != FIELDS[name].default
    given = json.dumps(value) if isinstance(value, dict) else str(value)
    (args,) = HfArgumentParser(MetricOptConfig).parse_args_into_dataclasses(["--output_dir", "out", f"--{name}", given])
    assert own_values(args) == {**{n: f.default for n, f in FIELDS.items()}, name: value}


def test_it_survives_json(tmp_path):
    args = MetricOptConfig("out", **OTHERS)
    assert own_values(args) == OTHERS
    path = tmp_path / "args.json"
    path.write_text(args.to_json_string())
    saved = {name: value for name, value in json.loads(path.read_text()).items() if name in {*OTHERS, "output_dir"}}
    path.write_text(json.dumps(saved))
    (loaded,) = HfArgumentParser(MetricOptConfig).parse_json_file(path)
    assert own_values(loaded) == OTHERS


BAD = [
    ("metric_inputs", "logits"),
    ("metric_timeout", 0.0),
    ("metric_timeout", -1.0),
    ("metric_steps", 0),
    ("metric_call_budget", -1),
    ("phi_dim", 0),
    ("phi_learning_rate", 0.0),
    ("guide", "evolution"),
    ("value_weight", -1.0),
    ("value_weight", float("nan")),
    ("observation_size", 0),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ConfigurationError, match=rf"^{name}={value!r} must be "):
        MetricOptConfig("out", **{name: value})


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if "choices" in field.metadata])
def test_every_choice_offered_is_taken(name):
    for choice in FIELDS[name].metadata["choices"]:
        assert getattr(MetricOptConfig("out", **{name: choice}), name) == choice


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.default is None])
def test_where_nothing_is_the_default_it_can_be_given(name):
    assert getattr(MetricOptConfig("out", **{name: None}), name) is None


def test_there_are_few_enough():
    assert len(FIELDS) <= 14


@pytest.mark.parametrize("name", GONE)
def test_a_field_that_is_gone_is_refused_with_what_to_do_instead(name):
    assert name not in FIELDS
    for cls in (MetricOptConfig, MetricOptSeq2SeqConfig):
        with pytest.raises(ConfigurationError) as refused:
            cls("out", **{name: 1})
        assert str(refused.value) == f"{name} is no argument of {cls.__name__} any more; leave it out: {GONE[name]}."


@pytest.mark.parametrize("given", [{"greater_is_better": False}, {"greater_is_better": True}, {}])
def test_a_direction_that_is_guessed_is_said_aloud(given, caplog):
    args = MetricOptConfig("out", metric_for_best_model="f1", **given)
    with caplog.at_level(logging.WARNING, "metricopt_hf"):
        assert args.direction_of("f1") is given.get("greater_is_better", True)
    assert ("f1" in caplog.text) is (not given)


