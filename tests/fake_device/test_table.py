"""The table of docs/memory.md is what plan computes now, and what the fake device counts."""

import re

import pytest

from benchmarks import fake_device as table
from qwenedit.memory.plan import STAGES
from qwenedit.memory.residency import Modes
from tests.sparse import write_sparse

CELL = re.compile(r"([\d.]+) / ([\d.]+)")


def written(marks=table.MARKS):
    """The table's rows, as lists of cells."""
    text = table.PAGE.read_text(encoding="utf-8")
    start, end = (text.index(mark) for mark in marks)
    return [line.strip("| ").split(" | ") for line in text[start:end].splitlines()[3:]]


def require_close(cells):
    for cell in cells:
        plan, counted = map(float, CELL.fullmatch(cell).groups())
        assert abs(plan - counted) < 0.15 * counted, cell


@pytest.mark.parametrize("variant", table.PICTURES)
def test_the_rows_are_planned_as_now_and_close_to_what_is_counted(variant, tmp_path):
    planned = table.planned_peaks(write_sparse(tmp_path, variant), variant)
    rows = {(line[0], line[1]): line[2:] for line in written()}
    for mode in planned if variant == table.MODES_OF else [Modes("resident")]:
        name, label, *wanted = table.row(variant, mode, planned[mode], dict.fromkeys(STAGES, 0))
        cells = rows[name, label]
        assert [cell.split(" / ")[0] for cell in cells] == [cell.split(" / ")[0] for cell in wanted], label
        require_close(cells)


def test_trainings_are_planned_as_now_and_close_to_what_is_counted(tmp_path):
    folder = write_sparse(tmp_path, table.MODES_OF)
    rows = written(table.TRAINING_MARKS)
    assert [row[0] for row in rows] == [str(training) for training in table.TRAININGS]
    for (_, *cells), training in zip(rows, table.TRAININGS, strict=True):
        wanted = table.training_row(folder, training, {False: 0, True: 0})[1:]
        assert [cell.split(" / ")[0] for cell in cells] == [cell.split(" / ")[0] for cell in wanted]
        require_close(cells)


def test_a_row_is_counted_as_now(tmp_path):
    variant, mode = "Qwen-Image", Modes("resident")
    folder = write_sparse(tmp_path, variant)
    got = table.peaks(folder, variant, mode)
    row = table.row(variant, mode, table.planned_peaks(folder, variant)[mode], got)
    assert row in written()


def test_the_table_is_put_between_its_marks():
    page = f"above\n{table.MARKS[0]}old\n{table.MARKS[1]}below\n"
    assert table.replaced(page, "| new |\n") == f"above\n{table.MARKS[0]}| new |\n{table.MARKS[1]}below\n"
