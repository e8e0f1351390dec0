"""The small parquet file of a folder of runs: the same comparison again, without the folder."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest

from training import cli
from training.compare.archive import FILES
from training.errors import UserError
from training.files import read_json
from training.runs import Run

from ..conftest import ROOT


pytestmark = pytest.mark.usefixtures("own_cache")
DATA = ROOT / "docs" / "data"


def test_a_comparison_is_made_again_from_its_file(variant_runs, corpus, tmp_path):
    docs, runs = tmp_path / "docs", tmp_path / "three"
    (docs / "data").mkdir(parents=True)
    (tmp_path / "README.md").write_text("none\n")
    marks = [f"<!-- table three-{name} -->\n<!-- end -->\n" for name in ("overview", "measured")]
    (docs / "page.md").write_text("".join(marks))
    runs.mkdir()
    for variant in ("SM+LN+G", "SM+R", "SM+G"):
        shutil.copytree(variant_runs / variant, runs / variant)
    # a run that was unstable is told of again
    (runs / "SM+G" / "results.json").unlink()
    report = {"step": 3, "layer": None, "seen": "the loss is nan", "found": "layer 0", "last_checkpoint": None}
    (runs / "SM+G" / "instability.json").write_text(json.dumps(report))
    # of one model more was measured than a run measures
    measuring = [str(runs / "SM+R" / "model"), "--dataset", str(corpus), "--max-samples", "9", "--int8"]
    assert cli.main(["measure", *measuring, "--json", str(runs / "SM+R" / "measured.json")]) == 0
    found = read_json(runs / "SM+R" / "measured.json")
    assert cli.main(["compare", str(runs), "--docs", str(docs)]) == 0
    expected = read_json(runs / "report" / "comparison.json")
    table = read_json(docs / "data" / "three-overview.json")
    assert {path.stem for path in (docs / "data").glob("*.json")} == {"three-overview", "three-measured"}, (
        "no page has the others"
    )
    assert "step 3" in expected["unfinished"]["SM+G"]
    rows = table["rows"]
    assert [row["perplexity"] for row in rows] == sorted(row["perplexity"] for row in rows) and len(rows) == 2
    stream = [json.loads(line) for line in (runs / "SM+R" / "residual_stream.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["configuration"] == "SM+R")
    assert row["stream"] == max(max(record["norm"]) for record in stream)
    assert row["kurtosis"] == max(stream[-1]["kurtosis"])
    assert row["rounds"] > 0 and row["s on LAN"] < row["s on WAN"]

    assert read_json(docs / "data" / "three-measured.json")["rows"] == [
        {
            "configuration": "SM+R",
            "seeds": 1,
            "perplexity": found["perplexity"],
            "int8 by token": found["int8"]["by token"]["perplexity"],
            "int8 by tensor": found["int8"]["by tensor"]["perplexity"],
            "bits per byte": found["bits_per_byte"],
            "weight on the first key": pytest.approx(np.mean(found["sink_share"])),
            "largest logit": pytest.approx(np.max(found["max_logit"])),
            "infinity norm": pytest.approx(np.max(found["residual_stream"]["infinity_norm"])),
            "outlier dimensions": len(set().union(*found["residual_stream"]["outlier_dimensions"])),
        }
    ]

    packed = docs / "data" / "three.parquet"
    assert str(tmp_path) not in str(pyarrow.parquet.read_table(packed).to_pylist()), "no path of this machine"
    logs = pyarrow.parquet.read_table(packed)["log_history"].to_pylist()
    kept = {key for log in logs if log for entry in json.loads(log) for key in entry}
    assert kept == {"step", "loss", "eval_loss", "eval_perplexity"}, "losses alone"
    shutil.rmtree(runs)
    tables = {path: read_json(path)["rows"] for path in (docs / "data").glob("*.json")}
    for path in tables:
        path.unlink()
    again = tmp_path / "again"
    assert cli.main(["compare", str(packed), "--docs", str(docs), "--output", str(again)]) == 0
    assert read_json(again / "comparison.json") == expected
    assert {path: read_json(path)["rows"] for path in tables} == tables
    # of two models it is none
    (again / "of-two").mkdir()
    (again / "of-two" / "measured.json").write_text("[]")
    with pytest.raises(UserError, match="measured.json must hold what was measured of one model; remove it"):
        Run(again / "of-two", {}).measured  # noqa: B018
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
        assert_equal_to_rounding(read_json(table)["rows"], read_json(DATA / table.name)["rows"], table.name)


def assert_equal_to_rounding(found, expected, where):
    """Logarithms and sums of two processors differ in their last bits."""
    if isinstance(expected, dict | list):
        keys = list(expected) if isinstance(expected, dict) else range(len(expected))
        assert (list(found) if isinstance(found, dict) else range(len(found))) == keys, where
        for key in keys:
            assert_equal_to_rounding(found[key], expected[key], f"{where} {key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-11), where
    else:
        assert found == expected, where
