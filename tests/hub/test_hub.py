"""Sharing, against a Hub in a process of its own: what the first user pushes, and what a second one gets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from metricopt_hf import HubError
from metricopt_hf.hub.client import push

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
PARTS = ["README.md", "config.json", "model.safetensors"]
IN_MODEL = {f"value_function/{part}" for part in PARTS}


@pytest.fixture(scope="module")
def hub():
    """Address of a fresh Hub."""
    server = subprocess.Popen([sys.executable, HERE / "loopback_hub.py"], stdout=subprocess.PIPE, text=True)
    yield server.stdout.readline().strip()
    server.terminate()
    server.wait()
    server.stdout.close()


def client(who, folder, hub):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / f"home of {who}"),
        "HF_TOKEN": "hf_loopback",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, HERE / "hub_client.py", who, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{who}.json").read_text()), done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def published(hub, folder):
    return client("publish", folder, hub)


@pytest.fixture(scope="module")
def used(hub, folder, published):
    return client("use", folder, hub)[0]


def of(results, name):
    assert "error" not in results[name], results[name]["error"]
    return results[name]


def test_a_value_function_is_pushed_and_loaded_by_name_and_by_revision(published):
    result = of(published[0], "by_name_and_revision")
    assert [file for file in result.pop("files") if file != ".gitattributes"] == PARTS
    assert result.pop("observations") == 32
    assert all(result.values()), result


def test_what_cannot_be_had_is_refused_with_a_way_out(published):
    result = of(published[0], "what_cannot_be_had")
    assert result["with token"]
    assert "hf auth login" in result["without"] and "tester/private" in result["without"]
    assert "check the name" in result["no repo"]
    assert "no revision 'v9'" in result["no revision"]
    assert "config.json is missing" in result["no value function"]
    assert "HF_HUB_OFFLINE" in result["offline"]
    assert "neither a folder nor" in result["no name"]
    assert "create_branch" in result["no branch"]
    assert "write access" in result["may not push"] and "Nothing is lost" in result["may not push"]


def test_only_what_is_read_is_fetched_and_the_rest_refused_before(published):
    result = of(published[0], "only_what_is_read_is_fetched")
    assert result["loads"]
    assert "is not that of a value function" in result["no value function"]
    assert "config.json has 16777217 bytes; at most 1048576 are read" in result["huge"]
    assert result["fetched"] == PARTS[1:]


def test_the_command_pushes_and_shows_with_the_environment_that_the_page_names(hub, folder, published, tmp_path):
    page = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    named = dict(word.split("=", 1) for word in re.search(r"^export (.+)$", page, re.M)[1].split())
    environment = {**os.environ, **named, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment["PYTHONPATH"] = str(ROOT)

    def metricopt(*words):
        command = [sys.executable, "-m", "metricopt_hf.cli", "value-function", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    pushed = metricopt("push", str(next(folder.glob("**/value_function"))), "tester/by-command", "--private", "True")
    assert pushed.returncode == 0 and "tester/by-command" in pushed.stdout, pushed.stderr
    shown = metricopt("show", "tester/by-command")
    assert "V(z) over" in shown.stdout and "metric: " in shown.stdout, shown.stderr
    refused = metricopt("push", "nowhere/at-all", "tester/by-command")
    assert refused.returncode == 1 and "There is no repository nowhere/at-all" in refused.stderr


def test_an_upload_that_breaks_off_says_what_to_do():
    def upload():
        raise ConnectionError("Network error: Request error")

    with pytest.raises(HubError, match=r"The push to user/name failed \(ConnectionError.*Nothing is lost: it is here"):
        push(upload, "user/name", "it is here")


def test_a_hub_that_is_busy_is_asked_again(published):
    result = of(published[0], "failing_uploads")
    assert all(result.values()), result


def test_a_push_that_dies_half_way_loses_nothing(published):
    result = of(published[0], "push_that_dies")
    assert len(result["messages"]) == 2
    for message in result["messages"]:
        assert "Nothing is lost" in message and "try again" in message
    assert result["half"] == []  # a commit is there as a whole or not at all
    assert result["local"] and result["afterwards"]


def test_a_push_that_fails_along_the_way_is_told_and_does_not_end_training(published):
    assert of(published[0], "failed_push_along_the_way")["trained"] == 6
    assert "The push to tester/unlucky failed" in published[1]


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_model_card_and_value_function_are_pushed_together(published, strategy):
    result = of(published[0], strategy)
    whole = {"README.md", "config.json", "model.safetensors", *IN_MODEL}
    assert whole <= set(result["end"])
    assert (whole - IN_MODEL <= set(result["along"])) == (strategy != "end")
    # Trainer leaves the second checkpoint out if the first is still on its way
    if checkpoint := {"checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-3"}.get(strategy):
        state = {"trainer_state.json", "metricopt_state.pt", "metricopt_manifest.json"}  # to go on from it
        assert {f"{checkpoint}/{file}" for file in state} <= set(result["along"])
    for told in ("license: apache-2.0", "- squares", "base_model: someone/vit", "loss only", "model-index", "0.5"):
        assert told in result["card"]
    assert f'ValueFunction.from_pretrained("tester/{strategy}")' in result["card"]


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_a_new_process_gets_the_same_numbers(used, strategy):
    assert of(used, strategy) == {"logits": True, "value function": True}


def test_a_second_run_starts_from_what_was_pushed(used):
    assert of(used, "starts_from_it") == {"basis": True, "learned on": True}


def test_a_run_reads_a_private_one_with_its_own_token(used):
    result = of(used, "starts_from_a_private_one")
    assert "tester/private" in result["without"] and "hf auth login" in result["without"]
    assert result["with"]


def test_the_page_on_sharing_shares_and_loads(used):
    result = of(used, "documentation")
    assert result["same"] and result["calls"] > 0


def test_cards_of_a_run_pass_the_hub_s_validation(published):
    result = of(published[0], "cards_of_a_run")
    assert result["cards"] == 2 and "task" in result["broken"]
