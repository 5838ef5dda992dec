"""Detectors in the trainer: labels that are a dict per image, images of different size, heads that share parameters."""

import numpy as np
import pytest
import torch
from detectors import d_fine, detr, rt_detr, yolos

from metricopt_hf import ConfigurationError, MetricOptConfig, MetricOptTrainer

SIZE, BATCH = 5, 2


class Scenes(torch.utils.data.Dataset):
    """Random images, each with as many boxes as its index, plus one."""

    def __init__(self, shapes=((64, 64),)):
        generator = torch.Generator().manual_seed(0)
        self.images = [torch.rand(3, *shapes[i % len(shapes)], generator=generator) for i in range(SIZE)]
        self.labels = [
            {
                "class_labels": torch.randint(3, (i + 1,), generator=generator),
                "boxes": 0.3 + 0.2 * torch.rand(i + 1, 4, generator=generator),
                "orig_size": torch.tensor(image.shape[1:]),
            }
            for i, image in enumerate(self.images)
        ]

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def collate(rows):
    """Batches as wide as their widest image."""
    height, width = (max(row["pixel_values"].shape[axis] for row in rows) for axis in (1, 2))
    pixels = torch.zeros(len(rows), 3, height, width)
    for i, row in enumerate(rows):
        pixels[i, :, : row["pixel_values"].shape[1], : row["pixel_values"].shape[2]] = row["pixel_values"]
    return {"pixel_values": pixels, "labels": [row["labels"] for row in rows]}


def confidence(prediction):
    """Moves with every change of phi: the mean logit, and something of every label."""
    assert [len(batch) for batch in prediction.label_ids] == [2, 2, 1]
    labels = [label for batch in prediction.label_ids for label in batch]
    assert [len(label["boxes"]) for label in labels] == [1, 2, 3, 4, 5]
    assert all(isinstance(label["boxes"], np.ndarray) for label in labels)
    logits = np.concatenate([logits for logits, _ in prediction.predictions])
    assert logits.shape[:2] == (SIZE, 10)
    return float(logits[..., 0].mean())


def trainer(model, tmp_path, scenes=None, **changes):
    scenes = scenes or Scenes()
    options = {
        "max_steps": 1,
        "metric_steps": 1,
        "metric_call_budget": 8,
        "phi_dim": 1,
        "guide": "pairs",
        "observe": "predictions_on_all_rows",
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "eval_do_concat_batches": False,
        "greater_is_better": True,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return MetricOptTrainer(
        model,
        MetricOptConfig(str(tmp_path), **options),
        train_dataset=scenes,
        observation_dataset=scenes,
        selection_dataset=scenes,
        data_collator=collate,
        metric=confidence,
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[1:3],
    )


@pytest.mark.parametrize("make", [rt_detr, d_fine, detr, yolos], ids=lambda make: make.__name__)
def test_detectors_are_tuned_and_saved_as_ordinary_models(make, tmp_path):
    """Losses that a model has in train mode only are no error."""
    shapes = ((64, 64), (64, 48), (48, 64)) if make is yolos else ((64, 64),)
    mine = trainer(make(), tmp_path, Scenes(shapes))
    mine.train()
    assert len(mine.result.trajectory) > 0 and mine.result.trajectory.scores.std() > 0
    assert mine.result.failed_calls == 0 and not torch.equal(mine.result.start.phi, mine.result.candidates[-1].phi)

    mine.save_model()
    fresh = type(mine.model).from_pretrained(tmp_path).eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        saved, here = fresh(pixels), mine.model.eval()(pixels)
    assert torch.equal(saved.logits, here.logits) and torch.equal(saved.pred_boxes, here.pred_boxes)


def test_dicts_as_labels_are_not_joined_in_silence(tmp_path):
    with pytest.raises(ConfigurationError, match="eval_do_concat_batches=False"):
        trainer(rt_detr(), tmp_path, eval_do_concat_batches=True).train()


