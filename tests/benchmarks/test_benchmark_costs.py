"""The commands that measure what guidance costs: each runs, and says what it should."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from toy import TOY

from benchmarks import cost, gpu, growth, large_models, protocol, ranks, wide_phi
from metricopt_hf.phi.coordinates import Sketch


@pytest.mark.slow
def test_a_task_is_a_row_of_what_it_costs():
    fixed = protocol.first_of_grids()
    row = cost.row(TOY, 0, fixed)
    assert len(row) == len(cost.HEADERS) and row[:2] == ["toy", "20"] and float(row[-1]) > 0
    assert "| toy " in cost.text([row], fixed)


def test_growth_writes_a_page_with_every_size(tmp_path, monkeypatch):
    args = growth.GrowthArguments(
        rows=[2000], logits=[2], phi=[], coordinates=[], calls=[9000], page=str(tmp_path / "growth.md")
    )
    measured = []

    def made_up(size, most_seconds):
        measured.append(size)
        return (1.5, 3 * 2**20, 10) if size.calls == 1000 else None

    monkeypatch.setattr(growth, "measured", made_up)
    monkeypatch.setattr(growth.HfArgumentParser, "parse_args_into_dataclasses", lambda self, argv: (args,))
    assert growth.main([]) == 0
    page = (tmp_path / "growth.md").read_text()
    assert [size.rows for size in measured] == [1000, 1000, 2000, 1000]  # the cheap ones first
    assert "**2,000**" in page and "**2**" in page and page.count("1.5 |") == page.count("3 |\n") == 3
    assert re.search(r"\*\*9,000\*\* \| +\| not measured", page) and "more than 360 s" in page


@pytest.mark.slow
def test_a_large_model_is_a_row_of_what_its_linearisation_costs(monkeypatch):
    monkeypatch.setattr(large_models, "MINILM", {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1})
    monkeypatch.setattr(large_models, "TOKENS", 4)
    rows = [large_models.row(name) for name in ("a text encoder like MiniLM", "that, for tokens")]
    assert [row[3:5] for row in rows] == [["row by row", "3"], ["row by row, of the largest outputs", "6"]]
    assert all(len(row) == len(large_models.HEADERS) and float(row[-1]) > 0 for row in rows)
    page = cost.models_text([[*rows[0][:-1], "0.4"], [*rows[1][:-1], "0.6"]])
    assert "| that, for tokens " in page and "It is missed by that, for tokens: by differences" in page
    assert "missed" not in cost.models_text([[*rows[0][:-1], "0.5"]])


@pytest.mark.slow
def test_a_run_of_a_size_is_measured_in_a_process_of_its_own():
    seconds, memory, steps = growth.measured(growth.Size(rows=40, logits=3, phi=30, coordinates=2, calls=40), 60)
    assert seconds > 0 and memory >= 0 and 0 < steps <= 10


@pytest.mark.slow
def test_a_run_that_is_too_slow_is_ended():
    assert growth.measured(growth.Size(calls=10**6), 1) is None


@pytest.mark.slow
def test_two_ranks_linearise_what_one_process_does():
    ((alone, exact),) = ranks.measured(1, False, 16, 8)
    for seconds, jacobian in ranks.measured(2, False, 16, 8):
        assert 0 < seconds < alone and torch.allclose(jacobian, exact, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3, 40), (6, 1, 40)])
def test_exact_coordinates_of_a_wide_phi_are_the_leading_singular_vectors(shape):
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(2, *shape, generator=generator)
    sketch = wide_phi.ExactSketch(40, 3)
    for part in jacobian:
        sketch.add(part)
    rows = jacobian.flatten(0, 1)
    rows = (rows - rows.mean(1, keepdim=True) if shape[1] > 1 else rows).flatten(0, 1)
    expected, found = torch.linalg.svd(rows, full_matrices=False).Vh[:3].T, sketch.directions()
    assert torch.allclose(found @ found.T, expected @ expected.T, atol=1e-4)
    plain = Sketch(40, 3)  # exact for a phi that is not wide
    plain.add(jacobian.flatten(0, 1))
    assert torch.allclose(plain.directions() @ plain.directions().T, found @ found.T, atol=1e-4)


@pytest.mark.parametrize(
    ("output", "code", "row"),
    [
        ("2 passed, 1 skipped, 9 deselected in 3s", 0, ["2 passed, 1 skipped", "yes"]),
        (
            "ERROR tests/test_a.py::test_b - KeyError\n2 passed, 1 error in 3s",
            1,
            ["2 passed; not run: test_b (a test's own set-up failed)", "in part"],
        ),
    ],
)
def test_the_gpu_page_names_what_was_not_run(monkeypatch, output, code, row):
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=output, returncode=code))
    assert gpu.tests_row()[2:] == row


@pytest.mark.parametrize("output", ["1 failed, 2 passed in 3s", ""])
def test_the_gpu_page_is_not_written_where_a_test_fails(monkeypatch, output):
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=output, returncode=1))
    with pytest.raises(SystemExit, match="not written"):
        gpu.tests_row()


def measured_on_a_gpu(monkeypatch, tmp_path, there, run):
    page = tmp_path / "gpu.md"
    args = gpu.GpuArguments(models=["one", "other"], rows=2, page=str(page))
    monkeypatch.setattr(gpu.HfArgumentParser, "parse_args_into_dataclasses", lambda self, argv: (args,))
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "run_rows", run)
    monkeypatch.setattr(gpu, "tests_row", lambda: ["pytest -m gpu", "", "9 passed", "yes"])
    assert gpu.main([]) == 1  # not all was run
    return page.read_text()


def test_without_a_gpu_the_page_names_all_that_was_not_run(monkeypatch, tmp_path):
    page = measured_on_a_gpu(monkeypatch, tmp_path, False, None)
    assert page.count(f"not run: {gpu.NO_GPU}") == 3 and "every figure is missing" in page
    assert "pytest -m gpu" in page and "| other" in page


def test_a_model_that_fails_on_the_gpu_is_named_and_the_others_are_measured(monkeypatch, tmp_path):
    def run(name, args, data):
        if name == "one":
            raise RuntimeError("CUDA out of memory\nmore")
        return [["a run", name, "1.0 s", "yes"]]

    page = measured_on_a_gpu(monkeypatch, tmp_path, True, run)
    assert "not run: CUDA out of memory " in page and "1.0 s" in page and "9 passed" in page


@pytest.mark.slow
def test_what_is_measured_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lambda: None)  # a CPU stands in for it
    monkeypatch.setattr(gpu, "MetricOptConfig", partial(gpu.MetricOptConfig, use_cpu=True))
    monkeypatch.setattr(gpu, "SIZE", 160)
    args = gpu.GpuArguments(steps=2, batch_size=4)
    rows = gpu.run_rows("test_vit", args, gpu.noise(8))
    assert [row[0].split(",")[0] for row in rows] == [
        "a linearisation of 8 images", "an epoch over as many by the loss", "a run of 2 metric steps",
        "2 steps of 4 by the loss",
    ]  # fmt: skip
    assert "6 passes" in rows[0][0] and all(row[-1] == "yes" and float(row[2].split()[0]) > 0 for row in rows)
