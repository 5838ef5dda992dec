"""The contract of all spaces; and their parameters sharded."""

import pytest
import torch
from helpers import tiny_bert
from phi_models import lora, outputs, somewhere, tokens
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from metricopt_hf.errors import PhiError
from metricopt_hf.phi import FiLM, Subset, adapter


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
