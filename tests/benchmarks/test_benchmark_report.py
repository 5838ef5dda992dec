"""The report: what its front page says, and that its bytes are those of the records."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import made_up
from toy import TOY

from benchmarks import bench_report, comparing, pages, records, statistics, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "ours, said",
    [
        (0.7, "Where it asks for a threshold, MetricOpt is better on 1 of 1 task (`bank_f1`)."),
        (0.6, "Where it asks for a threshold, MetricOpt is better on 0 of 1 task."),
        (0.5, "Where it asks for a threshold, MetricOpt is better on 0 of 1 task and worse on 1 (`bank_f1`)."),
        (None, "MetricOpt has not been measured yet."),
    ],
)
def test_the_front_page_leads_with_what_the_records_say(tmp_path, ours, said):
    """Few methods, and one task, are enough for all pages."""
    lines = [made_up("loss_only", seed, {"plain": 0.5, "post-hoc": 0.6}) for seed in range(5)]
    if ours is not None:
        lines += [
            made_up("metricopt", seed, {"plain": ours + 1e-4 * (-1) ** seed, "post-hoc": 0.55}) for seed in range(5)
        ]
    for line in lines:
        records.write(line, tmp_path / "records")
    assert bench_report.main(["--results", str(tmp_path / "records"), "--output", str(tmp_path)]) == 0
    first = (tmp_path / "BENCHMARKS.md").read_text(encoding="utf-8").splitlines()[2]
    assert first.startswith(f"**{said}**")
    folder = tmp_path / "docs" / "results"
    assert {path.stem for path in folder.iterdir()} == {"README", "harm", "decision", "forest", "bank_f1"}


def test_the_lead_counts_every_verdict():
    intervals = {"win": (0.05, 0.2), "above": (0.05, 0.2), "tie": (-0.1, 0.3), "below": (-0.2, -0.05)}

    def result(name, verdict, variants=("plain",), kind="threshold"):
        low, high = intervals[verdict]
        difference = statistics.Paired((low + high) / 2, 0.04, low, high, 0.01, 5)
        entry = comparing.Compared(None, difference, 0.01 if verdict == "win" else 0.5)
        assert entry.verdict == verdict
        task = replace(TOY, name=name, kind=kind)
        return comparing.Result(task, {}, {("metricopt", variant): entry for variant in variants})

    found = [result("a", "tie"), result("b", "above"), result("c", "below"), result("d", "tie"), result("e", "tie", ())]
    agree = "Where it asks for a threshold, MetricOpt is better on 1 of 4 tasks (`b`) and worse on 1 (`c`)."
    assert pages.standing(found) == agree
    found.append(result("f", "win", kind="beyond threshold"))
    first = "Where the metric asks for more than a threshold, MetricOpt is better on 1 of 1 task (`f`)."
    assert pages.standing(found) == f"{first} {agree}"


def test_a_task_page_shows_the_searcher_and_the_label_reader_that_selection_prefers():
    found = {
        "loss_only": 0.5,
        "metricopt": 0.6,
        "shuffled": 0.5,
        "random": 0.9,
        "cma": 0.7,
        "spsa": 0.8,
        "train_obs": 0.6,
    }
    lines = [
        made_up(method, seed, {"plain": score, "post-hoc": score}) for method, score in found.items() for seed in (0, 1)
    ]
    for line in lines:  # the report split does not choose
        if line["method"] == "cma":
            line["variants"]["plain"]["scores"]["report"] = 0.95
    (result,) = comparing.results_of(lines)
    assert [(entry.row.method, entry.row.variant) for entry in result.shown()] == [
        ("loss_only", "plain"),
        ("loss_only", "post-hoc"),
        ("metricopt", "plain"),
        ("shuffled", "plain"),
        ("random", "plain"),
        ("spsa", "plain"),
        ("train_obs", "plain"),
    ]
    assert len(tables.methods_csv(result).splitlines()) == 1 + 2 * len(found)  # all of them


@pytest.mark.slow
def test_the_committed_report_is_made_of_the_committed_records(tmp_path):
    """Byte for byte, the figures where they were drawn by the same matplotlib."""
    assert records.read(records.RESULTS)
    written = [tmp_path / "once", tmp_path / "again"]
    for folder in written:
        assert bench_report.main(["--output", str(folder)]) == 0
    made = {path.relative_to(written[0]) for path in written[0].rglob("*") if path.is_file()}
    committed = {path.relative_to(ROOT) for path in (ROOT / "docs" / "results").iterdir()}
    # pages that a command of their own writes, from what it measures, say so
    others = {path for path in committed - made if "Written by `python -m benchmarks." in (ROOT / path).read_text()}
    others |= {path.with_suffix(".csv") for path in others} & committed
    assert made == committed - others | {Path("BENCHMARKS.md"), Path("docs/protocol.md")}
    for path in made:
        text = (written[0] / path).read_bytes()
        assert text == (written[1] / path).read_bytes()
        assert path.suffix == ".png" or text == (ROOT / path).read_bytes(), path


def test_the_front_page_is_one_screen_and_its_links_lead_somewhere():
    committed = ROOT / "BENCHMARKS.md"
    lines = committed.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(len(cell.strip()) for line in lines if line[:2] == "| " for cell in line.split("|")) <= 60
    for page in (committed, *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"
