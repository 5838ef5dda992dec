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
    phi.model.requires_grad_(False)
    phi.parameters[0].requires_grad_(True)
    gradient = phi.gradient(lambda: loss(phi, inputs))
    assert gradient.shape == (phi.dim,) and gradient.dtype == torch.float32
    assert [p.requires_grad for p in phi.parameters] == [True] + [False] * (len(phi.names) - 1)
    step = 1e-3 * torch.randn(phi.dim)
    ends = []
    for sign in (1, -1):
        phi.write(centre + sign * step)
        ends.append(float(loss(phi, inputs).detach()))
    assert float(gradient @ step) == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-3)
    assert all(p.grad is None for p in phi.model.parameters())


@pytest.mark.parametrize("name", SPACES)
def test_a_parameter_that_the_loss_does_not_use_has_no_gradient(name):
    phi = space(name)
    last = phi.parameters[-1]
    gradient = phi.gradient(lambda: last.square().sum())
    assert not gradient[: phi.dim - last.numel()].any() and gradient.isfinite().all()


@pytest.mark.parametrize("name", SPACES)
def test_a_vector_of_another_size_is_refused(name):
    phi = space(name)
    with pytest.raises(PhiError, match=str(phi.dim)):
        phi.write(torch.zeros(phi.dim + 1))


@pytest.mark.parametrize("name", SPACES)
def test_the_saved_state_puts_everything_back_on_the_saved_weights(name):
    phi, inputs = space(name), tokens()
    phi.write(somewhere(phi))
    expected, state = outputs(phi.model, inputs), phi.state_dict()
    weights = phi.model.state_dict()

    other = space(name)
    other.model.load_state_dict(weights)
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


def test_a_sum_s_parts_follow_each_other():
    model = tiny_bert().eval()
    film, head = (
        FiLM(model, output_bias=False),
        Subset(model, r"classifier\.weight") + Subset(model, r"classifier\.bias"),
    )
    both = film + head
    assert both.names == film.names + head.names and both.dim == film.dim + head.dim
    where = somewhere(both)
    both.write(where)
    assert torch.equal(film.read(), where[: film.dim]) and torch.equal(head.read(), where[film.dim :])
    assert both.output_bias_slice is None
    swapped = Subset(model, "pooler") + FiLM(model)
    assert swapped.output_bias_slice == slice(swapped.dim - 3, swapped.dim)
    both.reset()
    assert torch.equal(both.read()[: film.dim], torch.zeros(film.dim))


# ---- sharded parameters (FSDP2), in one process


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["film", "subset"])
def test_a_sharded_phi_is_read_moved_restored_and_differentiated(mesh, name):
    plain, phi = space(name), space(name)
    fully_shard(phi.model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in phi.parameters)
    assert torch.equal(phi.read(), plain.read())

    target = somewhere(phi)
    with phi.restored():
        phi.write(target)
        assert torch.equal(phi.read(), target)
    assert torch.equal(phi.read(), plain.read())

    inputs = tokens()
    gradients = [space_.gradient(lambda space_=space_: loss(space_, inputs)) for space_ in (plain, phi)]
    assert torch.allclose(*gradients, atol=1e-6)
    phi.load_state_dict(plain.state_dict())
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in phi.state_dict().items())
