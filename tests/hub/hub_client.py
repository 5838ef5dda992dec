"""What users do with the Hub, in a process of its own, because the client reads HF_ENDPOINT when it is imported.

python tests/hub/hub_client.py publish|use FOLDER     writes what happened into FOLDER/publish.json or FOLDER/use.json
"""

import functools
import json
import os
import re
import sys
import time
import traceback
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, constants
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from metricopt_hf import HubError, MetricOptConfig, MetricOptTrainer, ValueFunction
from metricopt_hf import ValueFunctionError as Refused
from metricopt_hf.value import fit

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")

torch.set_num_threads(1)
sleep = time.sleep


def faults(**times):
    request = urllib.request.Request(f"{constants.ENDPOINT}/_faults", json.dumps(times).encode(), method="POST")
    urllib.request.urlopen(request).read()


def files(repo, revision=None):
    return sorted(f.rfilename for f in HfApi().model_info(repo, revision=revision).siblings)


def refusal(action, kind):
    """The message with which it was refused, in the library's own kind of error."""
    try:
        action()
    except kind as error:
        return str(error)
    return "not refused"


def offline(action):
    """Its answer where the Hub may not be asked."""
    constants.HF_HUB_OFFLINE = True
    try:
        return action()
    finally:
        constants.HF_HUB_OFFLINE = False


