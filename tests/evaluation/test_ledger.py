"""The ledger: every metric call is counted where it belongs."""

import pytest

from metricopt_hf import Ledger
from metricopt_hf.evaluation.ledger import MOST_WARNINGS, Faults


def test_calls_and_seconds_are_counted_by_purpose_even_if_they_fail():
    ledger = Ledger()
    with ledger.charge("observe"):
        pass
    with pytest.raises(RuntimeError), ledger.charge("observe"):
        raise RuntimeError
    with ledger.charge("check"):
        pass
    ledger.add("offline", 3, 2.5)
    assert ledger.calls == {"check": 1, "observe": 2, "noise": 0, "select": 0, "offline": 3, "post-hoc": 0}
    assert ledger.seconds["offline"] == 2.5 and ledger.seconds["select"] == 0
    assert 0 < ledger.seconds["observe"] < 1


def test_only_observing_draws_on_the_budget():
    ledger = Ledger(budget=3)
    ledger.add("check", 1, 0)
    ledger.add("select", 5, 0)
    assert ledger.remaining == 3
    ledger.add("observe", 2, 0)
    assert ledger.remaining == 1
    assert Ledger().remaining == float("inf")


def test_an_unknown_purpose_is_a_mistake():
    with pytest.raises(KeyError):
        Ledger().add("obsrve", 1, 0)


def test_a_resumed_ledger_goes_on_counting():
    first, second = Ledger(budget=10), Ledger(budget=10)
    first.add("observe", 4, 1.5)
    state = first.state_dict()
    first.add("observe", 1, 1)  # the state is no view of the ledger
    second.load_state_dict(state)
    second.add("observe", 2, 0.5)
    assert second.calls["observe"] == 6 and second.seconds["observe"] == 2.0 and second.remaining == 4


def test_it_tells_what_was_spent():
    ledger = Ledger(budget=8)
    assert "nothing spent" in repr(ledger)
    ledger.add("observe", 4, 1.5)
    assert "observe: 4 calls, 0 passes in 1.5 s" in repr(ledger) and "budget 8" in repr(ledger)


def test_a_metric_that_fails_now_and_then_does_not_fill_the_log(caplog):
    faults = Faults()
    for _ in range(100):
        faults.add(["Only one class is present."], succeeded=1)
    assert faults.total == 100
    (said,) = caplog.messages
    assert "Only one class is present. The observation is dropped" in said
    for i in range(100):
        faults.add([f"Row {i} is empty"], succeeded=1)
    assert len(caplog.messages) == MOST_WARNINGS
