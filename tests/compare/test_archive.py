"""The small parquet file of a folder of runs: the same comparison again, without the folder."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from training import cli
from training.compare.archive import FILES
from training.files import read_json


pytestmark = pytest.mark.usefixtures("own_cache")
DATA = Path(__file__).parents[2] / "docs" / "data"


def test_a_comparison_is_made_again_from_its_file(variant_runs, tmp_path, capsys):
    docs, runs = tmp_path / "docs", tmp_path / "three"
    (docs / "data").mkdir(parents=True)
    (tmp_path / "README.md").write_text("none\n")
    (docs / "page.md").write_text("<!-- table three-overview -->\n<!-- end -->\n")
    runs.mkdir()
    for variant in ("SM+LN+G", "SM+R", "SM+G"):
        shutil.copytree(variant_runs / variant, runs / variant)
    # a run that was unstable is told of again
    (runs / "SM+G" / "results.json").unlink()
    report = {"step": 3, "layer": None, "seen": "the loss is nan", "found": "layer 0", "last_checkpoint": None}
    (runs / "SM+G" / "instability.json").write_text(json.dumps(report))
    assert cli.main(["compare", str(runs), "--docs", str(docs)]) == 0
    expected = read_json(runs / "report" / "comparison.json")
    table = read_json(docs / "data" / "three-overview.json")
    assert [path.name for path in (docs / "data").glob("*.json")] == ["three-overview.json"], "no page has the others"
    assert "step 3" in expected["unfinished"]["SM+G"]
    rows = table["rows"]
    assert [row["perplexity"] for row in rows] == sorted(row["perplexity"] for row in rows) and len(rows) == 2
    stream = [json.loads(line) for line in (runs / "SM+R" / "residual_stream.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["configuration"] == "SM+R")
    assert row["stream"] == max(max(record["norm"]) for record in stream)
    assert row["kurtosis"] == max(stream[-1]["kurtosis"])
    assert row["rounds"] > 0 and row["s on LAN"] < row["s on WAN"]

    packed = docs / "data" / "three.parquet"
    assert str(tmp_path) not in str(pyarrow.parquet.read_table(packed).to_pylist()), "no path of this machine"
    shutil.rmtree(runs)
    (docs / "data" / "three-overview.json").unlink()
    again = tmp_path / "again"
    assert cli.main(["compare", str(packed), "--docs", str(docs), "--output", str(again)]) == 0
    assert read_json(again / "comparison.json") == expected
    assert read_json(docs / "data" / "three-overview.json")["rows"] == rows
    assert packed.is_file()


def test_a_file_that_holds_no_runs_is_one_line(tmp_path, capsys):
    path = tmp_path / "runs.parquet"
    path.write_text("none")
    assert cli.main(["compare", str(path)]) == 1
    assert f"lnfree compare: error: {path} is no parquet file of runs: " in capsys.readouterr().err
    columns = {"run": ["../../outside"], **{name: [None] for name in FILES}}
    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    pyarrow.parquet.write_table(pyarrow.table(columns, schema), path)
    assert cli.main(["compare", str(path)]) == 1
    assert "holds a run whose name is no folder's: '../../outside'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(DATA.glob("*.parquet")), ids=lambda path: path.stem)
def test_the_pages_have_what_the_file_of_runs_says(path, tmp_path):
    docs = tmp_path / "docs"
    (docs / "data").mkdir(parents=True)
    shutil.copy(DATA.parents[1] / "README.md", tmp_path)
    for page in DATA.parent.glob("*.md"):
        shutil.copy(page, docs)
    assert cli.main(["compare", str(path), "--docs", str(docs), "--output", str(tmp_path / "report")]) == 0
    tables = sorted((docs / "data").glob("*.json"))
    assert tables
    for table in tables:
        assert read_json(table)["rows"] == read_json(DATA / table.name)["rows"], table.name