def value_function(seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(32, 3, generator=generator)
    scores = z @ torch.tensor([1.0, -2.0, 0.5])
    made = ValueFunction(3, hidden_size=8)
    fit(made, z, scores, generator, steps=20)
    made.observations.extend(z, scores, step=0, seconds=0.1)
    return made


def same(first, second):
    z = torch.randn(5, first.num_coordinates, generator=torch.Generator().manual_seed(0))
    answers = [(*v.predict(z), v.gradient(z)) for v in (first, second)]
    return all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


# the model that is shared: images whose label is where they are brightest


class Squares(torch.utils.data.Dataset):
    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(3, (size,), generator=generator)
        self.pixels = torch.randn(size, 3, 8, 8, generator=generator) + self.labels.view(-1, 1, 1, 1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def probability(prediction):
    chances = torch.softmax(torch.as_tensor(prediction.predictions), -1).numpy()
    return float(chances[np.arange(len(chances)), prediction.label_ids].mean())


def trainer(folder, value_function=None, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return MetricOptTrainer(
        ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)),
        MetricOptConfig(
            str(folder),
            max_steps=6,
            per_device_train_batch_size=8,
            metric_steps=6,
            metric_call_budget=200,
            phi_dim=3,
            save_steps=3,
            greater_is_better=True,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            **changes,
        ),
        train_dataset=Squares(48, 0),
        observation_dataset=Squares(48, 1),
        selection_dataset=Squares(48, 2),
        metric=probability,
        value_function=value_function,
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(Squares(8, 3).pixels).logits


# the first user


def by_name_and_revision(folder):
    first, second = value_function(0), value_function(1)
    commit = first.push_to_hub("tester/vf").oid
    again = second.push_to_hub("vf").oid  # the same: by the token's owner
    return {
        "files": files("tester/vf"),
        "commits": commit != again,
        "card": 'from_pretrained("tester/vf")' in ModelCard.load("tester/vf").text,
        "main": same(second, ValueFunction.from_pretrained("tester/vf")),
        "revision": same(first, ValueFunction.from_pretrained("tester/vf", revision=commit)),
        "observations": len(ValueFunction.from_pretrained("tester/vf").observations),
        "held here": same(second, ValueFunction.from_pretrained("tester/vf", local_files_only=True)),
        "offline": offline(lambda: same(second, ValueFunction.from_pretrained("tester/vf"))),
    }


def only_what_is_read_is_fetched(folder):
    """Of a repository that holds more, of one that holds no value function, and of one whose file is huge."""
    api, load = HfApi(), ValueFunction.from_pretrained
    made = value_function()
    made.push_to_hub("tester/more")
    for repo, path, content in (
        ("tester/more", "modeling.py", b"raise SystemExit"),
        ("tester/model", "config.json", b'{"model_type": "vit"}'),
        ("tester/model", "model.safetensors", bytes(2**20)),
        ("tester/huge", "config.json", b" " * (2**24 + 1)),
        ("tester/huge", "model.safetensors", bytes(2**20)),
    ):
        api.create_repo(repo, exist_ok=True)
        api.upload_file(repo_id=repo, path_in_repo=path, path_or_fileobj=content)
    cache = folder / "cache of few"
    return {
        "loads": same(made, load("tester/more", cache_dir=cache)),
        "no value function": refusal(lambda: load("tester/model", cache_dir=cache), Refused),
        "huge": refusal(lambda: load("tester/huge", cache_dir=cache), Refused),
        "fetched": sorted({path.name for path in cache.rglob("snapshots/*/*")}),
    }


def what_cannot_be_had(folder):
    load, held = ValueFunction.from_pretrained, folder / "other"
    private = value_function()
    private.push_to_hub("tester/private", private=True)
    HfApi().create_repo("tester/empty")
    return {
        "with token": same(private, load("tester/private")),
        "without": refusal(lambda: load("tester/private", token=False, cache_dir=held), Refused),
        "offline": offline(lambda: refusal(lambda: load("tester/vf", cache_dir=held), Refused)),
        "no repo": refusal(lambda: load("tester/nothing"), Refused),
        "no revision": refusal(lambda: load("tester/vf", revision="v9"), Refused),
        "no value function": refusal(lambda: load("tester/empty"), Refused),
        "no name": refusal(lambda: load("no/such/folder"), Refused),
        "no branch": refusal(lambda: private.push_to_hub("tester/vf", revision="draft"), HubError),
        "may not push": refusal(lambda: private.push_to_hub("tester/vf", token="hf_wrong"), HubError),
    }


def failing_uploads(folder):
    made = value_function(2)
    faults(lfs_500=2)
    made.push_to_hub("tester/busy")
    after_500 = same(made, ValueFunction.from_pretrained("tester/busy"))
    faults(commit_500=2)
    another = value_function(3)
    another.push_to_hub("tester/busy")
    after_commits = same(another, ValueFunction.from_pretrained("tester/busy"))
    faults(commit_500=1, commit_drop=1)
    again = value_function(4)
    again.push_to_hub("tester/busy")
    after_drop = same(again, ValueFunction.from_pretrained("tester/busy"))
    faults()
    return {"upload": after_500, "commit": after_commits, "connection lost": after_drop}


def push_that_dies(folder):
    run = trainer(folder / "dies")
    run.train()
    messages = []
    for what in ("lfs_drop", "commit_drop"):  # before anything is there; when all is there but the commit
        faults(**{what: 1000})
        messages.append(refusal(run.push_to_hub, HubError))
    faults()
    there = files("tester/dies")
    kept = same(run.result.value_function, ValueFunction.from_pretrained(folder / "dies"))
    model = AutoModelForImageClassification.from_pretrained(folder / "dies")
    run.push_to_hub()
    return {
        "messages": messages,
        "half": [name for name in there if name.endswith((".safetensors", ".json"))],
        "local": kept and torch.equal(logits(model), logits(run.model)),
        "afterwards": same(run.result.value_function, ValueFunction.from_pretrained("tester/dies")),
    }


def failed_push_along_the_way(folder):
    faults(commit_500=1000)
    run = trainer(folder / "unlucky", push_to_hub=True, hub_strategy="every_save")
    run.train()
    faults()
    return {"trained": run.state.global_step}


def cards_of_a_run(folder):
    """By the Hub's own check of what is pushed."""
    cards = [folder / "end" / "README.md", folder / "end" / "value_function" / "README.md"]
    for path in cards:
        ModelCard.load(path).validate()
    broken = cards[0].read_text().replace("- task:", "- no_task:").encode()
    HfApi().create_repo("tester/card")
    upload = functools.partial(HfApi().upload_file, repo_id="tester/card", path_in_repo="README.md")
    return {"cards": len(cards), "broken": refusal(lambda: upload(path_or_fileobj=broken), ValueError)}


def strategy(name):
    def push(folder):
        run = trainer(folder / name, push_to_hub=True, hub_strategy=name)
        run.train()
        along = files(f"tester/{name}")
        run.push_to_hub(
            language="en",
            license="apache-2.0",
            tags="squares",
            finetuned_from="someone/vit",
            tasks="image-classification",
            dataset="Squares",
            dataset_tags="tester/squares",
            scores={"report": 0.5},
            comparison="| method | score |\n|---|---|\n| loss only | 0.4 |",
        )
        z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
        torch.save(
            {"logits": logits(run.model), "z": z, "predicted": torch.stack(run.result.value_function.predict(z))},
            folder / f"{name}.pt",
        )
        card = (folder / name / "README.md").read_text()
        return {"along": along, "end": files(f"tester/{name}"), "card": card}

    return push


def publish(folder):
    steps = (by_name_and_revision, only_what_is_read_is_fetched, what_cannot_be_had, failing_uploads, push_that_dies)
    steps = {f.__name__: f for f in (*steps, failed_push_along_the_way)}
    return steps | {name: strategy(name) for name in STRATEGIES} | {"cards_of_a_run": cards_of_a_run}


# the second user


def loads(name):
    def load(folder):
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        model = AutoModelForImageClassification.from_pretrained(f"tester/{name}")
        learned = ValueFunction.from_pretrained(f"tester/{name}")
        predicted = torch.stack(learned.predict(expected["z"]))
        return {
            "logits": torch.equal(logits(model), expected["logits"]),
            "value function": torch.equal(predicted, expected["predicted"]),
        }

    return load


def documentation(folder):
    """The page's own words, with the repository that the first user pushed instead of a folder."""
    first, second, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sharing.md").read_text(), re.DOTALL)
    options = "use_cpu=True, report_to=[], disable_tqdm=True"
    first = first.replace('trainer.save_model("shared")  # or ', "").replace(
        '"out"', '"out", hub_model_id="user/name", ' + options
    )
    second = second.replace('"shared"', '"user/name"').replace('"out"', '"again", ' + options)
    names = {"model": trainer(folder / "unused").model, "metric": probability}
    names |= {"train": Squares(48, 0), "validation": Squares(96, 1)}
    os.chdir(folder)
    exec(compile(first, "sharing.md", "exec"), names)
    pushed = names["trainer"].result.value_function
    exec(compile(second, "sharing.md", "exec"), names)
    return {"same": same(names["value_function"], pushed), "calls": names["trainer"].ledger.calls["observe"]}


def starts_from_it(folder):
    given = ValueFunction.from_pretrained("tester/end")
    run = trainer(folder / "warm", value_function="tester/end", seed=5)
    run.train()
    basis = torch.equal(run.result.coordinates.basis, given.signature.basis)
    return {"basis": basis, "learned on": not same(run.result.value_function, given)}


def starts_from_a_private_one(folder):
    """With the token that the run's own arguments hold, as somebody who is not logged in."""
    token = os.environ.pop("HF_TOKEN")
    try:
        start = functools.partial(trainer, folder / "private", value_function="tester/private")
        return {"without": refusal(lambda: start().settled(), Refused), "with": start(hub_token=token).guided}
    finally:
        os.environ["HF_TOKEN"] = token


def use(folder):
    steps = {f.__name__: f for f in (starts_from_it, starts_from_a_private_one, documentation)}
    return steps | {name: loads(name) for name in STRATEGIES}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the client's waits between attempts
    who, folder = sys.argv[1], Path(sys.argv[2])
    results = {}
    for name, step in {"publish": publish, "use": use}[who](folder).items():
        try:
            results[name] = step(folder)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    (folder / f"{who}.json").write_text(json.dumps(results))
