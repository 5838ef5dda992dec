"""The value network and its fit: what it must recover, and what must not matter."""

import inspect

import numpy as np
import pytest
import torch

from metricopt_hf import ValueFunctionError
from metricopt_hf.value import ValueNetwork, fit

K = 5
SLOPE = np.array([1.0, -2.0, 0.5, 0.0, 1.5])
OPTIMUM = np.array([0.5, -0.5, 1.0, 0.0, -1.0])


def linear(z):
    return z @ SLOPE


def quadratic(z):
    return -((z - OPTIMUM) ** 2).sum(-1)


def observed(function=linear, n=100, noise=0.3, spread=1.0, seed=0):
    """Points and noisy scores."""
    rng = np.random.default_rng(seed)
    z = (spread * rng.normal(size=(n, K))).astype(np.float32)
    return torch.as_tensor(z), torch.as_tensor(function(z) + noise * rng.normal(size=n))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fitted(z, scores, seed=0, steps=200, **kwargs):
    network = ValueNetwork(K, **kwargs)
    fit(network, z, scores, generator(seed), steps)
    return network


def error(network, z, scores):
    """Root mean squared error of the predictions, in standard deviations of the scores."""
    return float((network.predict(z)[0] - scores).square().mean().sqrt() / scores.std())


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("function", [linear, quadratic])
def test_the_gradient_points_where_the_function_rises(function):
    network = fitted(*observed(function))
    points = observed(function, n=20, spread=0.7, seed=1)[0].numpy()
    truth = np.tile(SLOPE, (20, 1)) if function is linear else -2 * (points - OPTIMUM)
    found = network.gradient(torch.as_tensor(points)).numpy()
    assert np.mean([cosine(a, b) for a, b in zip(found, truth, strict=True)]) > 0.9


def test_predictions_are_in_the_metrics_own_unit():
    z, scores = observed()
    assert error(fitted(z, 50 + scores), z, 50 + linear(z)) < 0.25


def test_the_spread_is_at_least_that_of_a_noisy_metric():
    z = observed()[0]
    quiet, noisy = (fitted(*observed(noise=noise, n=400)).predict(z)[1].mean() for noise in (0.1, 2.0))
    assert quiet < 0.5 and 1.5 < noisy < 3.5


def test_another_unit_of_the_metric_gives_the_same_function_in_that_unit():
    z, scores = observed()
    plain, rescaled, where = fitted(z, scores), fitted(z, 1000 * scores - 7), z[:5]
    assert torch.allclose(rescaled.predict(where)[0], 1000 * plain.predict(where)[0] - 7, rtol=1e-2, atol=5)
    assert torch.allclose(rescaled.gradient(where), 1000 * plain.gradient(where), rtol=2e-2, atol=5)


def test_the_gradient_is_that_of_the_predicted_mean():
    network = fitted(*observed(quadratic)).double()
    z, step = torch.randn(4, K, dtype=torch.float64), 1e-5
    numeric = torch.stack(
        [
            (network.predict(z + step * e)[0] - network.predict(z - step * e)[0]) / (2 * step)
            for e in torch.eye(K, dtype=torch.float64)
        ],
        dim=-1,
    )
    assert torch.allclose(network.gradient(z), numeric, rtol=1e-5, atol=1e-7)
    assert torch.allclose(network.gradient(z[0]), numeric[0], rtol=1e-5, atol=1e-7)


def test_the_gradient_is_what_autograd_makes_of_the_same_network():
    generator = torch.Generator().manual_seed(3)
    network = ValueNetwork(K, num_members=3)
    with torch.no_grad():
        for tensor in [*network.parameters(), network.z_mean, network.score_std]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        network.z_std.fill_(1.5)
    for z in (torch.randn(K, generator=generator), torch.randn(4, K, generator=generator)):
        points = z.expand(3, *z.shape).clone().requires_grad_()
        (by_autograd,) = torch.autograd.grad(network(points.reshape(3, -1, K)).sum(), points)
        gradient = network.gradient(z)
        assert torch.equal(gradient, (by_autograd * network.score_std).mean(0))


