"""The command for retrieval and detection: results become a record, records a page, and none is made twice."""

import json
import subprocess

import pytest

from benchmarks import paper, records
from metricopt_hf import ConfigurationError

REPORT = {"pretrained": 0.5, "loss only": 0.6, "control: shuffled": 0.6, "MetricOpt": 0.7}
DETAILS = {
    "greater_is_better": True,
    "curve": [
        {"guide": guide, "before": 0.5, "value": value}
        for guide, value in (("pairs", 0.55), (None, 0.55), ("pairs", 0.6), ("pairs", 0.7))
    ],
    "candidates": [{"kind": "start", "score": 0.6}, {"kind": "mean of the last steps", "score": 0.59}],
}


def details(method, seed):
    return {**DETAILS, "why": f"better: {seed}"} if method == "MetricOpt" else {}


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """Stands for the scripts: the commands that were run; each leaves `results.json`."""
    commands = []

    def run(command, check, env, capture_output):
        commands.append(command)
        folder, seed = (command[command.index(option) + 1] for option in ("--output_dir", "--seeds"))
        rows = [
            {"method": name, "seed": int(seed), "scores": dict.fromkeys(("observation", "selection", "report"), score)}
            | {"calls": {"select": 3}, "seconds": 1.0, "details": details(name, seed), "by_group": {}}
            for name, score in REPORT.items()
        ]
        (tmp_path / "out" / "paper" / "retrieval").mkdir(parents=True, exist_ok=True)
        with open(f"{folder}/results.json", "w") as file:
            json.dump({"metric": "recall_at_k", "runs": rows}, file)

    monkeypatch.setattr(paper, "ROOT", tmp_path)
    monkeypatch.setattr(paper, "no_data", lambda: False)
    monkeypatch.setattr(paper, "context", dict)
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_seed_is_run_once_and_stands_on_the_page(scripts, tmp_path):
    options = ["--studies", "retrieval", "--records", str(tmp_path / "records"), "--page", str(tmp_path / "page.md")]
    assert paper.main([*options, "--seeds", "1", "2"]) == 0
    assert paper.main([*options, "--seeds", "1", "2", "3"]) == 0
    assert [command[command.index("--seeds") + 1] for command in scripts] == ["1", "2", "3"]
    assert scripts[0][1].endswith("image_retrieval.py") and "recall_at_k" in scripts[0]
    text = (tmp_path / "page.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| MetricOpt"))
    assert "0.700±0.000" in row and "+0.100±0.000 better" in row and "Means over 3 seeds" in text
    assert all(f"- seed {seed}: better: {seed}\n" in text for seed in (1, 2, 3))
    assert "MetricOpt against the shuffled control, on report: +0.1000 ± 0.0000 (better)" in text
    steps = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| MetricOpt")][1]
    assert [cell.strip() for cell in steps[1:]] == ["9 of 12", "+0.1500 ± 0.0000", "-0.0100 ± 0.0000"]
    assert "## Detection" not in text and text == paper.paper_page(records.read(tmp_path / "records"))


def test_unknown_studies_are_refused():
    with pytest.raises(ConfigurationError, match="--studies nothing: there are retrieval, detection"):
        paper.main(["--studies", "nothing"])
