"""Attention entropy as a metric of `torchmetrics`, which adds up batches, and processes when it is computed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .record import AttentionEntropyRecord
from .summary import FIELDS, combine, to_numbers


class AttentionEntropy(Metric):
    """
    Means over the queries of all measurements that it is given; broken heads are NaN.

    ```python
    metric = AttentionEntropy(model.config.num_hidden_layers, model.config.num_attention_heads)
    for batch in loader:
        with record_attention_entropy(model, reduce=False) as record:
            model(**batch)
        metric.update(record)
    metric.compute()["mean_entropy"]  # in nats
    ```

    Args:
        num_layers: of the model's attention, as many as a record has rows.
        num_heads: of a layer, or of each of them.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: for numbers that are no shape of a model.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    num_queries: Tensor

    def __init__(self, num_layers: int, num_heads: int | Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        self.heads = [num_heads] * num_layers if isinstance(num_heads, int) else list(num_heads)
        if len(self.heads) != num_layers or min(self.heads, default=0) < 1:
            raise ValueError(
                "num_layers and num_heads must be at least 1, and num_heads one number or num_layers of them, got "
                f"num_layers={num_layers} and num_heads={num_heads}"
            )
        # sums over the queries, of all heads of all layers in a row; counts as they are
        for name in FIELDS:
            dtype = torch.float64 if name in ("entropy", "max_entropy") else torch.long
            shape = () if name == "num_queries" else (sum(self.heads),)
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, measurement: Mapping[str, Any] | AttentionEntropyRecord) -> None:
        """
        Adds a measurement: a record, which under `torch.distributed` is of this process alone (`reduce=False`), or a
        result of the metric of `evaluate`.

        Raises:
            ValueError: if it is of a model of another shape.
        """
        numbers = to_numbers(measurement)
        queries = numbers.pop("num_queries")
        if not queries:
            return
        if (heads := [len(row) for row in numbers["entropy"]]) != self.heads:
            raise ValueError(f"the measurement is of a model with {heads} heads by layer, the metric of {self.heads}")
        self.num_queries += queries
        states = {name: getattr(self, name) for name in numbers}
        values = {
            name: torch.tensor(sum(rows, []), dtype=states[name].dtype, device=states[name].device)
            for name, rows in numbers.items()
        }
        for name, number in self._numbers(queries, values["empty_count"]).items():
            # a mean over no query is NaN
            values[name] = torch.where(number == 0, 0, number * values[name])
        for name, value in values.items():
            setattr(self, name, states[name] + value)

    def _numbers(self, queries: int, empty: Tensor) -> dict[str, Tensor]:
        """By the name of a mean, the number of queries that it is over."""
        return {"entropy": queries - empty, "max_entropy": torch.full_like(empty, queries)}

    def compute(self) -> dict[str, Any]:
        """
        The result of the metric of `evaluate`: `entropy`, `mean_entropy` and what else its page lists.

        Raises:
            ValueError: if nothing was measured.
        """
        queries = int(self.num_queries)
        values = {name: getattr(self, name) for name in FIELDS if name != "num_queries"}
        for name, number in self._numbers(queries, values["empty_count"]).items():
            values[name] = values[name] / number
        rows = {name: [row.tolist() for row in value.split(self.heads)] for name, value in values.items()}
        return combine([{"num_queries": queries, **rows}])