def test_one_point_and_many_give_the_same_numbers():
    network = fitted(*observed())
    z = torch.randn(3, K)
    mean, std = network.predict(z)
    assert mean.shape == std.shape == (3,) and network.gradient(z).shape == (3, K)
    one_mean, one_std = network.predict(z[1])
    assert one_mean.shape == one_std.shape == ()
    assert torch.allclose(one_mean, mean[1]) and torch.allclose(one_std, std[1])


@pytest.mark.parametrize("shape", [(K + 1,), (3, K - 1), (2, 3, K), ()])
def test_points_of_another_shape_are_refused(shape):
    for ask in (ValueNetwork(K).predict, ValueNetwork(K).gradient):
        with pytest.raises(ValueFunctionError, match=rf"\[n, {K}\]"):
            ask(torch.zeros(shape))


@pytest.mark.parametrize("sizes", [(0, 32, 5), (3, 0, 5), (3, 32, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueFunctionError, match="at least 1"):
        ValueNetwork(*sizes)


def test_a_network_is_started_from_a_given_one_or_from_the_generator():
    given, z = fitted(*observed(), num_members=3), torch.randn(4, K)
    copy = ValueNetwork.started(K, given, generator())
    assert torch.equal(copy.predict(z)[0], given.predict(z)[0]) and copy.weights[0] is not given.weights[0]
    first, same, other = (ValueNetwork.started(K, None, generator(seed)).weights[0] for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


# ---- what the fit makes of its data


def test_the_ensemble_disagrees_more_where_nothing_was_observed():
    network = fitted(*observed())
    assert network.predict(torch.full((K,), 8.0))[1] > 2 * network.predict(torch.zeros(K))[1]


def test_the_generator_is_the_only_randomness():
    def weights(seed):
        torch.rand(seed + 1)  # the global state is another each time
        return fitted(*observed(), seed=seed, steps=5).weights[0]

    state = torch.get_rng_state()
    first = weights(0)
    torch.rand(3)
    assert torch.equal(weights(0), first) and not torch.equal(weights(1), first)
    torch.set_rng_state(state)
    fitted(*observed(), steps=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_warm_fit_goes_on_from_where_it_was():
    z, scores = observed(quadratic, noise=0.0)
    warm = fitted(z, scores, steps=150)
    fit(warm, z, scores, generator(1), steps=10)
    assert error(warm, z, scores) < 0.7 * error(fitted(z, scores, steps=10), z, scores)


@pytest.mark.parametrize(
    ("z", "scores"),
    [
        (torch.zeros(1, K), torch.zeros(1)),
        (torch.full((3, K), torch.nan), torch.arange(3.0)),
        (torch.zeros(3, K), torch.tensor([0, 1, torch.inf])),
    ],
    ids=["one observation", "nan coordinates", "infinite score"],
)
def test_what_cannot_be_fitted_is_refused(z, scores):
    with pytest.raises(ValueError, match="at least two observations and finite"):
        fit(ValueNetwork(K), z, scores, generator())


@pytest.mark.parametrize("constant", ["scores", "points"])
def test_data_without_any_spread_gives_finite_predictions(constant):
    z, scores = observed(n=8)
    z, scores = (z, torch.full((8,), 0.5)) if constant == "scores" else (torch.ones_like(z), scores)
    network = fitted(z, scores, steps=20)
    answers = [*network.predict(z), network.gradient(z)]
    assert all(answer.isfinite().all() for answer in answers)
    assert torch.allclose(answers[0].mean(), scores.mean().float(), atol=0.3)


def test_very_many_observations_are_taken_in_batches(monkeypatch):
    monkeypatch.setitem(inspect.unwrap(fit).__globals__, "BATCH_SIZE", 64)
    network, sizes = ValueNetwork(K), []
    network.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    fit(network, *observed(n=400), generator(), steps=200)
    assert set(sizes[:200]) == {64}
    assert cosine(network.gradient(torch.zeros(K)).numpy(), SLOPE) > 0.9
