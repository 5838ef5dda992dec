"""Tasks and rivals with groups: metrics by hand, who knows the groups, cameras, dominoes, and what reads labels."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from toy import TINY, assert_the_metric_gets_what_is_measured
from transformers import EvalPrediction

from benchmarks import (
    cameras,
    ceiling,
    cifar,
    dominoes,
    groups,
    informed,
    measure,
    methods,
    protocol,
    run,
    scaling,
    scores,
    tabular,
    tasks,
)
from benchmarks.problem import KINDS, Problem, Rows, Task, data_root, label_ids_of, take
from benchmarks.training import Budget
from metricopt_hf import Ledger, Metric, Subset

missing = [name for name in ("cifar10", "resnet_cifar10", "a9a", "bank_marketing") if not (data_root() / name).is_dir()]
needs_data = pytest.mark.skipif(bool(missing), reason=f"not here: {', '.join(missing)} (METRICOPT_DATA)")
GROUPED = ["a9a_groups", "a9a_fair", "cifar_cameras", "dominoes"]


def toy_problem(seed: int) -> Problem:
    """The label is the first feature's sign, which the second feature hides for the second group."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(400, 5, generator=generator)
    group = (torch.rand(400, generator=generator) < 0.5).long()
    columns = {"features": features, "labels": (features[:, 0] + 1.5 * group * features[:, 1] > 0).long()}
    parts = np.split(np.random.default_rng(seed).permutation(400), [100, 200, 300])
    train = Rows(columns, parts[0], "toy")
    model = tabular.pretrain(next(train.batches()), seed)
    return Problem(train, *(Rows({**columns, "group": group}, part, "toy") for part in parts[1:]), model)


def toy_pixels() -> torch.Tensor:
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def toy_images(seed: int) -> Problem:
    pixels = toy_pixels()
    columns = {"labels": torch.arange(40) % 10, "group": torch.arange(40) % 4}
    torch.manual_seed(seed)
    net = cifar.CifarResNet(8).eval()
    columns["pixel_values"] = cifar.activations(net, cifar.Images(pixels, columns["labels"])).pixel_values
    parts = np.split(np.random.default_rng(seed).permutation(40), [10, 20, 30])
    measured = (Rows(columns, part, "toy images") for part in parts[1:])
    return Problem(Rows(columns, parts[0], "toy images").as_training(), *measured, net)


TOY = Task(
    *("toy", "Toy", scores.worst_group_accuracy, "wga", True, True, "binary", toy_problem), groups="label and group"
)
IMAGES = Task(
    *("images", "Images", scores.worst_camera_accuracy, "wca", True, True, "classes", toy_images),
    groups="group",
    pixels=toy_pixels,
)


# Metrics


def prediction(decided, labels, group) -> EvalPrediction:
    return EvalPrediction(np.eye(max(decided) + 1)[decided], (np.array(labels), np.array(group)))


def test_worst_groups_by_hand():
    #                     right in: label 0 of group 0: 2/2, of group 1: 1/2; label 1 of group 0: 1/3, of group 1: 1/1
    some = prediction([0, 0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0, 1])
    assert scores.worst_group_accuracy(some) == pytest.approx(1 / 3)
    assert scores.worst_camera_accuracy(some) == pytest.approx(3 / 5)  # group 0: 3/5, group 1: 2/3
    without = take(some, np.array([0, 1, 2, 3, 7]))  # no label 1 of group 0: a group that is not there is not the worst
    assert scores.worst_group_accuracy(without) == pytest.approx(1 / 2)


