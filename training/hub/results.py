"""The dataset of results: a row a run, layer and head."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from model_cards.card import RESULTS_TEMPLATE

from ..runs import Run
from .push import COLLECTION


# a row a head; entropies in nats
_RESULTS_SCHEMA = pa.schema(
    {
        "model": pa.string(),  # name of the repository, which holds one of the seeds
        **{name: pa.string() for name in ("variant", "backbone", "dataset")},
        **{name: pa.int64() for name in ("block_size", "seed", "train_tokens", "train_steps", "parameters")},
        "perplexity": pa.float64(),  # of the run
        "layer": pa.int64(),
        "head": pa.int64(),
        "entropy": pa.float64(),  # mean over the evaluation part
        "max_entropy": pa.float64(),  # the largest that its queries can reach
        "layer_nan_count": pa.int64(),  # attention weights of the layer that are NaN
    }
)


def write_results(runs: list[Run], namespace: str, folder: Path):
    """The dataset of results, runs x layers x heads: a table for each backbone and context length, and the card."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        name, measured = run.results["dataset"], run.attention_entropy
        rows = tables.setdefault(f"{run.setting.backbone}-t{run.setting.block_size}", [])
        described = {key: run.results[key] for key in _RESULTS_SCHEMA.names if key in run.results}
        # a local path is nobody else's business
        described |= {"model": run.model_name, "dataset": Path(name).name if Path(name).exists() else name}
        for (layer, head), entropy in np.ndenumerate(np.array(measured["entropy"])):
            figures = {"entropy": entropy, "max_entropy": measured["max_entropy"][layer][head]}
            nans = {"layer_nan_count": measured["nan_count"][layer]}
            rows.append({**described, "layer": layer, "head": head, **figures, **nans})
    (folder / "data").mkdir(parents=True)
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows, _RESULTS_SCHEMA), folder / "data" / f"{name}.parquet")
    data = DatasetCardData(
        license="apache-2.0",
        pretty_name="LNFree: attention entropy by run, layer and head",
        tags=["lnfree"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    card = DatasetCard.from_template(data, str(RESULTS_TEMPLATE), namespace=namespace, collection=COLLECTION)
    card.save(folder / "README.md")
