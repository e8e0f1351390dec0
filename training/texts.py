"""The texts of any dataset, and what a causal language model makes of them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset, Value
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_lnfree import use_fast_cpu
from modeling_lnfree.likelihood import is_causal
from modeling_lnfree.metrics.attention_entropy.reading import check_max_length, load_model

from .data import check_reachable, evaluation_split, has_vocabulary, load_documents, load_splits, reading
from .errors import UserError, explained
from .recipe import DataArguments, check_model_id


class Texts:
    """
    The texts of one split of a dataset, in the order of its rows; a row without one has an empty text.

    Args:
        dataset: Hub id, folder or file of a dataset, or `"stdlib"`, the evaluation part of the embedded corpus.
        config: configuration of the dataset.
        split: by default `validation`, else `test`, else the first.
        text_column: by default the only column that holds texts.
        max_samples: number of rows to read, from the first; None: all.
        streaming: whether the dataset is read while it is iterated over instead of being prepared first.

    Attributes:
        column: that holds the texts.
        split: its name, None where the dataset does not tell.
        number: of rows; None where it is not known beforehand.

    Raises:
        UserError: for a dataset that cannot be loaded or read, and for one without such a column of texts.
    """

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        split: str | None = None,
        text_column: str | None = None,
        max_samples: int | None = None,
        streaming: bool = False,
    ):
        self.dataset = dataset
        rows = _load_rows(dataset, config, split, streaming)
        if max_samples is not None:
            # datasets 5.1 takes no more rows than there are
            rows = rows.take(max_samples if streaming else min(max_samples, len(rows)))
        self.rows = rows
        self.split = None if rows.split is None else str(rows.split)
        self.number = max_samples if streaming else len(rows)
        # a wrong column is told before a model is loaded
        first = next(islice(self._read(), 1), {})
        self.column = self._find_column(first) if text_column is None else text_column
        if first:
            self._text(first)

    def __iter__(self) -> Iterator[str]:
        return map(self._text, self._read())

    def _read(self) -> Iterator[dict[str, Any]]:
        with reading(f"dataset {self.dataset!r} cannot be read"):
            yield from self.rows

    def _find_column(self, row: dict[str, Any]) -> str:
        features = self.rows.features or {}
        # a stream may know no types before its first row
        names = list(features) or list(row)
        texts = [
            name
            for name in names
            if features.get(name) in (Value("string"), Value("large_string")) or isinstance(row.get(name), str)
        ]
        if isinstance(self.rows, Dataset):
            # a column of JSON that is empty may have been one of texts
            tables = {name: self.rows.data.column(name) for name in texts}
            texts = [name for name, column in tables.items() if column.null_count < len(column)]
        if len(texts) == 1:
            return texts[0]
        if not texts:
            raise UserError(f"dataset {self.dataset!r} has no column of texts among {', '.join(names) or 'its none'}")
        raise UserError(f"text_column must name one of the columns of texts: {', '.join(texts)}")

    def _text(self, row: dict[str, Any]) -> str:
        if self.column not in row:
            raise UserError(f"text_column={self.column!r} is not a column of the dataset, which has {', '.join(row)}")
        text = row[self.column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"text_column={self.column!r} must hold texts, got {type(text).__name__}")
        return text or ""


def _load_rows(name: str, config: str | None, split: str | None, streaming: bool) -> Dataset | IterableDataset:
    if name == "stdlib":
        if config is not None:
            raise UserError(f"dataset 'stdlib' has no configurations, got config={config!r}")
        parts = load_documents(DataArguments(), seed=0)
        if split not in (None, *parts):
            raise UserError(f"split of 'stdlib' must be one of {', '.join(parts)}, got {split!r}")
        rows = parts[split or "eval"]
        return rows.to_iterable_dataset() if streaming else rows
    loaded = load_splits(name, config, split, streaming)
    return evaluation_split(loaded) if split is None else loaded


def load_reader(
    model_id: str,
    *,
    max_length: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """
    A causal language model in evaluation mode, its tokenizer, and how many tokens of a text are read: `max_length`, by
    default as many as both take. Raises UserError for what cannot be loaded.
    """
    check_model_id(model_id, revision)
    check_reachable("model", model_id)
    _check_device(device)
    with explained(f"model {model_id!r} cannot be measured"):
        model = load_model(
            model_id, device=device, trust_remote_code=trust_remote_code, revision=revision, dtype=dtype
        )
        tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=trust_remote_code)
        max_length = check_max_length(model, tokenizer, max_length)
        causal = is_causal(model, max_length)
    if not has_vocabulary(tokenizer):
        raise UserError(f"model {model_id!r} cannot be measured: no tokenizer came with it")
    if not causal:
        raise UserError(
            f"model {model_id!r} is no causal language model: what it says of a token depends on the tokens after it, "
            "and perplexity would mean something else; the metric attention_entropy measures encoders too"
        )
    return use_fast_cpu(model), tokenizer, max_length


def _check_device(device: str | None):
    with explained(f"device {device!r} cannot be used"):
        if torch.empty(0, device=device).is_meta:
            raise UserError("device 'meta' cannot be used: it holds no values")
