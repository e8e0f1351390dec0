"""Measurements of attention entropy as plain numbers, put together."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .record import AttentionEntropyRecord


# what a measurement holds, by the names of `AttentionEntropyRecord`
FIELDS = ("entropy", "max_entropy", "nan_count", "inf_count", "empty_count", "num_queries")


def summarize(record: AttentionEntropyRecord) -> dict[str, Any]:
    """
    The result of the metric for one record.

    Raises:
        ValueError: if nothing was measured.
    """
    return combine([to_numbers(record)])


def to_numbers(prediction: Mapping[str, Any] | AttentionEntropyRecord) -> dict[str, Any]:
    """The fields of a measurement as Python numbers; a row has as many as the layer has heads."""
    if isinstance(prediction, Mapping):
        found = {name: prediction[name] for name in FIELDS if name in prediction}
    else:
        found = {name: getattr(prediction, name) for name in FIELDS if hasattr(prediction, name)}
    # of a measurement that was made before there was such a count
    found.setdefault("empty_count", [[0] * len(row) for row in found.get("entropy", [])])
    missing = [name for name in FIELDS if name not in found]
    if missing:
        raise ValueError(
            "a prediction must be a text, a record or a result of this metric, got "
            f"{type(prediction).__name__} without {', '.join(missing)}"
        )
    heads = getattr(prediction, "num_heads", None)
    measurement: dict[str, Any] = {"num_queries": int(found.pop("num_queries"))}
    for name, rows in found.items():
        rows = [np.asarray(row).tolist() for row in rows]
        measurement[name] = rows if heads is None else [row[:number] for row, number in zip(rows, heads, strict=True)]
    return measurement


def combine(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Means over the queries of all measurements.

    Raises:
        ValueError: if nothing was measured, or models of different shapes.
    """
    measurements = [measurement for measurement in measurements if measurement["num_queries"] > 0]
    if not measurements:
        raise ValueError("no query was measured: the model read nothing while it was recorded, or could not be seen")
    lengths = [len(row) for row in measurements[0]["entropy"]]
    shapes = {_shape(measurement["entropy"]) for measurement in measurements}
    if len(shapes) > 1:
        raise ValueError(f"the measurements are of models of different (layers, heads): {sorted(shapes, key=str)}")
    # (measurements, cells): all heads of all layers
    sums = {
        name: torch.tensor([sum(measurement[name], []) for measurement in measurements], dtype=torch.float64)
        for name in FIELDS
        if name != "num_queries"
    }
    queries = torch.tensor([measurement["num_queries"] for measurement in measurements], dtype=torch.float64)
    max_entropy = ((queries / queries.sum())[:, None] * sums["max_entropy"]).sum(0)
    attending = queries[:, None] - sums["empty_count"]
    weights = attending / attending.sum(0)
    # a mean over no query is NaN, and has no weight
    entropy = torch.where(weights == 0, 0, weights * sums["entropy"]).sum(0)
    normalized = (entropy / max_entropy).clamp(max=1.0)
    quarters = (4 * normalized).floor().clamp(max=3)

    def rows(cells: Tensor) -> list[list[float]]:
        return [row.tolist() for row in cells.split(lengths)]

    return {
        "entropy": rows(entropy),
        "max_entropy": rows(max_entropy),
        "normalized_entropy": rows(normalized),
        "layer_entropy": [row.mean().item() for row in entropy.split(lengths)],
        "mean_entropy": entropy.mean().item(),
        "head_distribution": [(quarters == quarter).double().mean().item() for quarter in range(4)],
        "nan_count": rows(sums["nan_count"].sum(0).long()),
        "inf_count": rows(sums["inf_count"].sum(0).long()),
        "empty_count": rows(sums["empty_count"].sum(0).long()),
        "num_queries": int(queries.sum()),
    }


def _shape(rows: list[list[float]]) -> tuple:
    heads = [len(row) for row in rows]
    return (len(heads), heads[0] if len(set(heads)) == 1 else tuple(heads))
