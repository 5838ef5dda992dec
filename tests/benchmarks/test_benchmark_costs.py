"""The commands that measure what guidance costs: each runs, and says what it should."""

from types import SimpleNamespace

import pytest
import torch
from toy import TOY

from benchmarks import cost, gpu, growth, protocol


@pytest.mark.slow
def test_a_task_is_a_row_of_what_it_costs():
    fixed = protocol.first_of_grids()
    row = cost.row(TOY, 0, fixed)
    assert len(row) == len(cost.HEADERS) and row[:2] == ["toy", "20"] and float(row[-1]) > 0
    assert "| toy " in cost.text([row], fixed)


def test_growth_writes_a_page_with_every_size(tmp_path, monkeypatch):
    args = growth.GrowthArguments(
        rows=[2000], logits=[2], phi=[], coordinates=[], calls=[], page=str(tmp_path / "growth.md")
    )
    measured = []
    monkeypatch.setattr(growth, "measured", lambda size: measured.append(size) or (1.5, 3 * 2**20))
    monkeypatch.setattr(growth.HfArgumentParser, "parse_args_into_dataclasses", lambda self, argv: (args,))
    assert growth.main([]) == 0
    page = (tmp_path / "growth.md").read_text()
    assert [size.rows for size in measured] == [1000, 2000, 1000] and [size.logits for size in measured] == [10, 10, 2]
    assert "**2,000**" in page and "**2**" in page and page.count("1.5 |") == page.count("3 |\n") == 3


@pytest.mark.slow
def test_a_run_of_a_size_is_measured_in_a_process_of_its_own():
    seconds, memory = growth.measured(growth.Size(rows=40, logits=3, phi=30, coordinates=2, calls=40))
    assert seconds > 0 and memory >= 0


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert "no GPU" in capsys.readouterr().err
