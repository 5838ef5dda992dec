"""What only the metric phase does is tried before the first step, and leaves nothing behind."""

import datasets
import pytest
import torch
from helpers import Texts, assert_equal_weights, tiny_bert, weights
from runs import text_trainer as make
from torch import nn
from transformers import Trainer, TrainingArguments

from metricopt_hf import ConfigurationError, DirectionGuide, MetricError, MetricOptTrainer


def assert_guided(trainer):
    assert trainer.state.global_step == 16 and trainer.ledger.calls["observe"] > 0


class OwnLoader:
    """A loader of its own and no training set (transformers 16388)."""

    batches = 0

    def get_train_dataloader(self):
        def collate(rows):
            self.batches += 1
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

        loader = torch.utils.data.DataLoader(Texts(160, seed=1), batch_size=8, shuffle=True, collate_fn=collate)
        return self.accelerator.prepare(loader)


def test_a_loader_of_one_s_own_without_a_training_set(tmp_path):
    class Ours(OwnLoader, MetricOptTrainer):
        pass

    class Plain(OwnLoader, Trainer):
        pass

    none = {"train_dataset": None}
    first, plain = {}, make(tmp_path, Plain, config=TrainingArguments, max_steps=12, trainer_kwargs=none)
    plain.train()

    class Look(MetricOptTrainer):
        def _guide_update(self, step):
            if step == 12:
                first.update(weights(self.model))
            super()._guide_update(step)

    class OursWatched(Ours, Look):
        pass

    trainer = make(tmp_path, OursWatched, trainer_kwargs=none)
    trainer.train()
    assert_guided(trainer)
    assert_equal_weights(weights(plain.model), first)  # its loader draws from the global random state


def rows(size, seed):
    texts = Texts(size, seed)
    for i in range(size):
        yield {"input_ids": texts.ids[i].tolist(), "label": int(texts.labels[i])}


def test_a_stream_whose_columns_nobody_knows(tmp_path):
    """trl 4087."""
    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"size": 200, "seed": 1})
    stream = stream.map(lambda row: {"attention_mask": [1] * 8, "unused": "text"})
    assert stream.column_names is None
    trainer = make(tmp_path, trainer_kwargs={"train_dataset": stream, "eval_dataset": list(rows(80, 2))})
    trainer.train()
    assert_guided(trainer)


class CudnnLike(nn.LSTM):
    """Refuses a backward pass in eval mode, as on CUDA."""

    def forward(self, x):
        output, state = super().forward(x)
        if output.requires_grad and not self.training:

            def refuse(grad):
                raise RuntimeError("cudnn RNN backward can only be called in training mode")

            output.register_hook(refuse)
        return output, state


class BiLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 8)
        self.norm = nn.LayerNorm(8)
        self.rnn = CudnnLike(8, 8, 2, batch_first=True, dropout=0.5, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.rnn(self.norm(self.table(input_ids)))[0].mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_an_rnn_stays_in_train_mode_without_its_dropout(tmp_path):
    losses = []

    class Twice(MetricOptTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if self._stage == "metric phase":
                losses.append([float(model(**inputs)["loss"]) for _ in range(2)])
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer = make(tmp_path, Twice, BiLSTM())
    trainer.train()
    assert_guided(trainer)
    assert len(losses) >= 4 and all(first == second for first, second in losses)
    assert trainer.model.rnn.dropout == 0.5


class Detector(nn.Module):
    """torchvision's: losses in train mode, detections in eval mode (vision 1574)."""

    def __init__(self):
        from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as faster_rcnn

        super().__init__()
        self.net = faster_rcnn(weights=None, weights_backbone=None, num_classes=2, min_size=32, max_size=32)

    def forward(self, pixel_values, labels=None):
        images = list(pixel_values)
        return {"loss": sum(self.net(images, labels).values())} if self.training else {"boxes": self.net(images)}


class DetectorTrainer(MetricOptTrainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return None, model(inputs["pixel_values"])["boxes"], inputs["labels"]


def test_a_detector_with_losses_in_train_mode_only(tmp_path, caplog):
    box = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([1])}
    data = [(torch.rand(3, 32, 32), box) for _ in range(8)]

    def collate(rows):
        return {"pixel_values": torch.stack([r for r, _ in rows]), "labels": [dict(b) for _, b in rows]}

    trainer = make(
        tmp_path,
        DetectorTrainer,
        Detector(),
        trainer_kwargs={
            "train_dataset": data,
            "eval_dataset": data,
            "data_collator": collate,
            "compute_metrics": lambda p: {
                "probability": float(sum(d["scores"].sum() for batch in p.predictions for d in batch))
            },
        },
        max_steps=4,
        metric_start_ratio=0.5,
        per_device_train_batch_size=2,
        phi_dim=1,
        metric_call_budget=8,
        eval_do_concat_batches=False,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.ledger.calls["observe"] > 0
    assert "only dropout and batch statistics are in eval mode" in caplog.text


def test_a_loss_that_asks_for_gradients_of_what_is_frozen(tmp_path, caplog):
    """A gradient penalty on the embeddings."""

    class Penalty(MetricOptTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss
            if torch.is_grad_enabled():
                table = model.get_input_embeddings().weight
                (gradient,) = torch.autograd.grad(loss, table, create_graph=True)
                loss = loss + 0.1 * gradient.square().sum()
            return (loss, outputs) if return_outputs else loss

    trainer = make(tmp_path, Penalty)
    trainer.train()
    assert_guided(trainer)
    assert "keeps its gradients, which are dropped" in caplog.text


def test_nothing_is_left_behind(tmp_path):
    """Neither in buffers that a forward pass writes to, nor in gradients, modes, optimizer or files."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = tiny_bert()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, input_ids, labels=None):
            if self.training or torch.is_grad_enabled():
                self.passes += 1
            return self.bert(input_ids=input_ids, labels=labels)

    trained = {}

    class First(MetricOptTrainer):
        def _guide_update(self, step):
            if step == 12:
                trained.update(weights(self.model))
            super()._guide_update(step)

    model = Counting()
    kwargs = {"max_grad_norm": 0.0, "label_names": ["labels"]}
    trainer = make(tmp_path / "ours", First, model, **kwargs)
    trainer.train()
    plain = make(tmp_path / "plain", Trainer, Counting(), TrainingArguments, max_steps=12, **kwargs)
    plain.train()
    assert trained.pop("passes") == 13  # of the steps; that of step 12 is the metric phase's
    expected = weights(plain.model)
    assert expected.pop("passes") == 12
    assert_equal_weights(expected, trained)
    assert not list((tmp_path / "ours").rglob("metricopt_state*"))


class Unsaved(DirectionGuide):
    def predict(self, z):
        return None

    def fit(self, trajectory):
        pass

    def ascent(self, phi):
        return torch.ones_like(phi)

    def state_dict(self):
        return {**super().state_dict(), "handle": object()}




@pytest.mark.parametrize(
    ("make_kwargs", "message"),
    [
        ({"trainer_kwargs": {"guide": Unsaved()}}, "object"),
        ({"phi": "pooler.dense.bias", "model": "without pooler"}, "does not reach phi"),
        ({"coordinates": "group_gradients", "trainer_kwargs": {"train_dataset": "stream"}}, "gradient_pca"),
    ],
    ids=["a state that cannot be saved", "a phi that the loss does not see", "coordinates of classes of a stream"],
)
def test_what_would_fail_at_75_percent_fails_before_the_first_step(tmp_path, make_kwargs, message):
    kwargs = {**make_kwargs, "trainer_kwargs": dict(make_kwargs.get("trainer_kwargs", {}))}
    if kwargs.pop("model", None):
        kwargs["model"] = tiny_bert()
        kwargs["model"].bert.pooler.register_forward_hook(lambda module, args, output: output.detach())
    if kwargs["trainer_kwargs"].get("train_dataset") == "stream":
        kwargs["trainer_kwargs"]["train_dataset"] = datasets.IterableDataset.from_generator(
            rows, gen_kwargs={"size": 200, "seed": 1}
        )
    trainer = make(tmp_path, **kwargs)
    before = weights(trainer.model)
    with pytest.raises(ConfigurationError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_equal_weights(before, weights(trainer.model))


def test_a_step_that_fails_in_the_metric_phase_alone(tmp_path):
    class Fails(MetricOptTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self._stage == "metric phase":
                raise RuntimeError("no such operation")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make(tmp_path, Fails)
    with pytest.raises(ConfigurationError, match="RuntimeError: no such operation.*Nothing was trained"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_target_of_an_unusual_name(tmp_path):
    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))

        def forward(self, states, actions=None):
            logits = self.body(states)
            return {"loss": nn.functional.cross_entropy(logits, actions), "logits": logits}

    data = [{"states": x, "actions": (x.sum() > 0).long()} for x in torch.randn(80, 6)]
    sets = {"train_dataset": data, "eval_dataset": data}
    with pytest.raises(MetricError, match=r"no labels: of the columns actions, states .*label_names=\[\.\.\.\]"):
        make(tmp_path, model=Policy(), trainer_kwargs=sets).train()
    trainer = make(tmp_path, model=Policy(), trainer_kwargs=sets, label_names=["actions"])
    trainer.train()
    assert_guided(trainer)


def test_a_head_that_moves_no_prediction_is_told(tmp_path, caplog):
    class TwoHeads(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.body, self.main = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16)), nn.Linear(16, 2)
            self.add_module(name, nn.Linear(16, 2))  # for the loss alone
            self.other = name

        def forward(self, x, labels=None):
            hidden = self.body(x)
            logits, other = self.main(hidden), getattr(self, self.other)(hidden)
            loss = sum(nn.functional.cross_entropy(out, labels) for out in (logits, other))
            return {"loss": loss, "logits": logits}

    data = [{"x": x, "labels": (x.sum() > 0).long()} for x in torch.randn(80, 6)]
    for name, told in (("deep_supervision", True), ("auxiliary_head", False)):
        caplog.clear()
        trainer = make(tmp_path, model=TwoHeads(name), trainer_kwargs={"train_dataset": data, "eval_dataset": data})
        assert trainer.phi.names[-1] == ("deep_supervision.bias" if told else "main.bias")
        trainer.train()
        assert ("deep_supervision.bias moves no prediction" in caplog.text) is told
