"""What is shown of commands and keyword arguments holds no secret, in whatever form people write it; the rest stays."""

import functools
import time

import numpy as np
import pytest

from metricopt_hf import MetricOptConfig
from metricopt_hf.redaction import command_without_secrets, text_without_secrets, without_secrets

TOKEN = "hf_SECRETsecretSECRET"
COMMANDS = [
    "s.py --auth-token 'two SECRETword' {model}",
    "s.py --token  SECRETword {model}",
    "s.py --password\tSECRETword {model}",
    "s.py '--token' SECRETword {model}",
    "s.py --api-key=SECRETword=SECRETword {model}",
    "s.py --opt=token=SECRETword {model}",
    f's.py "{TOKEN}" {{model}}',
    f"s.py --token {TOKEN} 'x {{model}}",
    "curl -H 'Authorization: Bearer SECRETword1234' {model}",
    "curl -H 'authorization:SECRETword and SECRETword' {model}",
    "curl -H Authorization:\\ Token\\ SECRETword {model}",
    'curl -H "X-Api-Key: SECRETword" {model}',
    "curl -H 'Cookie: session=SECRETword; b=SECRETword' {model}",
    "curl -u me:SECRETword https://h.org {model}",
    "curl https://me:SECRETword@h.org {model}",
    "curl 'https://h.org/?page=1&access_token=SECRETword&n=2' {model}",
    "git clone https://SECRETword@h.org {model}",
    'curl -d \'{"password": "SECRETword SECRETword", "n": 1}\' {model}',
    "sh -c 'score.py --token SECRETword {model}'",
    "sh -c \"sh -c 'score.py --token SECRETword'\" {model}",
    "env HF_TOKEN=SECRETword python s.py {model}",
    "HF_TOKEN=SECRETword python s.py {model}",
    "s.py --pem '-----BEGIN RSA PRIVATE KEY-----\nSECRETword\n-----END RSA PRIVATE KEY-----' {model}",
]


def secret(text):
    return "SECRETword" in text or "SECRETsecret" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_no_secret_of_a_command_is_shown(command):
    args = MetricOptConfig("out", use_cpu=True, report_to=[])
    args.metric_command = command  # some are no command lines
    for text in (repr(args), args.to_json_string(), str(args.to_sanitized_dict())):
        assert not secret(text)
    shown = command_without_secrets(command)
    assert command_without_secrets(shown) == shown and "<" in shown
    assert shown.split()[0] == command.split()[0] or "HF_TOKEN" in shown


@pytest.mark.parametrize(
    "command",
    [
        "python score.py {model} --split {split} --metric f1",
        "/bin/sh -c 'echo  \"0.5\" # x' x {model}",
        'python "my score.py" --keyed x --tokenize=yes\t{model}',
        "ssh git@github.com score http://h.org/a?page=2 {model}",
    ],
)
def test_a_command_without_secrets_stays_as_it_was_written(command):
    assert command_without_secrets(command) == command


@pytest.mark.parametrize(
    "kwargs",
    [
        {"url": f"https://h/?token={TOKEN}"},
        {"prompt": f"use {TOKEN}"},
        {"prompt": "the header is Authorization: Basic SECRETword"},
        {"a": {TOKEN}},
        {"a": frozenset({TOKEN})},
        {TOKEN: 1},
        {"raw": TOKEN.encode()},
        {"function": functools.partial(len, TOKEN)},
        {"words": ["--token", "SECRETword"]},
        {"n": {"m": ("x", {"password": "SECRETword"})}},
    ],
    ids=str,
)
def test_no_secret_of_keyword_arguments_is_shown(kwargs):
    assert not secret(repr(MetricOptConfig("out", metric_kwargs=kwargs, use_cpu=True, report_to=[])))


def test_numbers_of_numpy_are_shown_as_json_can_hold_them():
    kwargs = {"weights": np.arange(2), "beta": np.float32(0.5), "labels": {1}}
    assert without_secrets(kwargs) == {"weights": [0, 1], "beta": 0.5, "labels": [1]}
    assert '"beta": 0.5' in MetricOptConfig("out", metric_kwargs=kwargs, use_cpu=True, report_to=[]).to_json_string()


def test_a_long_text_takes_no_long_time():
    begun = time.monotonic()
    assert text_without_secrets("a" * 10**6) == "a" * 10**6
    command_without_secrets("a" * 10**5 + "'" + "b " * 10**5)
    assert time.monotonic() - begun < 10
