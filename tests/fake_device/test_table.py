"""The table of docs/memory.md is what plan computes now, and what the fake device counts."""

import re

import pytest

from benchmarks import fake_device as table
from qwenedit.memory.plan import STAGES
from qwenedit.memory.residency import Modes
from tests.sparse import write_sparse

CELL = re.compile(r"([\d.]+) / ([\d.]+)")


def written():
    """(checkpoint, mode) -> planned and counted of each stage."""
    text = table.PAGE.read_text(encoding="utf-8")
    start, end = (text.index(mark) for mark in table.MARKS)
    lines = [line.strip("| ").split(" | ") for line in text[start:end].splitlines()[3:]]
    return {(line[0], line[1]): line[2:] for line in lines}


@pytest.mark.parametrize("variant", table.PICTURES)
def test_the_rows_are_planned_as_now_and_close_to_what_is_counted(variant, tmp_path):
    planned = table.planned_peaks(write_sparse(tmp_path, variant), variant)
    rows = written()
    for mode in planned if variant == table.MODES_OF else [Modes("resident")]:
        name, label, *wanted = table.row(variant, mode, planned[mode], dict.fromkeys(STAGES, 0))
        cells = rows[name, label]
        assert [cell.split(" / ")[0] for cell in cells] == [cell.split(" / ")[0] for cell in wanted], label
        for cell in cells:
            plan, counted = map(float, CELL.fullmatch(cell).groups())
            assert abs(plan - counted) < 0.15 * counted, (label, cell)


def test_a_row_is_counted_as_now(tmp_path):
    variant, mode = "Qwen-Image", Modes("resident")
    folder = write_sparse(tmp_path, variant)
    got = table.peaks(folder, variant, mode)
    row = table.row(variant, mode, table.planned_peaks(folder, variant)[mode], got)
    assert written()[row[0], row[1]] == row[2:]


def test_the_table_is_put_between_its_marks():
    page = f"above\n{table.MARKS[0]}old\n{table.MARKS[1]}below\n"
    assert table.replaced(page, "| new |\n") == f"above\n{table.MARKS[0]}| new |\n{table.MARKS[1]}below\n"
