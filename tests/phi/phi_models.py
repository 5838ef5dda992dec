"""Models of many kinds, each with what FiLM should choose on it."""

import peft
import timm
import torch
from detectors import d_fine, detr, rt_detr, yolos
from helpers import tiny_bert
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


def timm_model(name, **kwargs):
    return timm.create_model(name, num_classes=5, **kwargs)


def hf_vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            num_labels=5,
        )
    )


def hf_resnet():
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5)
    )


def llama():
    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_labels=5,
            pad_token_id=0,
        )
    )


def torch_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 5))


def images():
    return torch.randn(2, 3, 32, 32)


def detector_images():
    return torch.rand(2, 3, 64, 64)


def tokens():
    return torch.randint(1, 8, (2, 7))


# what makes the model, what it takes, and what FiLM should choose on it
ZOO = {
    "timm vit": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48),
        images,
        ["blocks.2.norm1", "blocks.2.norm2", "norm"],
        "head.bias",
    ),
    "timm resnet": (lambda: timm_model("resnet18"), images, ["layer4.1.bn1", "layer4.1.bn2"], "fc.bias"),
    "timm efficientnet": (  # BatchNormAct2d: the activation is in the norm, and works in place
        lambda: timm_model("efficientnet_b0"),
        images,
        ["blocks.6.0.bn1.drop", "blocks.6.0.bn2.drop", "blocks.6.0.bn3.drop", "bn2.drop"],
        "classifier.bias",
    ),
    "timm convnext": (
        lambda: timm_model("convnext_atto"),
        images,
        ["stages.3.downsample.0", "stages.3.blocks.0.norm", "stages.3.blocks.1.norm", "head.norm"],
        "head.fc.bias",
    ),
    "timm convnextv2": (  # its blocks also hold GlobalResponseNorm, which does not merge
        lambda: timm_model("convnextv2_atto"),
        images,
        ["stages.3.blocks.1.norm", "head.norm"],
        "head.fc.bias",
    ),
    "timm resnetv2": (  # the classifier is a convolution
        lambda: timm_model("resnetv2_50", layers=(1, 1, 1, 1)),
        images,
        ["stages.3.blocks.0.norm1.drop", "stages.3.blocks.0.norm2.drop", "stages.3.blocks.0.norm3.drop", "norm.drop"],
        "head.fc.bias",
    ),
    "bert": (
        tiny_bert,
        tokens,
        ["bert.encoder.layer.1.attention.output.LayerNorm", "bert.encoder.layer.1.output.LayerNorm"],
        "classifier.bias",
    ),
    "hf vit": (
        hf_vit,
        images,
        ["vit.layers.1.layernorm_before", "vit.layers.1.layernorm_after", "vit.layernorm"],
        "classifier.bias",
    ),
    "hf resnet": (
        hf_resnet,
        images,
        [f"resnet.encoder.stages.1.layers.1.layer.{i}.normalization" for i in (0, 1)],
        "classifier.1.bias",
    ),
    "llama": (
        llama,
        tokens,
        ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"],
        None,
    ),
    "rt-detr": (
        rt_detr,
        detector_images,
        [f"model.decoder.layers.1.{name}_layer_norm" for name in ("self_attn", "encoder_attn", "final")],
        "model.decoder.class_embed.1.bias",
    ),
    "d-fine": (  # the output layer has two names
        d_fine,
        detector_images,
        [f"model.decoder.layers.1.{name}" for name in ("self_attn_layer_norm", "final_layer_norm", "gateway.norm")],
        "model.decoder.class_embed.1.bias",
    ),
    "detr": (  # the box head has as many outputs as the class head
        detr,
        detector_images,
        [f"model.decoder.layers.1.{name}_layer_norm" for name in ("self_attn", "encoder_attn", "final")]
        + ["model.decoder.layernorm"],
        "class_labels_classifier.bias",
    ),
    "yolos": (
        yolos,
        detector_images,
        ["vit.encoder.layer.1.layernorm_before", "vit.encoder.layer.1.layernorm_after", "vit.layernorm"],
        "class_labels_classifier.layers.2.bias",
    ),
    # without gradients it takes a fused path that could pass a hook by
    "torch encoder": (torch_encoder, lambda: torch.randn(2, 5, 16), ["0.layers.1.norm1", "0.layers.1.norm2"], "1.bias"),
}


def build(name):
    make, make_inputs, *_ = ZOO[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # fresh statistics are 0 and 1, which hides mistakes
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
        if hasattr(module, "weight") and "norm" in type(module).__name__.lower():
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, 0, 0.2)
    return model, make_inputs()


@torch.no_grad()
def outputs(model, inputs):
    answer = model(inputs)
    return getattr(answer, "logits", answer)


def somewhere(phi, size=0.3):
    return phi.read() + size * torch.randn(phi.dim)


def lora():
    return peft.get_peft_model(tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2))
