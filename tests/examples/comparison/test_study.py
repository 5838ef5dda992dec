"""The command line of a comparison."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from comparison.methods import METHODS
from comparison.splits import DataArguments
from comparison.study import StudyArguments, parse
from metricopt_hf import MetricOptConfig

TYPES, DEFAULTS = (DataArguments,), {"metric_for_best_model": "loss"}


def fields(cls):
    return {field.name for field in dataclasses.fields(cls) if field.init}


def test_the_help_has_a_heading_for_each_class(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], TYPES, METHODS, DEFAULTS, "A script.")
    parts = re.split(r"^(\w.*):$", capsys.readouterr().out, flags=re.MULTILINE)
    listed = {
        heading: set(re.findall(r"^  (?:-\w, )?--(?!no_)(\w+)", text, re.MULTILINE))
        for heading, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    inherited = fields(TrainingArguments)
    assert list(listed) == [
        "options",
        "Where the data come from",
        "What is run and compared",
        "Metric guidance (MetricOptConfig)",
        "Training (TrainingArguments of transformers)",
        "methods",
    ]
    assert listed["options"] == {"help"}
    assert listed["Where the data come from"] == fields(DataArguments)
    assert listed["What is run and compared"] == fields(StudyArguments)
    assert listed["Metric guidance (MetricOptConfig)"] == fields(MetricOptConfig) - inherited | {"metric"}
    assert listed["Training (TrainingArguments of transformers)"] == inherited


def test_under_their_headings_options_mean_the_same():
    given = "--dataset_name here --methods metricopt --seeds 4 --phi_dim 3 --metric_steps 5 --learning-rate 0.5"
    data, study, args = parse([*given.split(), "--output_dir", "out"], TYPES, METHODS, DEFAULTS, "A script.")
    assert (data.dataset_name, study.methods, study.seeds) == ("here", ["metricopt"], [4])
    assert (args.phi_dim, args.metric_steps, args.learning_rate) == (3, 5, 0.5)