def test_fair_accuracy_by_hand():
    labels, group = [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4, [0] * 8 + [1] * 8
    # true positive rates 1 and 3/4, false positive rates 0 and 1/2
    decided = [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]
    assert scores.equalized_odds_gap(*map(np.array, (decided, labels, group))) == pytest.approx(0.5)
    assert scores.fair_accuracy(prediction(decided, labels, group)) == pytest.approx(13 / 16 - (0.5 - 0.05))
    assert scores.fair_accuracy(prediction(labels, labels, group)) == 1  # no gap, nothing to take off


@pytest.mark.parametrize("seed", range(4))
def test_the_gap_is_fairlearns(seed):
    fairlearn = pytest.importorskip("fairlearn.metrics")
    generator = np.random.default_rng(seed)
    decided, labels = generator.integers(2, size=(2, 200))
    group = generator.integers(2 + seed % 2, size=200)
    gap = fairlearn.equalized_odds_difference(labels, decided, sensitive_features=group)
    assert scores.equalized_odds_gap(decided, labels, group) == pytest.approx(gap)
    worst = fairlearn.MetricFrame(
        metrics=accuracy_score, y_true=labels, y_pred=decided, sensitive_features=np.stack([labels, group], 1)
    )
    assert scores.worst_group_accuracy(prediction(decided, labels, group)) == pytest.approx(worst.group_min())


# Who knows the groups


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_the_metrics_alone(name, tmp_path):
    task = tasks.tasks(smoke=True)[name]
    problem = task.prepare(0)
    assert "group" not in problem.train.columns
    assert problem.label_names == ["labels", "group"]
    batch = next(problem.observation.batches(20))
    said = problem.model(**batch)
    other = problem.model(**{**batch, "group": 1 - batch["group"]})
    assert torch.equal(said["logits"], other["logits"]) and torch.equal(said["loss"], other["loss"])
    assert_the_metric_gets_what_is_measured(task, problem, tmp_path)


@needs_data
def test_the_sex_of_a9a_is_its_feature():
    """Of 32,561 training rows 21,790 are men; the problem is the clean one that was there before."""
    train, _ = tabular.load("a9a")
    assert int(train["features"][:, groups.MALE].sum()) == 21_790
    grouped, plain = groups.problem(tasks.TABULAR_SMOKE, 0), tabular.problem("a9a", tasks.TABULAR_SMOKE, 0.0, 0)
    assert {n: s.digest for n, s in grouped.items()} == {n: s.digest for n, s in plain.items()}
    for rows in grouped.measured.values():
        batch = next(rows.batches())
        assert torch.equal(batch["group"], batch["features"][:, groups.MALE].long())


def test_rows_are_drawn_with_their_groups():
    problem = toy_problem(0)
    said = problem.predict(problem.model, problem.report)
    labels, group = said.label_ids
    rows = np.array([3, 3, 0])
    drawn = take(said, rows)
    assert np.array_equal(drawn.predictions, said.predictions[rows])
    assert np.array_equal(drawn.label_ids[0], labels[rows]) and np.array_equal(drawn.label_ids[1], group[rows])
    batch = problem.report[3]
    assert [int(x) for x in label_ids_of(batch)] == [labels[3], group[3]]
    bootstrap = measure.item_bootstrap(TOY, problem.report, said)
    assert len(bootstrap) == measure.REPLICATES and np.std(bootstrap) > 0
    start, observed, both, itself = ceiling.ceilings(TOY, 0)
    assert itself >= start


# Tasks


def test_every_task_says_what_it_asks_for():
    for task in tasks.tasks().values():
        assert task.kind in KINDS, task.name
        assert task.why.endswith(".") and task.why.count(". ") == 0, task.name
    assert {task.kind for task in tasks.tasks().values()} == set(KINDS)


def test_each_camera_does_what_it_says():
    pixels = 0.2 + 0.6 * torch.rand(400, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    taken, camera = cameras.photographed(pixels)
    assert camera.bincount().tolist() == [100] * 4
    before, after = ([images[camera == i] for i in range(4)] for images in (pixels, taken))
    assert torch.equal(after[0], before[0])
    noise = after[1] - before[1]
    assert abs(float(noise.std()) - 0.06) < 0.001 and abs(float(noise.mean())) < 0.001
    # of independent pixels, a Gaussian blur leaves the sum of its squared weights
    weights = torch.exp(-0.5 * (torch.arange(-3, 4) / 0.8) ** 2)
    left = float(((weights / weights.sum()) ** 2).sum())  # in each direction
    inside = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    assert float(after[2][inside].std() / before[2][inside].std()) == pytest.approx(left, rel=0.02)
    assert float(after[3].std() / before[3].std()) == pytest.approx(0.4, rel=0.02)
    again, same = cameras.photographed(pixels)
    assert torch.equal(again, taken) and torch.equal(same, camera)


@pytest.mark.parametrize("part", dominoes.AGREEMENT)
def test_digits_agree_as_often_as_it_says(part):
    labels = torch.arange(400) % 2
    vehicles = torch.rand(400, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made, shown = dominoes.dominoes(vehicles, labels, part)
    assert made.shape == (400, 3, 64, 32) and torch.equal(made[:, :, 32:], vehicles)
    for label in (0, 1):
        share = (shown == labels)[labels == label].float().mean()
        assert float(share) == pytest.approx(dominoes.AGREEMENT[part])
    drawings = dominoes.digits(part)
    for image, digit in zip(made, shown, strict=True):
        assert (drawings[int(digit)] == image[0, :32]).all(dim=(1, 2)).any()
        assert torch.equal(image[0, :32], image[1, :32])


def test_no_digit_is_in_training_and_measured():
    parts = ("train", "test")
    train, test = ({drawing.numpy().tobytes() for d in dominoes.digits(part) for drawing in d} for part in parts)
    assert len(train) > 150 and len(test) > 150 and not train & test


@pytest.mark.slow
@needs_data
def test_the_net_of_the_dominoes_is_trained_on_other_vehicles(monkeypatch, tmp_path):
    monkeypatch.setenv("METRICOPT_CACHE", str(tmp_path))
    seen = []
    monkeypatch.setattr(dominoes, "_train", lambda data: seen.append(data) or cifar.CifarResNet(20, 2).eval())
    dominoes._pools.__wrapped__(dominoes.SMOKE)
    made = dominoes._made(f"train[:{dominoes.SMOKE.train_pool}]", "train")
    half = len(made["labels"]) // 2
    assert torch.equal(seen[0]["pixel_values"], made["pixel_values"][:half])
    _, train, test = dominoes._pools.__wrapped__(dominoes.SMOKE)  # from the cache
    assert torch.equal(train["labels"], made["labels"][half:]) and len(seen) == 1
    assert set(test) == {"pixel_values", "labels", "group"}


@needs_data
def test_all_of_the_linear_net_moves():
    problem = tasks.tasks(smoke=True)["bank_precision"].prepare(0)
    phi = problem.phi(copy.deepcopy(problem.model))
    assert isinstance(phi, Subset) and set(phi.names) == {name for name, _ in problem.model.named_parameters()}
    batch = next(problem.report.batches())
    weight, bias = problem.model.classifier.weight, problem.model.classifier.bias
    with torch.no_grad():
        torch.testing.assert_close(problem.model(batch["features"])["logits"], batch["features"] @ weight.T + bias)


# Rivals


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, rival in methods.RIVALS.items() if rival.applies(TOY)])
def test_every_method_runs_where_there_are_groups(name):
    if name.startswith("cma"):
        pytest.importorskip("cma")
    if name == "thresholds":
        pytest.importorskip("fairlearn")
    record = measure.run_one(TOY, name, 0, protocol.first_of_grids().config(name), TINY, {})
    best = record["variants"]["plain"]["scores"]["selection"]
    if name != "start":
        assert best == record["selected"]["score"]
    # its decisions are made where it knows groups; of the others a bias and a scale are tuned
    assert ("post-hoc" in record["variants"]) == (name != "thresholds")
    scale = record["variants"].get(measure.SCALE)
    assert scale is None or 0 < scale["calls"]["post-hoc"] <= measure.POST_HOC_CALLS


def test_a_rival_runs_only_where_it_applies():
    for name, rival in methods.RIVALS.items():
        assert not rival.needs_group or rival.reads_groups, name
    keys = [key for unit in run.plan(run.BenchArguments(seeds=[0])) for key in unit]
    assert ("a9a_groups", "dfr", 0) in keys and ("bank_f1", "dfr", 0) not in keys
    assert ("cifar_cameras", "thresholds", 0) not in keys and ("a9a_groups", "formula", 0) not in keys
    assert [key[0] for key in keys if key[1] == "adabn"] == ["cifar_cameras"]
    known = tasks.tasks()
    assert all(methods.RIVALS[m].applies(known[t]) for unit in run.smoke_plan() for t, m, _ in unit)


def report(task: Task, name: str, config: dict, seed: int = 0, budget: Budget = TINY) -> dict[str, float]:
    record = measure.run_one(task, name, seed, config, budget, {})
    return {variant: row["scores"]["report"] for variant, row in record["variants"].items()}


@pytest.mark.slow
def test_labels_and_groups_of_observation_help():
    long = Budget(steps=160, batch_size=32)
    start = report(TOY, "start", {})["plain"]
    assert report(TOY, "dfr", {"C": 1.0})["plain"] > start
    assert report(TOY, "group_dro", {"phi_learning_rate": 3e-2, "group_step": 0.1}, budget=long)["plain"] > start


def test_the_worst_group_weighs_most():
    loss = informed.GroupDRO(2, step=1.0)
    logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[0, 0], [0, 0], [1, 1]])
    each = torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="none").detach()
    value = loss({"logits": logits}, labels)
    weights = torch.softmax(torch.stack([each[:2].mean(), each[2]]), 0)  # of two equal ones, times exp(loss)
    torch.testing.assert_close(loss.weights, weights)
    torch.testing.assert_close(value.detach(), weights @ torch.stack([each[:2].mean(), each[2]]))


