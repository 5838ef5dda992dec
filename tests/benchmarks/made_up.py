"""Records that nobody measured."""

import numpy as np


def made_up(method: str, seed: int, scores: dict[str, float]) -> dict:
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, 0.002, 10)
    return {
        "task": "bank_f1",
        "method": method,
        "seed": seed,
        "config": {},
        "commit": "c0ffee" * 6,
        "dirty": False,
        "versions": {"python": "3"},
        "splits": {"train": {"size": 5, "rows": "ab"}, "report": {"size": 7, "rows": "cd"}},
        "calls": {} if method == "loss_only" else {"observe": 160},
        "seconds": {"run": 2.0, "whole": 3.0},
        "peak_mib": 100.0,
        "curve": {"step": [0, 10], "passes": [0, 8], "seconds": [0.0, 1.0], "selection": [0.4, 0.5]},
        "variants": {
            name: {"scores": {"report": score, "selection": score}, "items": (score + noise).tolist(), "calls": {}}
            for name, score in scores.items()
        },
    }
