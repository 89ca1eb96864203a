"""A few trials of every fault campaign; `make faults` runs them in full."""

import pytest

from tests.faults.campaign import Row, Unavailable, run_campaign, run_trial, table
from tests.faults.rows import ROWS

SLOW = {
    *("broken", "cut", "disk", "kill", "lock", "node", "nodes", "nonfinite", "place", "rank"),
    *("server", "signal", "worker"),
}
"""Rows whose trials train complete runs or decode thousands of images."""


def trials():
    for row in ROWS:
        slow = row.name.rpartition("-")[2] in SLOW
        marks = [pytest.mark.slow, pytest.mark.timeout(900)] if slow else []
        for number in range(row.short):
            yield pytest.param(row, number, id=f"{row.name}-{number}", marks=marks)


@pytest.mark.parametrize(("row", "number"), [*trials()])
def test_short_form(row, number):
    try:
        run_trial(row, number)
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_a_stopped_campaign_resumes(tmp_path, capsys):
    done = []

    def trial(number, random, folder):
        assert folder.is_dir()
        assert number != 2
        done.append((number, random.random()))
        return "well"

    row = Row("some", "what must hold", 4, trial)
    run_campaign(row, tmp_path, count=2)
    results = run_campaign(row, tmp_path)
    assert [number for number, _ in done] == [0, 1, 3]
    assert len({value for _, value in done}) == 3
    assert [entry["ok"] for entry in results] == [True, True, False, True]
    assert "| `some` | what must hold | 4 of 4 | 3 | 1 | 0 |" in table([row], {"some": results})
    assert run_campaign(row, tmp_path) == results