def test_thresholds_by_group_close_the_gap():
    pytest.importorskip("fairlearn")
    problem = toy_problem(1)
    model = tabular.Linear(5).eval()
    problem = replace(problem, model=model, phi=tabular.whole)
    columns = problem.observation.columns
    columns["features"][:, 4] = columns["group"]  # who is in the second group is called positive more often
    with torch.no_grad():
        model.classifier.weight.copy_(torch.tensor([[0.0] * 5, [1.0, 0.0, 0.0, 0.0, 1.0]]))
        model.classifier.bias.zero_()
    config = {"constraints": "equalized_odds", "objective": "accuracy_score"}
    outcome = informed.thresholds_by_group(TOY, problem, 0, TINY, "", config)

    def gap(said: EvalPrediction) -> float:
        return scores.equalized_odds_gap(said.predictions.argmax(-1), *said.label_ids)

    before = gap(problem.predict(problem.model, problem.observation))
    assert before > 0.2
    assert gap(outcome.outputs["observation"]) < before / 2
    assert set(np.unique(outcome.outputs["report"].predictions)) == {0.0, 1.0}


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_batch_norms_take_the_observation_images(share):
    problem = toy_images(0)
    config = {"layers": "all", "share": share}
    outcome = informed.batch_norm_of_observation(IMAGES, problem, 0, TINY, "", config)
    # by hand: the first layer's statistics over the observation pixels, mixed
    net = copy.deepcopy(problem.model)
    observed = toy_pixels()[torch.as_tensor(problem.observation.rows)]
    net.train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers() if "running" in name}
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # all at once, so the last batch is all there is
    with torch.no_grad():
        net(observed)
        for name, buffer in net.named_buffers():
            if name in before:
                buffer.copy_((1 - share) * before[name] + share * buffer)
        net.eval()
        wanted = net(toy_pixels()[torch.as_tensor(problem.report.rows)])["logits"]
    np.testing.assert_allclose(outcome.outputs["report"].predictions, wanted.numpy(), atol=1e-4)
    assert torch.equal(problem.model.bn1.running_mean, before["bn1.running_mean"])  # the problem's net is as it was
    last = informed.batch_norm_of_observation(IMAGES, problem, 0, TINY, "", {**config, "layers": "last block"})
    assert not np.allclose(last.outputs["report"].predictions, wanted.numpy(), atol=1e-3)


def test_a_scale_does_what_no_bias_can():
    """The first logit is three times too large."""
    logits = np.random.default_rng(0).normal(size=(400, 2)) * [3.0, 1.0]
    labels = (logits[:, 1] > logits[:, 0] / 3).astype(int)
    said = EvalPrediction(logits, labels)
    accuracy = Metric(lambda p: float((p.predictions.argmax(-1) == p.label_ids).mean()), "accuracy")
    ledger = Ledger()
    scale, bias = scaling.tune_scale_and_bias(accuracy, said, ledger, 160)
    tuned = accuracy(scaling.scaled(said, scale, bias))
    alone = accuracy(measure.add_bias(said, measure.tune_bias(accuracy, said, Ledger(), 160)))
    assert tuned > alone + 0.1 and (scale > 0).all() and ledger.calls["post-hoc"] <= 160
    assert np.array_equal(said.predictions, logits)
    none, nothing = scaling.tune_scale_and_bias(accuracy, said, Ledger(), 0)
    assert np.array_equal(none, np.ones(2)) and not nothing.any()
