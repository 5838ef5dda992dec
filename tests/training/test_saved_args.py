"""The pickle of the arguments that is saved and pushed with a model holds no secrets, and the run keeps them."""

import zipfile

import pytest
import torch
from helpers import Texts, tiny_bert, true_class_probability
from transformers import Trainer

from metricopt_hf import MetricOptConfig, MetricOptTrainer
from metricopt_hf.redaction import shareable

TOKEN = "hf_FRESHtokenFRESH"


def trainer(folder, **changes):
    return MetricOptTrainer(
        tiny_bert(),
        MetricOptConfig(
            str(folder), max_steps=2, metric_steps=1, metric_call_budget=20, phi_dim=2, guide="pairs",
            greater_is_better=True, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=1, hub_token=TOKEN,
            metric_kwargs={"url": f"https://h.org/?key={TOKEN}", "average": "macro"}, **changes,
        ),
        train_dataset=Texts(40, seed=1), eval_dataset=Texts(40, seed=2), metric=true_class_probability,
    )  # fmt: skip


def saved(path):
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if TOKEN.encode() in archive.read(name)]
    return torch.load(path, weights_only=False)


def test_saved_arguments_hold_no_secrets(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model()
    run.args.metric_command = f"score.py --token {TOKEN} {{model}}"
    run.save_model(str(tmp_path / "again"))
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "again"):
        args = saved(folder / "training_args.bin")
        assert type(args) is MetricOptConfig and args.hub_token is None and args.max_steps == 2
        assert args.metric_kwargs == {"url": "https://h.org/?key=<KEY>", "average": "macro"}
    assert args.metric_command == "score.py --token <TOKEN> {model}"
    assert run.args.hub_token == TOKEN and TOKEN in run.args.metric_command and TOKEN in run.args.metric_kwargs["url"]


def test_arguments_that_are_pushed_on_the_way_hold_no_secrets(tmp_path, monkeypatch):
    used = []

    def push(self, folder):  # as Trainer's
        torch.save(self.args, f"{self.args.output_dir}/training_args.bin")
        used.append(self.args.hub_token)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    run = trainer(tmp_path)
    run.push_in_progress = None
    run._push_from_checkpoint(str(tmp_path))
    assert saved(tmp_path / "training_args.bin").hub_token is None
    assert used == [TOKEN] and run.args.hub_token == TOKEN


def test_a_field_of_one_s_own_is_hidden_by_its_name(tmp_path):
    args = MetricOptConfig("out", use_cpu=True, report_to=[])
    args.openai_api_key, args.max_new_tokens = "abc", 5
    torch.save(shareable(args), tmp_path / "args.bin")
    read = torch.load(tmp_path / "args.bin", weights_only=False)
    assert read.openai_api_key is None and read.max_new_tokens == 5 and args.openai_api_key == "abc"


@pytest.mark.parametrize("name", ["_save", "_push_from_checkpoint"])
def test_the_run_has_its_arguments_back_when_saving_fails(tmp_path, monkeypatch, name):
    def fail(self, *args):
        raise OSError("disk full")

    monkeypatch.setattr(Trainer, name, fail)
    run = trainer(tmp_path)
    run.push_in_progress, given = None, run.args
    with pytest.raises(OSError, match="disk full"):
        getattr(run, name)("nowhere")
    assert run.args is given
