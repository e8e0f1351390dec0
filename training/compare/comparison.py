"""`lnfree compare`: finished runs -> the paper's table, statistics over seeds, heat maps and curves."""

import json
import tempfile
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from matplotlib.figure import Figure

from ..errors import explained
from ..files import write_atomically
from ..pages import check_docs, find_marks, origin_of, write_table
from ..plots import plot_curves, plot_heat_maps, plot_overview, plot_seconds, save_picture
from ..runs import Run, find_runs
from ..tables import to_markdown
from .archive import pack, unpack
from .group import Group, compare_group
from .page import build_html
from .report import build_report, tables_for_docs


def compare(runs_dir: str | Path, output: str | Path | None = None, docs: str | Path | None = None) -> Path:
    """
    Compares the finished runs below a folder; writes `report.md`, `report.html` (one file, for a browser),
    `comparison.json`, `heat_maps.png`, `curves.png`, `seconds.png` (perplexity against seconds under encryption), and
    of the first setting `overview.png`.

    Args:
        runs_dir: folder whose subfolders are runs, or a parquet file in the docs that has been made of one.
        output: folder of the report; `report` in the folder of the runs by default, of a file `runs/NAME/report`.
        docs: folder `docs` of a checkout, in whose pages the tables that have the name of `runs_dir` are replaced.
            Its `data` gets the runs as NAME.parquet, from which this comparison can be made again.

    Returns:
        The path of `report.md`.

    Raises:
        UserError: if there is no such folder or no finished run, or a file of one cannot be read.
    """
    runs_dir = Path(runs_dir)
    if docs is not None:
        check_docs(docs)
    name = runs_dir.resolve().stem if runs_dir.suffix == ".parquet" else runs_dir.resolve().name
    if runs_dir.suffix == ".parquet":
        with tempfile.TemporaryDirectory() as folder:
            unpack(runs_dir, Path(folder))
            return _compare(Path(folder), name, runs_dir, Path(output or Path("runs", name, "report")), docs)
    report = _compare(runs_dir, name, runs_dir, Path(output or runs_dir / "report"), docs)
    if docs is not None:
        pack(runs_dir, Path(docs) / "data" / f"{name}.parquet")
    return report


def _compare(runs_dir: Path, name: str, given: Path, output: Path, docs: str | Path | None) -> Path:
    runs, unfinished = find_runs(runs_dir)
    by_setting = [list(group) for _, group in groupby(runs, key=attrgetter("setting"))]
    groups = [
        compare_group(group, differing) for group, differing in zip(by_setting, _differing(by_setting), strict=True)
    ]
    titles = [title for group in groups for title in group.run_titles]
    figures = {
        "heat_maps.png": plot_heat_maps([run.attention_entropy for run in runs], titles),
        "curves.png": plot_curves(runs, titles),
        "seconds.png": plot_seconds([group.seconds() for group in groups], [group.seconds_title for group in groups]),
        "overview.png": _plot_overview(groups[0]),
    }
    document = {"groups": [group.to_dict() for group in groups], "unfinished": unfinished}
    report = to_markdown(build_report(groups, unfinished)) + "\n"
    page = build_html(groups, unfinished)
    # also where it cannot be written
    print(report)
    with explained(f"output={output} cannot be written"):
        output.mkdir(parents=True, exist_ok=True)
        for picture, figure in figures.items():
            save_picture(figure, output / picture)
        write_atomically(output / "comparison.json", json.dumps(document, indent=1))
        write_atomically(output / "report.md", report)
        write_atomically(output / "report.html", page)
    if docs is not None:
        marks, origin = find_marks(Path(docs)), origin_of(runs[0].results)
        for table, (rows, formats) in tables_for_docs(groups).items():
            if f"{name}-{table}" in marks:
                write_table(docs, f"{name}-{table}", rows, f"lnfree compare {given}", formats, **origin)
    print(f"report: {output / 'report.md'}, and for a browser {output / 'report.html'}")
    return output / "report.md"


def _plot_overview(group: Group) -> Figure:
    """Of a setting's runs with its first seed: entropies, perplexities, and the norms and GELUs under encryption."""
    seed = min(run.seed for run in group.runs)
    runs = [run for run in group.runs if run.seed == seed]
    totals = [row["private_cost"]["forward"]["total"] for row in group.rows if row["seed"] == seed]
    bars = {
        "perplexity": [run.perplexity for run in runs],
        "values in LayerNorms": [total.get("layer_norm", {}).get("elements", 0) for total in totals],
        "values in GELUs": [total.get("gelu", {}).get("elements", 0) for total in totals],
    }
    return plot_overview([run.attention_entropy for run in runs], [run.configuration for run in runs], bars)


def _differing(by_setting: list[list[Run]]) -> list[list[str]]:
    """Of each setting the fields, as `key=value`, in which settings of the same backbone, T and tokens differ."""
    settings = [runs[0].setting for runs in by_setting]
    found = []
    for setting in settings:
        alike = [json.loads(other.fields) for other in settings if other[:-1] == setting[:-1]]
        ours = json.loads(setting.fields)
        differing = [key for key in ours if any(other.get(key) != ours[key] for other in alike)]
        found.append([f"{key}={ours[key]}" for key in differing])
    return found
