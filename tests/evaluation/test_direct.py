"""An `evaluate` module called on arrays: the same result, module by module, or the long way."""

import datasets
import evaluate
import numpy as np
import pytest

from metricopt_hf import metrics
from metricopt_hf.evaluation.direct import TRIED, DirectModule

RNG = np.random.default_rng(0)
CLASSES, SCORES = RNG.integers(0, 3, (2, 200)), RNG.random((200, 3))
EMBEDDINGS, GROUPS = RNG.normal(size=(60, 4)), RNG.integers(0, 2, 200)
BINARY = {"predictions": CLASSES[0] % 2, "references": CLASSES[1] % 2, "groups": GROUPS}
ARGUMENTS = {
    "worst_group_accuracy": BINARY,
    "equalized_odds_gap": BINARY,
    "macro_auprc": {"prediction_scores": SCORES / SCORES.sum(1, keepdims=True), "references": CLASSES[1]},
    "map_at_r": {"predictions": EMBEDDINGS, "references": CLASSES[1][:60]},
    "recall_at_k": {"predictions": EMBEDDINGS, "references": CLASSES[1][:60]},
}


@pytest.mark.parametrize("name", metrics.names())
def test_every_shipped_module_takes_the_short_way_with_the_same_result(name):
    module = evaluate.load(metrics.path(name), keep_in_memory=True)
    arguments = ARGUMENTS.get(name, {"predictions": CLASSES[0], "references": CLASSES[1]})
    expected, direct = module.compute(**arguments), DirectModule(module)
    results = [direct.compute(**arguments) for _ in range(TRIED + 1)]
    assert direct.is_direct and all(result == expected for result in results)


class Own(evaluate.Metric):
    """Truncates nothing by itself; `kind` says what it does with its inputs."""

    kind = "count"

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, scale=1.0):
        if self.kind == "lists":
            return {"own": float(isinstance(predictions, list))}
        if self.kind == "fails on arrays" and isinstance(predictions, np.ndarray):
            raise TypeError("no arrays, please")
        return {"own": scale * float(np.mean(np.asarray(predictions) == np.asarray(references)))}


@pytest.mark.parametrize("kind", ["lists", "fails on arrays"])
def test_where_the_short_way_differs_or_fails_the_long_one_is_taken(kind):
    module = Own()
    module.kind = kind
    direct = DirectModule(module)
    arguments = {"predictions": CLASSES[0], "references": CLASSES[1]}
    results = [direct.compute(**arguments) for _ in range(TRIED + 2)]
    assert not direct.is_direct and all(result == module.compute(**arguments) for result in results)


def test_values_are_cast_as_the_features_say_and_other_arguments_go_through():
    module, halves = Own(), CLASSES[0] + 0.4
    direct = DirectModule(module)
    expected = module.compute(predictions=halves, references=CLASSES[1], scale=2.0)
    for _ in range(TRIED + 1):
        assert direct.compute(predictions=halves, references=CLASSES[1], scale=2.0) == expected
    assert direct.is_direct
