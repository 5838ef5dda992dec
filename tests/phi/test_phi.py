"""phi: FiLM, subsets, adapters and their sums; one contract over all of them, then what is particular to each."""

import copy
import re

import peft
import pytest
import timm
import torch
from detectors import d_fine, detr, rt_detr, yolos
from helpers import tiny_bert
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from metricopt_hf.errors import PhiError
from metricopt_hf.phi import FiLM, Subset, adapter, from_spec


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


# ---- FiLM


@pytest.mark.parametrize("name", ZOO)
def test_film_is_the_identity_at_first_and_folds_into_plain_weights(name):
    model, inputs = build(name)
    keys, before = list(model.state_dict()), outputs(model, inputs)
    phi = FiLM(model)
    assert torch.equal(outputs(model, inputs), before)

    phi.write(somewhere(phi))
    tuned = outputs(model, inputs)
    assert (tuned - before).abs().max() > 1e-3
    merged = model.state_dict()
    phi.merge()
    assert torch.allclose(outputs(model, inputs), tuned, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == keys == list(merged)
    assert all(torch.equal(merged[key], tensor) for key, tensor in model.state_dict().items())

    fresh = ZOO[name][0]().eval()
    fresh.load_state_dict(merged, strict=True)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", ZOO)
def test_film_chooses_the_norms_of_the_last_block_and_the_output_bias(name):
    *_, hosts, bias = ZOO[name]
    phi = FiLM(build(name)[0])
    assert list(dict.fromkeys(n.rpartition(".")[0] for n in phi.inserted)) == hosts
    assert phi.names == phi.inserted + ((bias,) if bias else ())


def test_a_norm_without_bias_gets_a_scale_only():
    assert {n.rpartition(".")[2] for n in FiLM(llama()).names} == {"film_scale"}


def test_film_acts_alike_with_and_without_gradients():
    model, inputs = build("torch encoder")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    assert torch.allclose(model(inputs), outputs(model, inputs), atol=1e-5)


def test_layers_are_chosen_by_a_regular_expression():
    phi = FiLM(tiny_bert(), layers=r"layer\.0\.output", output_bias=False)
    assert phi.names == tuple(f"bert.encoder.layer.0.output.LayerNorm.film_{part}" for part in ("scale", "shift"))


def test_building_film_leaves_modes_weights_and_random_state_alone():
    model = timm_model("test_resnet").train()
    weights, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    FiLM(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_a_copy_of_a_modulated_model_is_independent():
    model, inputs = build("bert")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    twin, before = copy.deepcopy(phi), outputs(model, inputs)
    assert torch.equal(outputs(twin.model, inputs), before)

    phi.write(somewhere(phi))
    assert torch.equal(outputs(twin.model, inputs), before)
    twin.merge()
    assert torch.allclose(outputs(twin.model, inputs), before, atol=1e-6)
    assert phi.inserted and not torch.allclose(outputs(model, inputs), before, atol=1e-3)


def test_the_saved_weights_fold_with_the_phi_that_was_saved_with_them():
    model, inputs = build("bert")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    saved, then = copy.deepcopy(model.state_dict()), outputs(model, inputs)
    phi.write(somewhere(phi))
    fresh = tiny_bert().eval()
    fresh.load_state_dict(saved)
    assert torch.allclose(outputs(fresh, inputs), then, atol=1e-5)


def test_folding_twice_changes_nothing_more():
    model, inputs = build("bert")
    phi = FiLM(model)
    phi.write(somewhere(phi))
    phi.merge()
    once = outputs(model, inputs)
    phi.merge()
    assert torch.equal(outputs(model, inputs), once)
    assert list(model.state_dict()) == list(model.state_dict())
    assert FiLM(model).inserted  # and another can be built


def test_in_bfloat16_a_step_smaller_than_its_resolution_still_acts():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 3)).bfloat16()
    phi, x = FiLM(model), torch.randn(8, 64, dtype=torch.bfloat16)
    before = model[0](x).float().abs().sum()
    phi.write(torch.full((phi.dim,), 2e-3))
    assert model[0](x).float().abs().sum() > before
    assert phi.read().dtype == torch.float32 and phi.read()[0] == 2e-3
    assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("output_bias", ["auto", True])
def test_the_output_bias_is_part_of_phi_where_there_is_one(output_bias):
    assert "classifier.bias" in FiLM(tiny_bert(), output_bias=output_bias).names


def test_without_an_output_bias_one_can_be_named():
    with pytest.raises(PhiError, match="output_bias=False.*Subset"):
        FiLM(llama(), output_bias=True)


