"""
The tables of figures in README.md and docs/: what a command measured stands in docs/data/NAME.json, with that command,
its machine and its commit, and a page shows it between two marks:

    <!-- table NAME -->
    <!-- end -->

`lnfree benchmark --docs docs` and `lnfree compare RUNS_DIR --docs docs` write the data and the pages that show it;
`python -m training.pages` fills the marks of every page again, after one was added. A figure is never typed: a test
compares every page with its data.
"""

import datetime
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import read_json, write_atomically
from .runs import device_name, find_commit, library_versions
from .tables import head_to_markdown, row_to_markdown


TABLE = re.compile(r"(?<=<!-- table )(?P<name>[\w-]+) -->\n(?P<content>.*?)(?=<!-- end -->)", re.DOTALL)


def write_table(
    docs: str | Path,
    name: str,
    rows: list[dict[str, Any]],
    command: str,
    formats: dict[str, str] | None = None,
    **origin,
):
    """
    Writes rows that a command has measured to `docs/data/NAME.json`, and into the pages that show them.

    Args:
        docs: the folder `docs` of a checkout, whose README.md stands beside it.
        rows: with the same keys, the heads of the columns; see `format_cell` for the values.
        command: that measured them.
        formats: of columns, by their heads, as `str.format` takes them; the others get three digits.
        origin: `machine`, `versions`, `commit` of figures that were not measured in this process.

    Raises:
        UserError: if `docs` is not such a folder.
    """
    docs = check_docs(docs)
    here = {"machine": machine(), "versions": library_versions(), "commit": find_commit()}
    measured = {
        "command": command,
        **here,
        **origin,
        "date": datetime.date.today().isoformat(),
        "formats": formats or {},
    }
    head = json.dumps(measured, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    write_atomically(docs / "data" / f"{name}.json", f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    fill_pages(docs)


def check_docs(docs: str | Path) -> Path:
    """The folder `docs` of a checkout; raises UserError for any other."""
    if not (Path(docs) / "data").is_dir():
        raise UserError(f"--docs must be the folder docs of a checkout, got {str(docs)!r}, which has no folder data")
    return Path(docs)


def fill_pages(docs: Path):
    """Writes the table of every mark of README.md and of the pages in `docs`."""
    for page in find_pages(docs):
        text = page.read_text(encoding="utf-8")
        filled = fill(text, docs / "data")
        if filled != text:
            write_atomically(page, filled)


def find_marks(docs: Path) -> set[str]:
    """The names of all tables that README.md and the pages in `docs` have marks for."""
    return {match["name"] for page in find_pages(docs) for match in TABLE.finditer(page.read_text(encoding="utf-8"))}


def find_pages(docs: Path) -> list[Path]:
    return [docs.parent / "README.md", *sorted(docs.glob("*.md"))]


def fill(text: str, data: Path) -> str:
    """A page's text with every table as the data has it; one without data is left as it is."""

    def table(match: re.Match) -> str:
        path = data / f"{match['name']}.json"
        return f"{match['name']} -->\n{format_table(read_json(path))}\n" if path.is_file() else match[0]

    return TABLE.sub(table, text)


def format_table(measured: dict[str, Any]) -> str:
    """A table's data as Markdown, and below it how it was measured."""
    rows, formats = measured["rows"], measured["formats"]
    lines = [*format_head(rows[0]), *(format_row(row, formats) for row in rows)]
    libraries = ", ".join(f"{name} {measured['versions'][name]}" for name in ("torch", "transformers"))
    commit = (measured["commit"] or "unknown")[:7]
    origin = f"{measured['machine']}; {libraries}; commit {commit}, {measured['date']}"
    return "\n".join([*lines, "", f"`{measured['command']}` ({origin})"])


def format_head(row: dict[str, Any]) -> list[str]:
    """The first two lines of a table; what is neither a text nor yes or no in this row is set to the right."""
    return head_to_markdown(row, [name for name, value in row.items() if not isinstance(value, str | bool)])


def format_row(row: dict[str, Any], formats: dict[str, str] | None = None) -> str:
    return row_to_markdown(format_cell(value, (formats or {}).get(name)) for name, value in row.items())


def format_cell(value: Any, template: str | None = None) -> str:
    """
    A text as it is, None as an empty cell, a truth value as yes or no, a float with three digits or by the template.
    A list fills the template's fields if it has several, as for an interval; else its values follow one another.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        if template is not None and template.count("{") == len(value) > 1:
            return template.format(*value)
        return ", ".join(format_cell(each, template) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if template is not None:
        return template.format(value)
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def machine(device: str | None = None) -> str:
    """What computes here: the GPU's name, or the processor's and the number of threads, unless a run says which."""
    device = device or device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not device.startswith("CPU"):
        return device
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.is_file() else None
    return f"{found[1] if found else platform.processor()}, {device}"


def origin_of(results: dict[str, Any]) -> dict[str, Any]:
    """Of figures that a finished run has, by its results: what `write_table` says of where they were measured."""
    return {"machine": machine(results["hardware"]), **{name: results[name] for name in ("versions", "commit")}}


if __name__ == "__main__":
    fill_pages(Path("docs"))
