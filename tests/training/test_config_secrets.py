"""What a notebook or a log shows of the arguments holds no secrets, and what cannot work is refused with its value."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptSeq2SeqConfig
from metricopt_hf.redaction import without_secrets

CONFIGS = (MetricOptConfig, MetricOptSeq2SeqConfig)
SECRETS = {
    "api_key": "SECRET",
    "apikey": "SECRET",
    "OPENAI_API_KEY": "SECRET",
    "access_token": "SECRET",
    "client-secret": "SECRET",
    "password": "SECRET",
    "headers": {"Authorization": "Bearer SECRET", "rows": [{"token": "SECRET"}]},
    "url": "https://me:SECRET@example.org",
    "other": ["hf_SECRETSECRET", "sk-SECRETSECRET"],
}
OPEN = {"average": "macro", "zero_division": 0, "tokenize": True, "keyed": "x", "labels": [0, 1], "url": "https://a.b"}


def shown(args):
    dicts = str(args.to_dict()), str(args.to_sanitized_dict())
    return [repr(args), str(args), *dicts, args.to_json_string(), f"{args!r}"]


@pytest.mark.parametrize("cls", CONFIGS)
def test_no_token_and_no_secret_is_shown(cls):
    args = cls("out", hub_token="hf_SECRET", use_cpu=True, metric_kwargs={**SECRETS, **OPEN})
    for text in shown(args):
        assert "SECRET" not in text.replace("<SECRET>", "").replace("<CLIENT-SECRET>", "")
        assert "macro" in text and "metric_call_budget" in text
    assert args.metric_kwargs == {**SECRETS, **OPEN}  # the metric gets them
    again = cls("out", use_cpu=True, metric_kwargs=json.dumps(SECRETS))
    assert "SECRET" not in repr(again).replace("<SECRET>", "").replace("<CLIENT-SECRET>", "")


@pytest.mark.parametrize(
    ("cls", "parent"),
    [(MetricOptConfig, TrainingArguments), (MetricOptSeq2SeqConfig, Seq2SeqTrainingArguments)],
)
def test_else_it_shows_what_trainer_s_own_shows(cls, parent):
    ours, theirs = (str(c("out", use_cpu=True, hub_token="x")).splitlines()[1:-1] for c in (cls, parent))
    assert len(theirs) > 50
    differing = [line for line in theirs if line not in ours]
    assert all("logging_dir" in line or "run_name" in line for line in differing), differing


def test_what_is_no_secret_stays():
    assert without_secrets(OPEN) == OPEN and without_secrets(None) is None and without_secrets({}) == {}
    assert without_secrets({"key": None, "token": False}) == {"key": None, "token": False}


NAN, INF = float("nan"), float("inf")
REFUSED = {
    "phi_dim": [4.0, INF, NAN, 0, "4", True, None],
    "seed": [2**32, -1, 1.5, NAN],
    "metric_timeout": [0, -1, NAN, INF, "5", True],
    "metric_steps": [0, 1.5, NAN, "3"],
    "metric_call_budget": [-1, 1.5, INF, NAN, "160"],
    "phi_learning_rate": [0, INF, NAN],
    "value_weight": [-1, NAN, "64", None],
    "observe": ["all", None],
    "observation_size": [0, 10.0],
    "phi": ["", None, 3],
    "guide": ["none", None, ["value_function"]],
    "metric_inputs": ["logits", None],
    "metric_kwargs": ["{", "[1]", 3],
}
CASES = [(name, value) for name, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_what_cannot_work_is_refused_with_its_value(name, value):
    with pytest.raises((ConfigurationError, json.JSONDecodeError)) as caught:
        MetricOptConfig("out", use_cpu=True, **{name: value})
    if isinstance(caught.value, ConfigurationError):
        assert str(caught.value).startswith(f"{name}={value!r} must be ")


@pytest.mark.parametrize(
    "given",
    [{"phi_dim": np.int64(4)}, {"seed": 2**32 - 1}, {"metric_timeout": 1}, {"metric_call_budget": None},
     {"value_weight": 0}, {"metric_kwargs": '{"average": "macro"}'}],
    ids=str,
)  # fmt: skip
def test_what_works_is_taken(given):
    MetricOptConfig("out", use_cpu=True, **given)


NUMBERS = {
    "phi_dim": [np.int64(4), np.array(4), torch.tensor(4)],
    "value_weight": [np.float32(0.5), Fraction(1, 2), torch.tensor(0.5)],
    "greater_is_better": [np.True_],
    "learning_rate": [np.float64(0.1)],
    "max_steps": [np.int32(6)],
    "metric_kwargs": [{"beta": np.float32(0.5), "labels": np.arange(2)}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, many in NUMBERS.items() for value in many])
def test_numbers_of_other_types_are_python_s_from_here_on(name, value):
    args = MetricOptConfig("out", use_cpu=True, report_to=[], **{name: value})
    assert type(getattr(args, name)) in (int, float, bool, dict)
    assert json.loads(args.to_json_string())[name] is not None


def test_a_value_of_the_wrong_type_is_refused_without_its_secrets():
    with pytest.raises(ConfigurationError) as refused:
        MetricOptConfig("out", use_cpu=True, metric_command=["score.py", "--token", "SECRETword", "{model}"])
    assert "SECRETword" not in str(refused.value) and "score.py" in str(refused.value)
