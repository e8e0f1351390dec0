"""Tables of the docs are what the data makes of them: written by the commands that measure, and no hand in them."""

import json
import re

import pytest

from training.errors import UserError
from training.pages import TABLE, fill, fill_pages, find_pages, format_cell, format_table, write_table

from .conftest import ROOT


PAGES = find_pages(ROOT / "docs")


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "docs" / "data").mkdir(parents=True)
    page = "# Speed\n\nBefore.\n\n<!-- table step -->\n<!-- end -->\n\nAfter.\n"
    (tmp_path / "docs" / "speed.md").write_text(page)
    (tmp_path / "README.md").write_text("# Title\n\nNo table.\n")
    return tmp_path / "docs"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_no_table_was_edited_by_hand(page):
    text = page.read_text()
    assert fill(text, ROOT / "docs" / "data") == text, "python -m training.pages writes the tables again"


def test_every_mark_has_data_and_all_data_is_shown():
    marks = [mark for page in PAGES for mark in re.findall(r"<!-- table (.+) -->", page.read_text())]
    filled = [match["name"] for page in PAGES for match in TABLE.finditer(page.read_text())]
    assert sorted(marks) == sorted(filled) == sorted(path.stem for path in (ROOT / "docs" / "data").glob("*.json"))


def test_measured_rows_reach_the_page_and_a_hand_in_them_is_found(docs):
    rows = [{"model": "SM+R", "ms": 107.6, "of stock": 0.60124}, {"model": "stock", "ms": 1790.0, "of stock": None}]
    write_table(
        docs, "step", rows, "lnfree benchmark step", {"of stock": "{:.4f}"}, machine="An EPYC", commit="c" * 40
    )
    text = (docs / "speed.md").read_text()
    assert text.startswith("# Speed\n\nBefore.\n\n<!-- table step -->\n| model | ms | of stock |\n|---|---:|---:|\n")
    assert "\n| SM+R | 108 | 0.6012 |\n| stock | 1,790 |  |\n\n`lnfree benchmark step` (An EPYC; torch " in text
    assert "; commit ccccccc, " in text and text.endswith("\n<!-- end -->\n\nAfter.\n")
    assert json.loads((docs / "data" / "step.json").read_text())["rows"] == rows
    for edited in (
        text.replace("| 108 |", "| 99 |"),
        text.replace("An EPYC", "A Xeon"),
        text.replace("| stock", "|stock"),
    ):
        assert fill(edited, docs / "data") == text != edited
    # what stands around a table is the writer's
    (docs / "speed.md").write_text(text.replace("After.", "Afterwards."))
    fill_pages(docs)
    assert (docs / "speed.md").read_text() == text.replace("After.", "Afterwards.")
    assert (docs.parent / "README.md").read_text() == "# Title\n\nNo table.\n"


@pytest.mark.parametrize(
    ("value", "template", "text"),
    [
        ("SM+R", None, "SM+R"),
        (None, "{:.2f}", ""),
        (1091, None, "1,091"),
        (True, None, "yes"),
        (0.0123, None, "0.012"),
        (12.34, None, "12.3"),
        (18828.4, None, "18,828"),
        (100.0, None, "100"),
        (10.0, None, "10.0"),
        (1.0, None, "1.00"),
        ([-1.2, 4.845], "{:+.1f} to {:+.1f} %", "-1.2 to +4.8 %"),
        ([115.6409, 121.6886], "{:.3f}", "115.641, 121.689"),
        ([[1.0, 2.0], 3], None, "1.00, 2.00, 3"),
    ],
)
def test_cells(value, template, text):
    assert format_cell(value, template) == text


def test_another_folder_is_one_line(tmp_path):
    with pytest.raises(
        UserError, match="--docs must be the folder docs of a checkout, got '.*', which has no folder data"
    ):
        write_table(tmp_path, "step", [{"ms": 1.0}], "lnfree benchmark step")


def test_a_table_says_where_it_was_measured():
    origin = {"machine": "M", "versions": {"torch": "2", "transformers": "5"}, "commit": None, "date": "2026-11-30"}
    table = format_table({"command": "c", **origin, "formats": {}, "rows": [{"a": 1}]})
    assert table == "| a |\n|---:|\n| 1 |\n\n`c` (M; torch 2, transformers 5; commit unknown, 2026-11-30)"
