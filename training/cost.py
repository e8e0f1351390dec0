"""`lnfree cost`: what a model costs under encryption, counted, and the bits of fixed point that it needs."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_lnfree.likelihood import Likelihood, Reading
from modeling_lnfree.measurement import Meter

from .data import check_reachable
from .encryption.counting import PHASES, count_operations
from .encryption.fixed_point import measure_fixed_point
from .encryption.named import find_named
from .encryption.prices import NETWORKS, Network, find_network
from .encryption.published import find_published
from .encryption.tables import (
    compare_costs,
    cost_rows,
    describe_sources,
    explain,
    operation_rows,
    place_rows,
    published_rows,
    step_rows,
    tabulate,
    to_table,
)
from .errors import UserError, explained, refused
from .files import check_outputs, to_json, write_atomically
from .pages import check_docs, find_marks, write_table
from .recipe import check_model_id
from .runs import library_versions
from .tables import Block, to_markdown
from .texts import Texts, load_reader


def cost(
    model_ids: Sequence[str],
    *,
    length: int | None = None,
    batch_size: int | None = None,
    new_tokens: int = 0,
    networks: Sequence[str] | None = None,
    steps: bool = False,
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
    docs_path: str | Path | None = None,
) -> dict[str, Any]:
    """
    Counts the operations on private data of a forward pass and of generating, from configurations alone, and what they
    cost: rounds, bytes, and seconds on a network. Or, with `fixed_point`, finds by a model's weights and texts the
    largest values and the fewest bits at which perplexity stays within 1 %, in about ten passes over the texts. Prints
    what it found.

    Args:
        model_ids: Hub ids, folders or names (see `find_named`) of causal language models, which are compared with the
            first; one for `fixed_point`, which takes its tokenizer too.
        length: tokens of the input, or of a text that are read; by default as many as every model has positions for.
        batch_size: inputs, 1 by default; texts in a forward pass, 8 by default.
        new_tokens: tokens to generate after the input.
        networks: see `find_network`; `lan` and `wan` by default.
        steps: whether the steps are printed that operations are composed of.
        fixed_point: whether bits are searched for instead of operations counted.
        dataset, config, split, text_column, max_samples: of the texts for `fixed_point`, see `Texts`.
        device: for `fixed_point`; by default an accelerator, if there is one.
        trust_remote_code: whether the code that comes with the model may be run.
        revision: branch, tag or commit of the models.
        json_path: where to write the results.
        docs_path: `docs/data/NAME.json` of a checkout: where to write the models' costs, if a page has a mark for
            NAME; as NAME-token those of one token, as NAME-operations and -steps the first model's, as
            NAME-published totals of papers, each if a page has a mark for it.

    Returns:
        `model`, `revision`, `versions`, and `private_cost` as `count_operations` returns it, with `others` (`model`
        and `private_cost` of those after the first); or `fixed_point` as `measure_fixed_point` returns it.

    Raises:
        UserError: for a model or dataset that cannot be loaded or counted, and for a file that cannot be written.
    """
    for name, number, least in (
        *(("length", length, 1), ("batch_size", batch_size, 1), ("max_samples", max_samples, 1)),
        ("new_tokens", new_tokens, 0),
    ):
        if number is not None and number < least:
            raise UserError(f"{name} must be at least {least}, got {number}")
    inputs = [*model_ids, *([dataset] if dataset is not None else [])]
    (json_path,) = check_outputs({"json_path": json_path}, inputs)
    loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if fixed_point:
        if dataset is None:
            raise UserError("--fixed-point needs texts to keep the perplexity of: --dataset NAME_OR_FILE")
        if len(model_ids) > 1:
            raise UserError(f"--fixed-point is of one model, got {', '.join(model_ids)}")
        texts = Texts(dataset, config=config, split=split, text_column=text_column, max_samples=max_samples)
        # which is what fixed point is simulated in
        reader = load_reader(model_ids[0], max_length=length, device=device, dtype="float32", **loading)
        bits = _find_bits(model_ids[0], texts, *reader, batch_size or 8)
        _print_bits(bits)
        found: dict[str, Any] = {"dataset": dataset, "fixed_point": bits}
    elif dataset is not None:
        raise UserError(f"--dataset {dataset} has no effect without --fixed-point: operations do not depend on texts")
    else:
        found = _count(
            model_ids, loading, length, batch_size or 1, new_tokens, networks or list(NETWORKS), steps, docs_path
        )
    results = {"model": model_ids[0], "revision": revision, **found, "versions": library_versions()}
    if json_path is not None:
        with explained(f"{json_path} cannot be written"):
            write_atomically(json_path, to_json(results))
    return results


def _count(
    model_ids: Sequence[str],
    loading: dict[str, Any],
    length: int | None,
    batch_size: int,
    new_tokens: int,
    networks: Sequence[str],
    steps: bool,
    docs_path: str | Path | None,
) -> dict[str, Any]:
    """`private_cost` and `others` of `cost`, printed, and written into the docs where there is a path."""
    docs = None if docs_path is None else check_docs(Path(docs_path).parent.parent)
    lines = [find_network(name) for name in networks]
    models = _load(model_ids, loading)
    if length is None:
        length = min(_positions(model.config) for model in models)
    counted = []
    for name, model in zip(model_ids, models, strict=True):
        with explained(f"model {name!r} cannot be counted"):
            sizes = {"length": length, "batch_size": batch_size, "new_tokens": new_tokens}
            counted.append(count_operations(type(model), model.config, **sizes))
    names = _name(model_ids, counted)
    _print_counts(names, counted, lines, steps)
    published = [
        (name, counts["forward"], find_published(model.config, counts["variant"], length, batch_size))
        for name, counts, model in zip(names, counted, models, strict=True)
    ]
    if beside := published_rows(published):
        print("totals that papers have, of all parties together, beside ours:\n")
        print(to_markdown([to_table(beside)]), end="\n\n")
    others = [{"model": name, "private_cost": counts} for name, counts in zip(model_ids, counted, strict=True)][1:]
    if docs is not None:
        first = counted[0]["forward"]
        tables = {"-steps": step_rows(first)}
        for phase, suffix in (("forward", ""), ("token", "-token")):
            named = [(name, counts[phase]) for name, counts in zip(names, counted, strict=True)]
            tables[suffix] = cost_rows(named, lines, named[0][1] if others else None)
        tables |= {"-operations": operation_rows(first, lines), "-published": beside}
        command = shlex.join(["lnfree", "cost", *model_ids, "--tokens", str(length)])
        _write_tables(docs, Path(str(docs_path)).stem, tables, command)
    return {"private_cost": counted[0], **({"others": others} if others else {})}


def _write_tables(docs: Path, name: str, tables: dict[str, list[dict[str, Any]]], command: str):
    """Those of the tables that a page has a mark for, by the name and their suffixes."""
    marks = find_marks(docs)
    shown = {suffix: rows for suffix, rows in tables.items() if rows and f"{name}{suffix}" in marks}
    if not shown:
        raise UserError(f"no page of {docs} has a mark for {', '.join(f'{name}{suffix}' for suffix in tables)}")
    for suffix, rows in shown.items():
        write_table(docs, f"{name}{suffix}", rows, command + " --steps" * (suffix == "-steps"))


def _load(model_ids: Sequence[str], loading: dict[str, Any]) -> list[PreTrainedModel]:
    """The models on the meta device: their classes and configurations, without weights."""
    models = []
    for model_id in model_ids:
        config = find_named(model_id)
        if config is None:
            check_model_id(model_id, loading["revision"])
            check_reachable("model", model_id)
        with explained(f"model {model_id!r} cannot be counted"):
            if config is None:
                config = AutoConfig.from_pretrained(model_id, **loading)
            with torch.device("meta"):
                trusted = loading["trust_remote_code"]
                models.append(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted))
    return models


def _name(model_ids: Sequence[str], counted: list[dict[str, Any]]) -> list[str]:
    """By which rows are told apart: one model is known, several are called as they were given."""
    if len(counted) == 1:
        return [counted[0]["variant"] or counted[0]["model_class"]]
    return list(model_ids)


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
    reading = Reading(tokenizer, max_length, batch_size=batch_size)

    def evaluate() -> float:
        found = Likelihood()
        for _ in tqdm(Meter(model, reading, found).read(texts), desc="fixed point", unit="batch"):
            pass
        if not found.predicted_tokens:
            raise UserError(f"dataset {texts.dataset!r} has no text of two tokens in the column {texts.column!r}")
        return found.nll

    with refused(f"model {model_id!r} cannot be measured in fixed point"):
        return measure_fixed_point(model, evaluate)


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


def _print_counts(names: list[str], counted: list[dict[str, Any]], networks: list[Network], steps: bool):
    """For each phase a table of all models; of one model also by operation and by block, and beside SM+LN+G."""
    first = counted[0]
    baseline = first.get("baseline")
    inputs = f"{first['batch_size']} x {first['length']} tokens"
    titles = {
        "forward": f"one forward pass over {inputs}",
        "token": f"a pass over the last of {inputs}, the others in the cache",
        "generation": f"generating {first['new_tokens']} tokens after {inputs}, with a cache",
    }
    for phase in PHASES:
        if first[phase] is None:
            continue
        named = [(name, counts[phase]) for name, counts in zip(names, counted, strict=True)]
        blocks: list[Block] = [f"private cost of {titles[phase]}:"]
        if len(named) > 1:
            blocks += compare_costs(named, named[0][1], networks, against=names[0])
        else:
            places = [*((str(i), layer) for i, layer in enumerate(first[phase]["layers"]))]
            blocks.append(tabulate([*places, ("outside", first[phase]["outside"])], "layer"))
            blocks += [to_table(rows(first[phase], networks)) for rows in (operation_rows, place_rows)]
            if baseline is not None:
                named.insert(0, (baseline["variant"], baseline[phase]))
            blocks += compare_costs(named, baseline and baseline[phase], networks)
        if steps:
            blocks.append(to_table(step_rows(first[phase])))
        print(to_markdown(blocks), end="\n\n")
    if steps:
        print(to_markdown(describe_sources()), end="\n\n")
    print(explain(networks, [counts[phase] for counts in counted for phase in PHASES if counts[phase]]), end="\n\n")
