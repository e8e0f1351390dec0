"""What a comparison reads of a folder of runs as one small parquet file, and back: a row a run, without weights."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import yaml

from ..catalog import read_values
from ..errors import UserError, one_line
from ..files import read_json, whole
from ..runs import MEASURED, REPORT, RESULTS


# by the column, what a run's folder has; all as texts
FILES = {
    "results": RESULTS,
    "recipe": "recipe.yaml",
    "config": "model/config.json",
    "log_history": "log_history.json",
    **{name: f"{name}.jsonl" for name in ("attention_entropy", "residual_stream", "negative_slope")},
    "instability": REPORT,
    "measured": MEASURED,
}
_LOGGED = ("step", "loss", "eval_loss", "eval_perplexity")
_SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ("run", *FILES)])


def pack(runs_dir: Path, path: Path):
    """
    Writes the runs below a folder to a parquet file: of the log the losses alone, and no path of this machine.
    """
    rows = []
    for folder in sorted(path.parent for path in runs_dir.glob("*/recipe.yaml")):
        texts = {name: (folder / file).read_text("utf-8") for name, file in FILES.items() if (folder / file).is_file()}
        output_dir = {"output_dir": f"runs/{runs_dir.resolve().name}/{folder.name}"}
        texts["recipe"] = yaml.safe_dump(
            {**read_values(folder / "recipe.yaml", "recipe"), **output_dir}, sort_keys=False
        )
        if "results" in texts:
            results = read_json(folder / RESULTS)
            texts["results"] = json.dumps({**results, "recipe": {**results["recipe"], **output_dir}})
        if "measured" in texts:
            # the folder of the model and of its texts among the rest
            found = read_json(folder / MEASURED)
            texts["measured"] = json.dumps({key: found[key] for key in ("summary", "int8") if key in found})
        if "log_history" in texts:
            log = read_json(folder / "log_history.json", list)
            kept = [{name: entry[name] for name in entry if name in _LOGGED} for entry in log]
            texts["log_history"] = json.dumps([entry for entry in kept if len(entry) > 1])
        rows.append({"run": folder.name, **texts})
    with whole(path) as aside:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, _SCHEMA), aside, compression="zstd")


def unpack(path: Path, runs_dir: Path):
    """
    Writes the runs of such a file below a folder.

    Raises:
        UserError: for a file that cannot be read, or is none of `pack`.
    """
    try:
        rows = pyarrow.parquet.read_table(path, schema=_SCHEMA).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is no parquet file of runs: {one_line(error)}") from None
    for row in rows:
        if not row["run"] or Path(row["run"]).name != row["run"]:
            raise UserError(f"{path} holds a run whose name is no folder's: {row['run']!r}")
        for name, file in FILES.items():
            if row[name] is not None:
                (runs_dir / row["run"] / file).parent.mkdir(parents=True, exist_ok=True)
                (runs_dir / row["run"] / file).write_text(row[name], encoding="utf-8")
