"""Of a model with several heads the bias of the one that makes the logits is tuned."""

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    ConvNextConfig,
    DPTConfig,
    DPTForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from metricopt_hf import FiLM

TINY = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}


def beit():
    config = BeitConfig(
        image_size=32, patch_size=8, out_indices=[1, 2, 3, 4], num_labels=3, auxiliary_channels=8, **TINY
    )
    return BeitForSemanticSegmentation(config)


def upernet():
    backbone = ConvNextConfig(
        hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone,
            hidden_size=8,
            auxiliary_in_channels=8,
            auxiliary_channels=8,
            num_labels=3,
            pool_scales=[1],
        )
    )


def dpt():
    config = DPTConfig(
        image_size=32,
        patch_size=8,
        num_labels=3,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        **TINY,
    )
    return DPTForSemanticSegmentation(config)


def deeplab():
    segmentation = pytest.importorskip("torchvision").models.segmentation
    return segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)


@pytest.mark.parametrize("make", [beit, upernet, dpt, deeplab])
def test_what_is_tuned_moves_the_logits(make):
    torch.manual_seed(0)
    size = 64 if make in (upernet, deeplab) else 32
    model, image = make().train(), torch.randn(4, 3, size, size)
    with torch.no_grad():
        for _ in range(20):  # batch statistics of a net that was trained
            model(image)
    phi = FiLM(model.eval())
    assert phi.names[-1] in ("decode_head.classifier.bias", "head.head.4.bias", "classifier.4.bias")
    assert not any("aux" in name for name in phi.names)

    def outputs():
        with torch.no_grad():
            result = model(image)
        return [result["out"] if make is deeplab else result.logits]

    # what the heads of BEiT and DPT take from the encoder lies in front of its last norms
    unused = {beit: "beit.layers.3.", dpt: "dpt.layernorm."}.get(make, "-")
    (before,) = outputs()
    for name, parameter in zip(phi.names, phi.parameters, strict=True):
        with phi.restored(), torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
            assert torch.equal(outputs()[0], before) == name.startswith(unused), name
