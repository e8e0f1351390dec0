"""The rows of any dataset, and what a causal language model makes of their texts."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from modeling_lnfree.metrics.attention_entropy.attention_entropy import pad

from .data import evaluation_split, load_documents, load_splits, reading
from .errors import UserError
from .recipe import DataArguments


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats per token; infinite where that overflows."""
    return torch.tensor(nll, dtype=torch.float64).exp().item()


def _check_device(device: str | None):
    try:
        torch.empty(0, device=device)
    # torch without CUDA answers with an AssertionError
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def _open(name: str, config: str | None, split: str | None, streaming: bool):
    """The rows of one split, a `Dataset` or an `IterableDataset`."""
    if name == "stdlib":
        parts = load_documents(DataArguments(), seed=0)
        if split not in (None, *parts):
            raise UserError(f"split of 'stdlib' must be one of {', '.join(parts)}, got {split!r}")
        rows = parts[split or "eval"]
        return rows.to_iterable_dataset() if streaming else rows
    loaded = load_splits(name, config, split, streaming)
    return evaluation_split(loaded) if split is None else loaded


def _read(rows: Iterable[dict[str, Any]], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows; what goes wrong in reading a stream is an error of the dataset."""
    with reading(f"dataset {name!r} cannot be read"):
        yield from enumerate(rows)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _text(row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise UserError(f"text_column={column!r} is not a column of the dataset, which has {', '.join(row)}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"text_column={column!r} must hold texts, got {type(text).__name__}")
    return text or ""


def _negative_log_likelihoods(model: PreTrainedModel, sequences: list[list[int]]) -> list[Tensor]:
    """Of every token but the first of each sequence, in nats."""
    if not sequences:
        return []
    inputs = pad(sequences, model.device)
    logits = model(**inputs, use_cache=False).logits  # (batch, T, vocab)
    ends = map(len, sequences)
    return [
        F.cross_entropy(row[: end - 1].float(), token_ids[1:end], reduction="none")
        for row, token_ids, end in zip(logits, inputs["input_ids"], ends, strict=True)
    ]
