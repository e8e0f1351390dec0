"""`lnfree attribute`: which parts of a model make its next token, as tables and a picture."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_lnfree import activation_patching, attribute_logits, attribution_patching, logit_lens
from modeling_lnfree.attribution import LogitAttribution, LogitLens
from modeling_lnfree.patching import PatchingScores

from .convert.convert import load_in_family
from .data import has_vocabulary
from .errors import UserError, explained, refused
from .files import check_outputs, to_json, write_atomically
from .plots import check_picture, plot_attribution, save_picture
from .runs import library_versions
from .tables import Block, Table, to_markdown


# rows of a table
_SHOWN = 10


def attribute(
    model_id: str,
    text: str,
    *,
    revision: str | None = None,
    target: str | None = None,
    against: str | None = None,
    neurons: bool = False,
    linearize: bool = False,
    lens: bool = False,
    corrupted: str | None = None,
    real: bool = False,
    json_path: str | Path | None = None,
    picture_path: str | Path | None = None,
) -> dict[str, Any]:
    """
    Splits the logit of the token after a text into what the parts of the model add (`attribute_logits`), and prints
    the largest. With `corrupted`, scores by one backward pass whose output matters for the answer to `text`, and not
    to that other text (`attribution_patching`).

    Args:
        model_id: Hub id or folder of a causal language model with its tokenizer: of this family, or of a class that
            `convert` takes, which is then converted in memory.
        text: what the token follows.
        revision: branch, tag or commit of the model.
        target, against: texts of one token; by default the likeliest token, and none. With `corrupted`: the token of
            which the logit is scored, and whose is subtracted; by default the likeliest after either text.
        neurons, linearize: see `attribute_logits`.
        lens: whether to read the residual stream behind every layer too (`logit_lens`).
        corrupted: a text of as many tokens as `text`.
        real: whether to exchange every output for real as well (`activation_patching`).
        json_path: where to write the results.
        picture_path: where to draw them.

    Returns:
        `model`, `revision`, `text`, `tokens`, `versions`, and of what was asked for: `target`, `logit`, `parts` by
        name and, for a norm that was held, `effects` and `error`; `lens`, a list by layer; `scores`, a list by part
        and position, and `error` of them against the real ones.

    Raises:
        UserError: for a model that cannot be loaded or split, a text that has no token or other than as many, and for
            files that cannot be written.
    """
    if real and corrupted is None:
        raise UserError("--real is of --corrupted TEXT, which names what outputs are exchanged for")
    if corrupted is not None and (neurons or linearize):
        raise UserError("--neurons and --linearize are of splitting a logit, which --corrupted takes the place of")
    outputs = {"json_path": json_path, "picture_path": picture_path}
    json_path, picture_path = check_outputs(outputs, inputs=[model_id])
    check_picture(picture_path)
    model = load_in_family(model_id, revision).eval()
    with explained(f"the tokenizer of {model_id!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision)
    if not has_vocabulary(tokenizer):
        raise UserError(f"model {model_id!r} cannot read a text: no tokenizer came with it")
    input_ids = _encode(text, tokenizer)
    tokens = [_name(token, tokenizer) for token in input_ids[0].tolist()]
    right, wrong = (None if token is None else _one_token(token, tokenizer) for token in (target, against))
    split, scores, stream = None, None, None
    results: dict[str, Any] = {"model": model_id, "revision": revision, "text": text, "tokens": tokens}
    with refused(f"model {model_id!r} cannot be attributed"):
        if corrupted is None:
            split = attribute_logits(model, input_ids, right, against=wrong, neurons=neurons, linearize=linearize)
            results |= _split_results(split, wrong, tokenizer)
        else:
            other_ids = _encode(corrupted, tokenizer)
            right = _likeliest(model, input_ids) if right is None else right
            wrong = _likeliest(model, other_ids) if wrong is None else wrong
            answers = {"target": _name(right, tokenizer), "against": _name(wrong, tokenizer)}
            scores, exchanged = _patch(model, input_ids, other_ids, right, wrong, answers["target"], real)
            results |= {"corrupted": corrupted, **answers, **_score_results(scores, exchanged, tokens)}
        if lens:
            stream = logit_lens(model, input_ids)
            results["lens"] = _lens_results(stream, tokenizer)
    print(to_markdown(_blocks(results)))
    results["versions"] = library_versions()
    if json_path is not None:
        with explained(f"{json_path} cannot be written"):
            write_atomically(json_path, to_json(results))
    if picture_path is not None:
        title = f"{Path(model_id).name}: {text!r}"
        figure = plot_attribution(split, stream, scores, tokens, lambda token: _name(token, tokenizer), title)
        with explained(f"{picture_path} cannot be written"):
            save_picture(figure, picture_path)
    return results


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`(1, T)`"""
    with explained(f"the text {ascii(text)} cannot be read"):
        input_ids = tokenizer(text, return_tensors="pt")["input_ids"].long()
    if not input_ids.numel():
        raise UserError(f"a text must have a token, got {text!r}")
    return input_ids


