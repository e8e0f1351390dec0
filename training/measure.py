"""Perplexity and attention entropy of any causal language model on any texts, in one forward pass for both."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.metrics.attention_entropy.reading import encode, side
from modeling_lnfree.metrics.attention_entropy.recorder import LayerEntropy
from modeling_lnfree.metrics.attention_entropy.summary import summarize

from .errors import UserError, explained
from .files import aside_of, check_outputs, to_json, whole, write_atomically
from .plots import plot_heat_maps
from .runs import library_versions
from .texts import Texts, load_reader, negative_log_likelihoods, perplexity


# a row a text; entropies in nats
_FIGURES = pa.schema(
    {
        "row": pa.int64(),  # in the dataset
        "num_tokens": pa.int64(),
        "perplexity": pa.float64(),
        "nll": pa.list_(pa.float32()),  # of each token but the first, in nats
        "entropy": pa.list_(pa.list_(pa.float32())),  # (layers, heads), mean over the text's queries
        "position_entropy": pa.list_(pa.list_(pa.float32())),  # (layers, num_tokens), mean over the heads
    }
)


def measure(
    model_id: str,
    *,
    dataset: str,
    config: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    streaming: bool = False,
    max_length: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    json_path: str | Path | None = None,
    heat_map_path: str | Path | None = None,
    parquet_path: str | Path | None = None,
) -> dict[str, Any]:
    """
    Measures a model on the texts of a dataset, each by itself, with a progress bar.

    Perplexity is the exponential of the summed negative log-likelihood over the number of predicted tokens: all but
    the first of each text. Attention entropy is that of the metric `attention_entropy` (arXiv 2410.09637).

    Args:
        model_id: Hub id or folder of a causal language model with its tokenizer.
        dataset, config, split, text_column, max_samples, streaming: see `Texts`.
        max_length: only the first `max_length` tokens of a text are read; by default as many as the model has
            positions.
        batch_size: texts in a forward pass.
        device: by default an accelerator, if there is one.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default that of the weights.
        trust_remote_code: whether the code that comes with the model may be run.
        revision: branch, tag or commit of the model.
        json_path: where to write the results.
        heat_map_path: where to draw the entropy of every layer and head.
        parquet_path: where to write the figures of every text, a row each: the negative log-likelihood of its tokens,
            its entropy by layer and head, and by layer and position.

    Returns:
        The results: `perplexity`, `nll` (nats per token), counts of texts and tokens, `attention_entropy` as the
        metric of this name returns it, and all that they depend on.

    Raises:
        UserError: for a model or dataset that cannot be loaded or measured, and for files that cannot be written.
    """
    for name, number in (("batch_size", batch_size), ("max_samples", max_samples), ("max_length", max_length)):
        if number is not None and number < 1:
            raise UserError(f"{name} must be at least 1, got {number}")
    outputs = {"json_path": json_path, "heat_map_path": heat_map_path, "parquet_path": parquet_path}
    json_path, heat_map_path, parquet_path = check_outputs(outputs, inputs=[dataset, model_id])
    if heat_map_path is not None and heat_map_path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{heat_map_path} must end in .png, .pdf or .svg")
    texts = Texts(
        dataset,
        config=config,
        split=split,
        text_column=text_column,
        max_samples=max_samples,
        streaming=streaming,
    )
    model, tokenizer, max_length = load_reader(
        model_id,
        max_length=max_length,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    started = time.perf_counter()
    figures = None if parquet_path is None else _FiguresFile(parquet_path)
    try:
        measured = _measure(texts, model, tokenizer, max_length, batch_size, figures)
    finally:
        if figures is not None:
            figures.close()
    results = {
        "model": model_id,
        "revision": revision,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "dataset": dataset,
        "config": config,
        "split": texts.split,
        "text_column": texts.column,
        "max_samples": max_samples,
        "max_length": max_length,
        "batch_size": batch_size,
        **measured,
        "seconds": time.perf_counter() - started,
        "versions": library_versions(),
    }
    failures = [] if figures is None else figures.failures
    try:
        _print(results)
    finally:
        if json_path is not None:
            failures += _attempt(json_path, lambda: write_atomically(json_path, to_json(results)))
        if heat_map_path is not None:
            title = f"{Path(model_id).name}\n{Path(dataset).name}, {results['num_tokens']:,} tokens"
            failures += _attempt(heat_map_path, lambda: _draw(heat_map_path, results["attention_entropy"], title))
    # told at the end, after what was measured all the same
    if failures:
        raise UserError("; ".join(failures))
    return results


def _measure(
    texts: Texts,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int,
    figures: "_FiguresFile | None",
) -> dict[str, Any]:
    """Perplexity, counts and attention entropy over all texts; each text's own go to `figures`."""
    counts = dict.fromkeys(("num_texts", "skipped_texts", "truncated_texts", "num_tokens", "predicted_tokens"), 0)
    total_nll = 0.0
    layers: dict[str, Tensor] = {}  # of the last batch: name of the layer -> (batch, heads, T)

    def keep(measured: LayerEntropy):
        layers[measured.layer] = measured.entropy

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        with explained(f"model {model.name_or_path!r} cannot be measured"):
            # the towers of other modalities read no text
            decoder = model.base_model.get_decoder()
            on_layer = None if figures is None else keep
            record = stack.enter_context(record_attention_entropy(decoder, reduce=False, on_layer=on_layer))
        progress = stack.enter_context(tqdm(total=texts.number, desc="measuring", unit="text"))
        for batch in texts.batches(batch_size):
            token_ids = encode([text for _, text in batch], tokenizer)
            kept = [(index, ids[:max_length]) for (index, _), ids in zip(batch, token_ids, strict=True) if ids]
            counts["skipped_texts"] += len(batch) - len(kept)
            counts["truncated_texts"] += sum(len(ids) > max_length for ids in token_ids)
            for _, group in groupby(kept, key=lambda text: side(model, len(text[1]))):
                alike = list(group)
                likelihoods = negative_log_likelihoods(model, [ids for _, ids in alike])
                for position, ((index, ids), nll) in enumerate(zip(alike, likelihoods, strict=True)):
                    counts["num_texts"] += 1
                    counts["num_tokens"] += len(ids)
                    counts["predicted_tokens"] += len(nll)
                    total_nll += nll.cpu().double().sum().item()
                    if figures is not None:
                        entropies = [layers[name][position, :, : len(ids)] for name in record.layer_names]
                        figures.write(index, nll, entropies)
            progress.update(len(batch))
        if counts["predicted_tokens"] == 0:
            raise UserError(f"dataset {texts.dataset!r} has no text of two tokens in the column {texts.column!r}")
    if record.num_queries == 0:
        raise UserError(f"model {model.name_or_path!r} cannot be measured: {'; '.join(record.unmeasured)}")
    if figures is not None:
        figures.finish()
    mean_nll = total_nll / counts["predicted_tokens"]
    entropy = {"attention_entropy": summarize(record), "unmeasured": record.unmeasured}
    return {"perplexity": perplexity(mean_nll), "nll": mean_nll, **counts, **entropy}


