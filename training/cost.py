"""`lnfree cost`: what a model costs under encryption, counted, and the bits of fixed point that it needs."""

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_lnfree.metrics.attention_entropy.reading import encode, side

from .data import check_reachable
from .encryption.counting import count_operations
from .encryption.fixed_point import measure_fixed_point
from .encryption.tables import compare_costs, tabulate
from .errors import UserError, explained
from .files import check_outputs, to_json, write_atomically
from .recipe import check_model_id
from .runs import library_versions
from .tables import to_markdown
from .texts import Texts, load_reader, negative_log_likelihoods


def cost(
    model_id: str,
    *,
    length: int | None = None,
    batch_size: int | None = None,
    new_tokens: int = 0,
    fixed_point: bool = False,
    dataset: str | None = None,
    config: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    max_samples: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """
    Counts the operations on private data of a forward pass and of generating, from a model's configuration alone; or,
    with `fixed_point`, finds by its weights and texts the largest values and the fewest bits at which perplexity stays
    within 1 %, in about ten passes over the texts. Prints what it found.

    Args:
        model_id: Hub id or folder of a causal language model; `fixed_point` takes its tokenizer too.
        length: tokens of the input, or of a text that are read; by default as many as the model has positions.
        batch_size: inputs, 1 by default; texts in a forward pass, 8 by default.
        new_tokens: tokens to generate after the input.
        fixed_point: whether bits are searched for instead of operations counted.
        dataset, config, split, text_column, max_samples: of the texts for `fixed_point`, see `Texts`.
        device: for `fixed_point`; by default an accelerator, if there is one.
        trust_remote_code: whether the code that comes with the model may be run.
        revision: branch, tag or commit of the model.
        json_path: where to write the results.

    Returns:
        `model`, `revision`, `versions`, and `private_cost` as `count_operations` returns it, or `fixed_point` as
        `measure_fixed_point` does.

    Raises:
        UserError: for a model or dataset that cannot be loaded or counted, and for a file that cannot be written.
    """
    for name, number, least in (
        *(("length", length, 1), ("batch_size", batch_size, 1), ("max_samples", max_samples, 1)),
        ("new_tokens", new_tokens, 0),
    ):
        if number is not None and number < least:
            raise UserError(f"{name} must be at least {least}, got {number}")
    inputs = [name for name in (model_id, dataset) if name is not None]
    (json_path,) = check_outputs({"json_path": json_path}, inputs)
    found: dict[str, Any]
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if fixed_point:
        if dataset is None:
            raise UserError("--fixed-point needs texts to keep the perplexity of: --dataset NAME_OR_FILE")
        texts = Texts(dataset, config=config, split=split, text_column=text_column, max_samples=max_samples)
        # which is what fixed point is simulated in
        reader = load_reader(model_id, max_length=length, device=device, dtype="float32", **loading)
        found = {"dataset": dataset, "fixed_point": _find_bits(model_id, texts, *reader, batch_size or 8)}
        _print_bits(found["fixed_point"])
    else:
        if dataset is not None:
            raise UserError(
                f"--dataset {dataset} has no effect without --fixed-point: operations do not depend on texts"
            )
        found = {"private_cost": _count(model_id, length, batch_size or 1, new_tokens, loading)}
        _print_counts(found["private_cost"])
    results = {"model": model_id, "revision": revision, **found, "versions": library_versions()}
    if json_path is not None:
        with explained(f"{json_path} cannot be written"):
            write_atomically(json_path, to_json(results))
    return results


def _count(
    model_id: str, length: int | None, batch_size: int, new_tokens: int, loading: dict[str, Any]
) -> dict[str, Any]:
    check_model_id(model_id)
    check_reachable("model", model_id)
    with explained(f"model {model_id!r} cannot be counted"):
        config = AutoConfig.from_pretrained(model_id, **loading)
        if length is None:
            length = _positions(config)
        # its class, without its weights
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=loading["trust_remote_code"])
        return count_operations(type(model), config, length=length, batch_size=batch_size, new_tokens=new_tokens)


def _positions(config: PreTrainedConfig) -> int:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        raise UserError("length must be given for a model without a largest number of positions")
    return positions


@torch.no_grad()
def _find_bits(
    model_id: str,
    texts: Texts,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    batch_size: int,
) -> dict[str, Any]:
    def evaluate() -> float:
        likelihoods = []
        for batch in tqdm(texts.batches(batch_size), desc="fixed point", unit="batch"):
            kept = [ids[:max_length] for ids in encode([text for _, text in batch], tokenizer) if ids]
            for _, alike in groupby(kept, key=lambda ids: side(model, len(ids))):
                likelihoods += negative_log_likelihoods(model, list(alike))
        if not sum(map(len, likelihoods)):
            raise UserError(f"dataset {texts.dataset!r} has no text of two tokens in the column {texts.column!r}")
        return torch.cat(likelihoods).cpu().double().mean().item()

    try:
        return measure_fixed_point(model, evaluate)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model {model_id!r} cannot be measured in fixed point: {error}") from None


def _print_bits(bits: dict[str, Any]):
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


def _print_counts(counts: dict[str, Any]):
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
        by_block = tabulate([*places, ("outside", counts[phase]["outside"])], "layer")
        blocks = [f"private cost of {title}:", by_block, *compare_costs(named, baseline and baseline[phase])]
        print(to_markdown(blocks), end="\n\n")
