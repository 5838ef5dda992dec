"""Files of a value function over behaviour: read as they were written, and a stranger's refused with the reason."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import config
from safetensors.torch import load_file

from metricopt_hf import Observation, Trajectory, ValueFunction, ValueFunctionError
from metricopt_hf.value import Behaviour, BehaviourSignature, fit

BEHAVIOUR = Behaviour("classes", 3, 0)


def shared():
    rng = np.random.default_rng(0)
    summaries = rng.uniform(size=(30, BEHAVIOUR.size)).astype(np.float32)
    scores = summaries[:, :3].min(1).astype(float)
    made = ValueFunction(BEHAVIOUR.size, hidden_size=8, num_members=3)
    fit(made, summaries, scores, np.full(30, np.nan), torch.Generator().manual_seed(0))
    made.signature = BehaviourSignature("Linear", BEHAVIOUR, "worst_recall", True)
    pairs = zip(summaries, scores, strict=True)
    made.observations = Trajectory([Observation(s, score, float("nan"), 0, 0.0) for s, score in pairs])
    return made


@pytest.fixture
def folder(tmp_path):
    shared().save_pretrained(tmp_path)
    return tmp_path


def test_what_is_written_is_read_again(folder):
    first, second = shared(), ValueFunction.from_pretrained(folder)
    assert second.signature == first.signature and second.signature.over == "behaviour" and not second.has_coordinates
    assert np.array_equal(first.observations.z, second.observations.z)
    z = torch.rand(4, BEHAVIOUR.size)
    assert torch.equal(first.predict(z)[0], second.predict(z)[0])


def test_its_files_say_which_kind_it_is(folder):
    told = json.loads((folder / "config.json").read_text())
    assert told["format_version"] == 6 and told["signature"]["over"] == "behaviour"
    assert told["signature"]["behaviour"] == {"version": 1, "labels": "classes", "num_outputs": 3, "num_labels": 0}
    assert not {"origin", "basis"} & set(load_file(folder / "model.safetensors"))
    card = (folder / "README.md").read_text()
    assert "over | behaviour: 9 numbers of predictions of 3 classes" in card and 'guide="behaviour"' in card
    assert "| phi, what is tuned" not in card and "seconds of observing" not in card


STRANGE = {
    "over something else": ({"signature__over": "weights"}, "says that it is over .?weights"),
    "a list for what it is over": ({"signature__over": ["behaviour"]}, "says that it is over"),
    "no behaviour": ({"signature__behaviour": None}, "TypeError"),
    "another version": ({"signature__behaviour__version": 2}, "a summary of version 2"),
    "unknown labels": ({"signature__behaviour__labels": "pixels"}, "malformed"),
    "a width that is text": ({"signature__behaviour__num_outputs": "3"}, "malformed"),
    "a width that is a truth": ({"signature__behaviour__num_labels": True}, "malformed"),
    "a negative width": ({"signature__behaviour__num_outputs": -3}, "malformed"),
    "a huge width": ({"signature__behaviour__num_outputs": 10**9}, "malformed"),
    "other classes": ({"signature__behaviour__num_outputs": 4}, "it reads 9 numbers, and its behaviour has 12"),
    "a name of two lines": ({"signature__metric__name": "a\nb"}, "malformed"),
    "a direction that is text": ({"signature__metric__greater_is_better": "yes"}, "malformed"),
    "a signature that is a list": ({"signature": []}, "TypeError"),
    "a signature that is text": ({"signature": "over"}, "TypeError"),
    "said to be over phi": ({"signature__over": "phi"}, "KeyError"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_is_strange_is_refused_with_the_reason_and_a_remedy(folder, what):
    changes, message = STRANGE[what]
    config(folder, **changes)
    with pytest.raises(ValueFunctionError, match=f"(?s)({message}).*start without it") as refused:
        ValueFunction.from_pretrained(folder)
    assert re.search(re.escape(folder.name), str(refused.value))


def test_another_metric_is_refused_and_any_phi_will_do():
    signature = shared().signature
    signature.check({"kind": "FiLM", "parameters": []}, "worst_recall", True)
    with pytest.raises(ValueFunctionError, match=r"predicts worst_recall \(greater .*judged by f1"):
        signature.check({}, "f1", True)