class _FiguresFile:
    """A row a text of `_FIGURES`, in a file that is whole or not there. A full disk ends it, not the measurement."""

    def __init__(self, path: Path):
        self.path = path
        self.failures: list[str] = []
        self.writer = pq.ParquetWriter(aside_of(path), _FIGURES)

    def write(self, index: int, nll: Tensor, entropies: list[Tensor]):
        """The row of one text; `entropies` has a tensor `(heads, num_tokens)` a layer."""
        row = {
            "row": index,
            "num_tokens": entropies[0].shape[1],
            "perplexity": perplexity(nll.cpu().double().mean().item()),
            "nll": nll.tolist(),
            "entropy": [layer.mean(1).tolist() for layer in entropies],
            "position_entropy": [layer.mean(0).tolist() for layer in entropies],
        }
        self._attempt(lambda: self.writer.write(pa.RecordBatch.from_pylist([row], _FIGURES)))

    def finish(self):
        """Gives the file its name."""
        self._attempt(self.writer.close)
        self._attempt(lambda: os.replace(aside_of(self.path), self.path))

    def close(self):
        """Removes what is left of a file that was not finished."""
        with suppress(OSError):
            self.writer.close()
        aside_of(self.path).unlink(missing_ok=True)

    def _attempt(self, write: Callable[[], None]):
        if not self.failures:
            self.failures += _attempt(self.path, write)


def _attempt(path: Path, write: Callable[[], None]) -> list[str]:
    """Why a file could not be written, if so."""
    try:
        with explained(f"{path} cannot be written"):
            write()
    except UserError as error:
        return [str(error)]
    return []


def _draw(path: Path, entropy: dict[str, Any], title: str):
    with whole(path) as aside:
        plot_heat_maps([entropy], [title]).savefig(aside, format=path.suffix[1:])


def _print(results: dict[str, Any]):
    entropy = results["attention_entropy"]
    shares = ", ".join(f"{100 * share:.0f} %" for share in entropy["head_distribution"])
    print(
        f"{results['model']} on {results['num_texts']:,} texts of {results['dataset']}: "
        f"perplexity {results['perplexity']:.3f} over {results['predicted_tokens']:,} tokens\n"
        f"attention entropy: {entropy['mean_entropy']:.3f} nats; by layer "
        + ", ".join(f"{value:.2f}" for value in entropy["layer_entropy"])
        + f"; heads in the quarters of their largest entropy: {shares}"
    )
    for count, what in (
        ("truncated_texts", f"longer than max_length={results['max_length']} tokens: the rest of them is left out"),
        ("skipped_texts", "without a token: left out"),
    ):
        if results[count]:
            print(f"{results[count]:,} of {results['num_texts'] + results['skipped_texts']:,} texts are {what}")