def no_norms():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class OffsetNorm(nn.LayerNorm):
    """(1 + weight) * x + bias, as Gemma's: a scale behind it does not merge into the weight."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)


@pytest.mark.parametrize(
    ("make", "layers", "named"),
    [
        (no_norms, None, r"phi='2\\.bias$' takes 2.bias"),
        (no_norms, "norm", r"phi='2\\.bias$' takes 2.bias"),
        (lambda: nn.Sequential(OffsetNorm(4), nn.Linear(4, 2)), None, r"phi='1\\.bias$' takes 1.bias"),
        (lambda: nn.Sequential(OffsetNorm(4), nn.Linear(4, 2)), "0", "OffsetNorm"),
        (tiny_bert, "nowhere", "bert.encoder.layer.1.output.LayerNorm"),
        (tiny_bert, "(", "no regular expression"),
    ],
)
def test_what_film_cannot_reach_is_answered_with_what_could_be_used(make, layers, named):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(PhiError, match=re.escape(named)):
        FiLM(model, layers)
    assert list(model.state_dict()) == keys


def test_two_films_on_one_layer_are_refused():
    model = tiny_bert()
    FiLM(model)
    with pytest.raises(PhiError, match="merge the first FiLM"):
        FiLM(model)


# ---- Subset, adapter, sums, specs


def test_a_subset_that_matches_nothing_names_parameters_that_exist():
    with pytest.raises(PhiError, match="classifier.bias"):
        Subset(tiny_bert(), "nowhere")
    with pytest.raises(PhiError, match="no regular expression"):
        Subset(tiny_bert(), "(")


def test_whole_numbers_are_no_part_of_a_subset():
    model = nn.Linear(2, 3)
    model.register_parameter("steps", nn.Parameter(torch.zeros(4, dtype=torch.int64), requires_grad=False))
    assert Subset(model, ".").names == ("weight", "bias")


def lora():
    return peft.get_peft_model(tiny_bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2))


def test_an_adapter_is_what_peft_trains():
    model = lora()
    names = set(adapter(model).names)
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in names) and not any("embeddings" in name for name in names)


def test_without_an_adapter_the_way_to_one_is_shown():
    with pytest.raises(PhiError, match="get_peft_model"):
        adapter(tiny_bert())
    frozen = lora().requires_grad_(False)
    with pytest.raises(PhiError, match="is_trainable"):
        adapter(frozen)


def test_a_parameter_is_in_a_sum_once_and_of_one_model():
    model = tiny_bert()
    phi = FiLM(model)
    with pytest.raises(PhiError, match="classifier.bias"):
        phi + Subset(model, "classifier")
    with pytest.raises(PhiError, match="same model"):
        phi + Subset(tiny_bert(), "pooler")


@pytest.mark.parametrize(("spec", "kind"), [("film", FiLM), ("adapter", Subset), (r"classifier\.", Subset)])
def test_a_string_names_a_space(spec, kind):
    phi = from_spec(lora() if spec == "adapter" else tiny_bert(), spec)
    assert type(phi) is kind
    assert spec != r"classifier\." or phi.names == ("classifier.weight", "classifier.bias")


# ---- the contract of all spaces


def film_and_subset(model):
    return FiLM(model, output_bias=False) + Subset(model, "classifier")


SPACES = {
    "film": (tiny_bert, FiLM),
    "subset": (tiny_bert, lambda model: Subset(model, r"layer\.1\..*dense")),
    "adapter": (lora, adapter),
    "sum": (tiny_bert, film_and_subset),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def space(name, dtype=torch.float32):
    make, attach = SPACES[name]
    return attach(make().eval().to(dtype))


def loss(phi, inputs):
    return phi.model(inputs).logits.double().pow(2).sum()


@pytest.mark.parametrize("name", SPACES)
def test_what_is_written_is_read_and_nothing_else_moves(name):
    phi = space(name)
    others = {n: p.detach().clone() for n, p in phi.model.named_parameters() if n not in phi.names}
    target = somewhere(phi)
    phi.write(target)
    assert phi.read().dtype == torch.float32 and phi.read().shape == (phi.dim,)
    assert torch.equal(phi.read(), target)
    assert all(torch.equal(phi.model.get_parameter(n), tensor) for n, tensor in others.items())


@pytest.mark.parametrize("name", SPACES)
def test_what_is_read_is_a_copy(name):
    phi = space(name)
    before = phi.read()
    phi.read().add_(1)
    assert torch.equal(phi.read(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPACES)
def test_phi_is_restored_bit_for_bit_even_from_an_error(name, dtype):
    phi = space(name, DTYPES[dtype])
    phi.write(somewhere(phi))
    before = [p.detach().clone() for p in phi.parameters]
    with pytest.raises(KeyError), phi.restored():
        phi.write(somewhere(phi))
        assert not torch.equal(phi.parameters[0], before[0])
        raise KeyError
    assert all(torch.equal(p, b) and p.dtype == b.dtype for p, b in zip(phi.parameters, before, strict=True))


@pytest.mark.parametrize("name", SPACES)
def test_the_gradient_is_that_of_the_loss_along_phi(name):
    phi = space(name, torch.float64)
    phi.write(somewhere(phi, 0.1))
    inputs, centre = tokens(), phi.read()
    loss(phi, inputs).backward()
    step = 1e-3 * torch.randn(phi.dim)
    ends = []
    for sign in (1, -1):
        phi.write(centre + sign * step)
        ends.append(float(loss(phi, inputs).detach()))
    assert float(phi.read_grad() @ step) == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPACES)
def test_gradients_are_added_and_made_where_there_are_none(name, dtype):
    phi = space(name, DTYPES[dtype])
    first, second = torch.randn(2, phi.dim).bfloat16().float()
    assert torch.equal(phi.read_grad(), torch.zeros(phi.dim))
    phi.parameters[0].grad = torch.zeros_like(phi.parameters[0])
    phi.add_grad(first)
    assert torch.equal(phi.read_grad(), first)
    phi.add_grad(second)
    assert torch.allclose(phi.read_grad(), first + second, rtol=1e-2, atol=1e-2)
    assert all(p.grad.dtype == p.dtype for p in phi.parameters)
    first.zero_()  # the gradients are not views of what was added
    assert phi.read_grad().abs().sum() > 0


@pytest.mark.parametrize("name", SPACES)
def test_a_vector_of_another_size_is_refused(name):
    phi = space(name)
    for act in (phi.write, phi.add_grad):
        with pytest.raises(PhiError, match=str(phi.dim)):
            act(torch.zeros(phi.dim + 1))


@pytest.mark.parametrize("name", SPACES)
def test_the_saved_state_puts_everything_back_on_a_folded_checkpoint(name):
    phi, inputs = space(name), tokens()
    phi.write(somewhere(phi))
    expected, state = outputs(phi.model, inputs), phi.state_dict()
    merged = phi.model.state_dict()

    other = space(name)
    other.model.load_state_dict(merged, strict=not other.inserted)
    other.load_state_dict(state)
    assert torch.equal(outputs(other.model, inputs), expected)
    assert torch.equal(other.read(), phi.read())


@pytest.mark.parametrize("name", SPACES)
def test_a_state_of_another_phi_is_refused(name):
    phi = space(name)
    state, before = phi.state_dict(), phi.read()
    fewer = dict(list(state.items())[1:])
    reshaped = {n: t.reshape(1, -1) for n, t in state.items()}
    for other in (fewer, {**state, "more": torch.zeros(1)}, reshaped):
        with pytest.raises(PhiError, match="same `phi`"):
            phi.load_state_dict(other)
    assert torch.equal(phi.read(), before)


@pytest.mark.parametrize("name", SPACES)
def test_fold_leaves_the_function_and_the_names_of_a_plain_model(name):
    make, _ = SPACES[name]
    phi, inputs = space(name), tokens()
    phi.write(somewhere(phi))
    expected = outputs(phi.model, inputs)
    phi.merge()
    assert torch.allclose(outputs(phi.model, inputs), expected, atol=1e-5)
    assert list(phi.model.state_dict()) == list(make().state_dict())


# ---- sharded parameters (FSDP2), in one process


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["film", "subset"])
def test_a_sharded_phi_is_read_moved_restored_and_given_gradients(mesh, name):
    plain, phi = space(name), space(name)
    fully_shard(phi.model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in phi.parameters)
    assert torch.equal(phi.read(), plain.read())

    target, vector = somewhere(phi), torch.randn(phi.dim)
    with phi.restored():
        phi.write(target)
        assert torch.equal(phi.read(), target)
    assert torch.equal(phi.read(), plain.read())

    phi.add_grad(vector)
    phi.add_grad(vector)
    assert all(isinstance(p.grad, DTensor) for p in phi.parameters)
    assert torch.equal(phi.read_grad(), 2 * vector)
    phi.load_state_dict(plain.state_dict())
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in phi.state_dict().items())
