"""Perplexity and attention entropy of any causal language model on any texts, in one forward pass for both."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from modeling_lnfree import record_attention_entropy, use_fast_cpu
from modeling_lnfree.metrics.attention_entropy.attention_entropy import (
    check_max_length,
    encode,
    load_model,
    side,
    summarize,
)
from modeling_lnfree.metrics.attention_entropy.recorder import LayerEntropy

from .encryption.counting import count_operations
from .encryption.fixed_point import check_model, measure_fixed_point
from .encryption.tables import compare_costs, tabulate
from .errors import UserError, one_line
from .files import write_atomically
from .plots import plot_heat_maps
from .recipe import check_model_id
from .runs import library_versions
from .tables import to_markdown
from .texts import _batches, _check_device, _negative_log_likelihoods, _open, _read, _text, perplexity


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
    text_column: str = "content",
    max_samples: int | None = None,
    streaming: bool = False,
    max_length: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    private_cost: int | None = None,
    fixed_point: bool = False,
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
        dataset: Hub id, folder or file of a dataset, or `"stdlib"`, the evaluation part of the embedded corpus.
        config: configuration of the dataset.
        split: of the dataset; by default `validation`, else `test`, else the first.
        text_column: column that holds the texts.
        max_samples: number of rows to read, from the first; None: all.
        streaming: whether the dataset is read while it is measured instead of being prepared first.
        max_length: only the first `max_length` tokens of a text are read; by default as many as the model has
            positions.
        batch_size: texts in a forward pass.
        device: by default an accelerator, if there is one.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; by default that of the weights.
        trust_remote_code: whether the code that comes with the model may be run.
        revision: branch, tag or commit of the model.
        private_cost: count also what costs under encryption, in a forward pass over `batch_size` texts of `max_length`
            tokens and in generating so many tokens after them.
        fixed_point: measure also the largest values, and the fewest bits at which perplexity stays within 1 %; takes
            about ten further passes over the texts.
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
    if private_cost is not None and private_cost < 0:
        raise UserError(f"private_cost must be at least 0 new tokens, got {private_cost}")
    json_path, heat_map_path, parquet_path = map(_check_output, (json_path, heat_map_path, parquet_path))
    if heat_map_path is not None and heat_map_path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{heat_map_path} must end in .png, .pdf or .svg")
    check_model_id(model_id)
    rows = _open(dataset, config, split, streaming)
    if max_samples is not None:
        # datasets 5.1 takes no more rows than there are
        rows = rows.take(max_samples if streaming else min(max_samples, len(rows)))
    # a wrong column is told before a model is loaded
    for _, row in islice(_read(rows, dataset), 1):
        _text(row, text_column)
    _check_device(device)
    try:
        model = load_model(
            model_id, device=device, trust_remote_code=trust_remote_code, revision=revision, dtype=dtype
        )
        use_fast_cpu(model)
        tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=trust_remote_code)
        max_length = check_max_length(model, tokenizer, max_length)
        if fixed_point:
            check_model(model)
        if private_cost is not None:
            sizes = {"length": max_length, "batch_size": batch_size, "new_tokens": private_cost}
            operations = count_operations(type(model), model.config, **sizes)
    except (OSError, ValueError) as error:
        raise UserError(f"model {model_id!r} cannot be measured: {one_line(error)}") from error

    started = time.perf_counter()
    counts = dict.fromkeys(("num_texts", "skipped_texts", "truncated_texts", "num_tokens", "predicted_tokens"), 0)
    total_nll = 0.0
    layers: dict[str, Tensor] = {}  # of the last batch: name of the layer -> (batch, heads, T)

    def keep(measured: LayerEntropy):
        layers[measured.layer] = measured.entropy

    with ExitStack() as stack:
        writer = stack.enter_context(_figures_writer(parquet_path)) if parquet_path is not None else None
        on_layer = keep if writer is not None else None
        stack.enter_context(torch.no_grad())
        # the towers of other modalities read no text
        decoder = model.base_model.get_decoder()
        try:
            record = stack.enter_context(record_attention_entropy(decoder, reduce=False, on_layer=on_layer))
        except ValueError as error:
            raise UserError(f"model {model_id!r} cannot be measured: {error}") from None
        total = max_samples if streaming else len(rows)
        progress = stack.enter_context(tqdm(total=total, desc="measuring", unit="text"))
        for batch in _batches(_read(rows, dataset), batch_size):
            token_ids = encode([_text(row, text_column) for _, row in batch], tokenizer)
            kept = [(index, ids[:max_length]) for (index, _), ids in zip(batch, token_ids, strict=True) if ids]
            counts["skipped_texts"] += len(batch) - len(kept)
            counts["truncated_texts"] += sum(len(ids) > max_length for ids in token_ids)
            for _, alike in groupby(kept, key=lambda text: side(model, len(text[1]))):
                alike = list(alike)
                likelihoods = _negative_log_likelihoods(model, [ids for _, ids in alike])
                for position, ((index, ids), nll) in enumerate(zip(alike, likelihoods, strict=True)):
                    counts["num_texts"] += 1
                    counts["num_tokens"] += len(ids)
                    counts["predicted_tokens"] += len(nll)
                    total_nll += nll.cpu().double().sum().item()
                    if writer is not None:
                        entropies = [layers[name][position, :, : len(ids)] for name in record.layer_names]
                        writer.write(_figures(index, nll, entropies))
            progress.update(len(batch))
        if counts["predicted_tokens"] == 0:
            raise UserError(f"dataset {dataset!r} has no text of two tokens in the column {text_column!r}")
    if record.num_queries == 0:
        raise UserError(f"model {model_id!r} cannot be measured: {'; '.join(record.unmeasured)}")

    if fixed_point:

        @torch.no_grad()
        def evaluate() -> float:
            likelihoods = []
            for batch in tqdm(_batches(_read(rows, dataset), batch_size), desc="fixed point", unit="batch"):
                token_ids = encode([_text(row, text_column) for _, row in batch], tokenizer)
                kept = [ids[:max_length] for ids in token_ids if ids]
                for _, alike in groupby(kept, key=lambda ids: side(model, len(ids))):
                    likelihoods += _negative_log_likelihoods(model, list(alike))
            return torch.cat(likelihoods).cpu().double().mean().item()

        try:
            bits = measure_fixed_point(model, evaluate)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"model {model_id!r} cannot be measured: {error}; leave out --fixed-point") from None

    nll = total_nll / counts["predicted_tokens"]
    results = {
        "model": model_id,
        "revision": revision,
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "dataset": dataset,
        "config": config,
        "split": None if rows.split is None else str(rows.split),
        "text_column": text_column,
        "max_samples": max_samples,
        "max_length": max_length,
        "batch_size": batch_size,
        "perplexity": perplexity(nll),
        "nll": nll,
        **counts,
        "attention_entropy": summarize(record),
        "unmeasured": record.unmeasured,
        **({} if private_cost is None else {"private_cost": operations}),
        **({"fixed_point": bits} if fixed_point else {}),
        "seconds": time.perf_counter() - started,
        "versions": library_versions(),
    }
    if json_path is not None:
        write_atomically(json_path, json.dumps(results, indent=1))
    if heat_map_path is not None:
        title = f"{Path(model_id).name}\n{Path(dataset).name}, {counts['num_tokens']:,} tokens"
        plot_heat_maps([results["attention_entropy"]], [title]).savefig(heat_map_path)
    _print(results)
    return results


def _check_output(path: str | Path | None) -> Path | None:
    """The path of a file to write, whose folder exists."""
    if path is None:
        return None
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: it is a folder, or its folder is read-only")
    return path


@contextmanager
def _figures_writer(path: Path) -> Iterator[pq.ParquetWriter]:
    """A writer of `_FIGURES` whose file is whole or not there."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.aside")
    try:
        with pq.ParquetWriter(aside, _FIGURES) as writer:
            yield writer
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _figures(index: int, nll: Tensor, entropies: list[Tensor]) -> pa.RecordBatch:
    """The row of one text; `entropies` has a tensor `(heads, num_tokens)` a layer."""
    row = {
        "row": index,
        "num_tokens": entropies[0].shape[1],
        "perplexity": perplexity(nll.cpu().double().mean().item()),
        "nll": nll.tolist(),
        "entropy": [layer.mean(1).tolist() for layer in entropies],
        "position_entropy": [layer.mean(0).tolist() for layer in entropies],
    }
    return pa.RecordBatch.from_pylist([row], _FIGURES)


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
    if "fixed_point" in results:
        bits = results["fixed_point"]
        print(
            f"largest residual {bits['largest_residual']:.3g}, attention score {bits['largest_score']:.3g}, value of "
            f"any operation {bits['largest_value']:.3g}, which {bits['integer_bits_to_hold']} integer bits hold"
        )
        if bits["integer_bits"] is None:
            print("fixed point: no number of bits that was tried keeps perplexity within 1 %")
        else:
            print(
                f"fixed point that saturates keeps perplexity {bits['perplexity']:.3f} within 1 % with "
                f"{bits['integer_bits']} integer and {bits['fraction_bits']} fractional bits "
                f"({bits['fixed_point_perplexity']:.3f})"
            )
    if "private_cost" in results:
        _print_private_cost(results["private_cost"])


def _print_private_cost(counts: dict[str, Any]):
    """A table by block and one of totals, for each phase."""
    name, baseline = counts["variant"] or counts["model_class"], counts.get("baseline")
    inputs = f"{counts['batch_size']} x {counts['length']} tokens"
    for phase, title in (
        ("forward", f"one forward pass over {inputs}"),
        ("generation", f"generating {counts['new_tokens']} tokens after {inputs}, with a cache"),
    ):
        if counts[phase] is None:
            continue
        named = [(name, counts[phase])]
        if baseline is not None:
            named.insert(0, (baseline["variant"], baseline[phase]))
        places = [*((str(i), layer) for i, layer in enumerate(counts[phase]["layers"]))]
        print(f"\nprivate cost of {title}:\n")
        blocks = [tabulate([*places, ("outside", counts[phase]["outside"])], "layer")]
        print(to_markdown([*blocks, *compare_costs(named, baseline and baseline[phase])]))
