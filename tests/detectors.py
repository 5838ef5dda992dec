"""Tiny detectors of several families, and images with boxes for them."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

CLASSES = ["disc", "square", "cross"]
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
TRANSFORMER = {
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 10,
    **LABELS,
}
PYRAMID = {"encoder_in_channels": [8, 16, 16], "encoder_hidden_dim": 16, "decoder_in_channels": [16, 16, 16]}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16]}


def rt_detr() -> RTDetrForObjectDetection:
    backbone = RTDetrResNetConfig(
        embedding_size=8, layer_type="basic", out_features=["stage2", "stage3", "stage4"], **STAGES
    )
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=backbone, freeze_backbone_batch_norms=False, num_denoising=10, **PYRAMID, **TRANSFORMER
        )
    )


def d_fine() -> DFineForObjectDetection:
    """Its heads share their parameters with those of its decoder."""
    backbone = HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
        **STAGES,
    )
    return DFineForObjectDetection(
        DFineConfig(backbone_config=backbone, decoder_n_points=[2, 2, 2], num_denoising=10, **PYRAMID, **TRANSFORMER)
    )


def detr() -> DetrForObjectDetection:
    """Three classes and "no object": as many logits as a box has numbers."""
    backbone = ResNetConfig(embedding_size=8, layer_type="basic", out_features=["stage4"], **STAGES)
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, encoder_layers=1, **TRANSFORMER))


def yolos() -> YolosForObjectDetection:
    return YolosForObjectDetection(
        YolosConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=[64, 64],
            patch_size=16,
            num_detection_tokens=10,
            use_mid_position_embeddings=False,
            **LABELS,
        )
    )


PROCESSORS = {
    "rt_detr": lambda: RTDetrImageProcessor(size={"height": 64, "width": 64}),
    # images keep their shapes
    "yolos": lambda: YolosImageProcessor(size={"shortest_edge": 48, "longest_edge": 96}),
}


def save_detector(folder: Path, name: str = "rt_detr") -> str:
    torch.manual_seed(0)
    {"rt_detr": rt_detr, "yolos": yolos}[name]().save_pretrained(folder)
    PROCESSORS[name]().save_pretrained(folder)
    return str(folder)


def save_boxes(folder: Path, sizes: dict[str, int], change=lambda row: None, fields=("bbox", "category")) -> str:
    """A local data set of grey rectangles on black images of different sizes, the brighter the higher their class.

    Args:
        sizes: images per split.
        change: may spoil an image's objects in place; called with {"bbox": [...], "category": [...]}.
        fields: what boxes and categories are called.
    """
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    objects = {fields[0]: datasets.List(datasets.List(datasets.Value("float32"), length=4))}
    objects[fields[1]] = datasets.List(datasets.ClassLabel(names=CLASSES))
    features = datasets.Features({"picture": datasets.Image(), "objects": objects})
    for split, size in sizes.items():
        rows = []
        for _ in range(size):
            height, width = generator.integers(50, 90, 2)
            image, row = np.zeros((height, width, 3), np.uint8), {"bbox": [], "category": []}
            for category in generator.integers(0, 3, generator.integers(1, 4)):
                w, h = generator.integers(10, 30, 2)
                x, y = generator.integers(0, width - w), generator.integers(0, height - h)
                image[y : y + h, x : x + w] = 80 + 80 * category
                row["bbox"].append([float(n) for n in (x, y, w, h)])
                row["category"].append(int(category))
            change(row)
            rows.append({"picture": image, "objects": dict(zip(fields, row.values(), strict=True))})
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)
