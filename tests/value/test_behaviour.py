"""The summary of predictions that a value function over behaviour reads."""

import pytest
import torch

from metricopt_hf.value import Behaviour
from metricopt_hf.value.behaviour import CLASSES, IDENTITIES, NUMBERS, QUANTILES

N, C = 40, 4


def rows(kind, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(N, C, generator=generator, dtype=dtype)
    if kind == NUMBERS:
        return outputs, outputs @ torch.randn(C, 2, generator=generator, dtype=dtype) + 3
    return outputs, torch.randint(3, (N,), generator=generator)


@pytest.mark.parametrize("kind", [CLASSES, NUMBERS, IDENTITIES])
def test_it_has_the_size_that_it_says_and_no_order(kind):
    outputs, labels = rows(kind)
    behaviour = Behaviour.of(outputs, labels, kind)
    summary, order = behaviour.summary(outputs, labels), torch.randperm(N)
    assert summary.shape == (behaviour.size,) and summary.isfinite().all()
    torch.testing.assert_close(behaviour.summary(outputs[order], labels[order]), summary)
    assert not torch.allclose(behaviour.summary(outputs, labels[order]), summary, atol=1e-3)  # it reads the labels
    assert Behaviour(**{k: v for k, v in behaviour.description.items() if k != "version"}) == behaviour


@pytest.mark.parametrize("kind", [CLASSES, NUMBERS, IDENTITIES])
def test_its_gradient_is_that_of_finite_differences(kind):
    outputs, labels = rows(kind, dtype=torch.float64)
    behaviour = Behaviour.of(outputs, labels, kind)
    assert torch.autograd.gradcheck(lambda o: behaviour.summary(o, labels), (outputs.requires_grad_(),))


def test_of_classes_it_is_near_recall_and_precision_whatever_the_scale():
    outputs, labels = rows(CLASSES)
    outputs[range(N), labels] += 1.0
    behaviour = Behaviour.of(outputs, labels, CLASSES)
    predicted = outputs.argmax(1)
    for scale in (0.01, 1, 100):
        summary = behaviour.summary(scale * outputs, labels)
        for c in range(3):
            hits = ((predicted == c) & (labels == c)).sum()
            assert float(summary[c]) == pytest.approx(float(hits / (labels == c).sum()), abs=0.05)
            assert float(summary[C + c]) == pytest.approx(float(hits / (predicted == c).sum()), abs=0.05)


def test_of_embeddings_any_width_will_do():
    """A net of another width is another model with the same kind of behaviour."""
    for width in (3, 50):
        outputs = torch.randn(N, width)
        behaviour = Behaviour.of(outputs, torch.arange(N) // 2, IDENTITIES)
        assert behaviour == Behaviour(IDENTITIES, 0, 0) and behaviour.size == 3 * len(QUANTILES)


def test_better_embeddings_have_greater_margins():
    labels = torch.arange(N) // 4
    noise, centres = torch.randn(N, 16), torch.randn(N, 16)[labels]
    behaviour = Behaviour(IDENTITIES, 0, 0)
    far, near = (behaviour.summary(centres + scale * noise, labels)[-len(QUANTILES) :] for scale in (2.0, 0.2))
    assert (near > far).all()


def test_where_there_is_nothing_to_compare_it_is_still_finite():
    one = torch.randn(1, C)
    for kind, labels in ((CLASSES, torch.zeros(1).long()), (NUMBERS, torch.zeros(1, 1)), (IDENTITIES, torch.arange(1))):
        assert Behaviour.of(one, labels, kind).summary(one, labels).isfinite().all()
    same = torch.zeros(N, C)
    assert Behaviour.of(same, torch.zeros(N).long(), CLASSES).summary(same, torch.zeros(N).long()).isfinite().all()