def _one_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    with explained(f"the text {ascii(text)} cannot be read"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(_name(token, tokenizer) for token in ids) or "none"
        raise UserError(f"a token must be one of the tokenizer's, got {text!r}, which is {len(ids)}: {pieces}")
    return ids[0]


def _name(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    return repr(tokenizer.decode([token]))


@torch.no_grad()
def _likeliest(model, input_ids: Tensor) -> int:
    return model(input_ids, use_cache=False).logits[0, -1].argmax().item()


def _patch(
    model: PreTrainedModel, input_ids: Tensor, other_ids: Tensor, right: int, wrong: int, answer: str, real: bool
) -> tuple[PatchingScores, PatchingScores | None]:
    """The scores of one logit less another by one backward pass, and, where they are wanted, those for real."""
    if right == wrong:
        raise UserError(
            f"{answer} is the likeliest token after both texts: name the tokens whose logits are compared, --target "
            "and --against"
        )

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, right] - logits[:, -1, wrong]

    scores = attribution_patching(model, input_ids, other_ids, metric)
    return scores, activation_patching(model, input_ids, other_ids, metric) if real else None


def _split_results(split: LogitAttribution, against: int | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Of the last position."""
    found: dict[str, Any] = {
        "target": _name(int(split.targets[0, -1]), tokenizer),
        "against": None if against is None else _name(against, tokenizer),
        "logit": split.logits[0, -1].item(),
        "parts": {name: part[0, -1].item() for name, part in split.parts.items()},
    }
    if split.neurons is not None:
        found["neurons"] = split.neurons[:, :, 0, -1].tolist()
    if split.effects:
        found |= {"effects": {name: effect[0, -1].item() for name, effect in split.effects.items()}}
        found |= {"error": split.error}
    return found


def _lens_results(stream: LogitLens, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    rows = zip(*(values[:, 0, -1].tolist() for values in vars(stream).values()), strict=True)
    return [
        {"token": _name(token, tokenizer), "probability": probability, "divergence": divergence}
        for token, probability, divergence in rows
    ]


def _score_results(scores: PatchingScores, exchanged: PatchingScores | None, tokens: list[str]) -> dict[str, Any]:
    def by_part(given: PatchingScores) -> dict[tuple[str, int], float]:
        named: dict[tuple[str, int], float] = {}
        for layer, (heads, mlp) in enumerate(zip(given.heads[:, :, 0], given.mlps[:, 0], strict=True)):
            named |= {(f"layer {layer} head {head}", p): heads[head, p].item() for head, p in _pairs(heads)}
            named |= {(f"layer {layer} MLP", p): value.item() for p, value in enumerate(mlp)}
        return named

    reals = {} if exchanged is None else by_part(exchanged)
    rows = [
        {"part": part, "position": position, "token": tokens[position], "score": score}
        | ({"real": reals[part, position]} if reals else {})
        for (part, position), score in by_part(scores).items()
    ]
    found: dict[str, Any] = {"clean": scores.clean.item(), "after_corrupted": scores.corrupted.item(), "scores": rows}
    return found if exchanged is None else {**found, "error": scores.error(exchanged)}


def _pairs(values: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for row in range(values.shape[0]) for column in range(values.shape[1])]


def _blocks(results: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    less = f" less that of {results['against']}" if results["against"] else ""
    logit = f"the logit of {results['target']}{less} after {results['text']!r}"
    if "parts" in results:
        blocks += [f"{logit} is {results['logit']:.4f}:", _parts_table(results)]
        if "effects" in results:
            blocks.append(
                f"The final norm is held at its scale: over all parts and tokens, what they add is wrong by "
                f"{100 * results['error']:.0f} % of what taking them out does."
            )
        if "neurons" in results:
            blocks.append(_neurons_table(results["neurons"]))
    else:
        text = (
            f"{logit} is {results['clean']:.4f}, and {results['after_corrupted']:.4f} after {results['corrupted']!r};"
        )
        blocks += [f"{text} by how much it changes with one output of the other text:", _scores_table(results)]
        if "error" in results:
            blocks.append(
                f"Over all of them, the estimate is wrong by {100 * results['error']:.0f} % of the real change."
            )
    if "lens" in results:
        names = ["the embeddings", *(f"layer {index}" for index in range(len(results["lens"]) - 1))]
        rows = [
            [name, row["token"], f"{row['probability']:.3f}", f"{row['divergence']:.3f}"]
            for name, row in zip(names, results["lens"], strict=True)
        ]
        blocks.append(Table(["after", "likeliest", "probability", "nats from the end"], rows))
    return blocks


def _largest(values: dict[Any, float]) -> list[Any]:
    return sorted(values, key=lambda key: -abs(values[key]))[:_SHOWN]


def _parts_table(results: dict[str, Any]) -> Table:
    parts, effects = results["parts"], results.get("effects", {})
    shown = _largest(parts)
    rest = sum(value for name, value in parts.items() if name not in shown)
    rows = [[name, f"{parts[name]:+.4f}"] for name in shown]
    rows += [
        [f"{len(parts) - len(shown)} others", f"{rest:+.4f}"],
        [f"all {len(parts)}", f"{sum(parts.values()):+.4f}"],
    ]
    if not effects:
        return Table(["part", "adds"], rows)
    taken = [f"{-effects[name]:+.4f}" if name in effects else "" for name in shown] + ["", ""]
    return Table(["part", "adds", "its removal"], [[*row, cell] for row, cell in zip(rows, taken, strict=True)])


def _neurons_table(neurons: list[list[float]]) -> Table:
    values = {(layer, neuron): value for layer, row in enumerate(neurons) for neuron, value in enumerate(row)}
    return Table(["neuron", "adds"], [[f"layer {a} neuron {b}", f"{values[a, b]:+.4f}"] for a, b in _largest(values)])


def _scores_table(results: dict[str, Any]) -> Table:
    rows, reals = results["scores"], "error" in results
    largest = _largest({index: row["score"] for index, row in enumerate(rows)})
    cells = [
        [row["part"], f"{row['position']}, {row['token']}", f"{row['score']:+.4f}"]
        + ([f"{row['real']:+.4f}"] if reals else [])
        for row in map(rows.__getitem__, largest)
    ]
    return Table(["part", "at", "estimate", *(["real"] if reals else [])], cells)
