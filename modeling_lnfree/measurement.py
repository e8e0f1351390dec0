"""
What a causal language model of transformers makes of texts, in one pass: perplexity and bits per byte, the entropy,
the largest logit and the sink of every attention head, and the residual stream behind every layer.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .int8 import simulate_int8
from .likelihood import Likelihood, Reading, Window, is_causal, negative_log_likelihoods
from .metrics.attention_entropy.reading import check_max_length, check_reachable, evaluating, load_model, side
from .metrics.attention_entropy.record import AttentionEntropyRecord
from .metrics.attention_entropy.recorder import LayerEntropy, record_attention_entropy
from .metrics.attention_entropy.summary import summarize
from .residual_stream import ResidualStreamRecord, find_outlier_gains, record_residual_stream


@dataclass
class Measurement(Likelihood):
    """
    What `measure` found; beside the attributes of a `Likelihood`:

    Attributes:
        attention: `entropy` and `max_entropy` in nats, `max_logit`, `sink_share`, `spectral_gap`, each `(layers,
            heads)`, and more; see `AttentionEntropyRecord`.
        stream: `norm`, `infinity_norm`, `pearson_kurtosis`, `neuron_kurtosis` and `cosine`, each `(layers,)`, and
            `outlier_dimensions`; see `ResidualStreamRecord`. None for a model without a list of its layers.
        outlier_gains: by norm, the dimensions of outlier gains; see `find_outlier_gains`.
        int8: by the way in which activations are rounded, the likelihoods in simulated int8, if they were asked for.
        notes: what was not measured of the stream, and why.
    """

    attention: AttentionEntropyRecord = field(default_factory=AttentionEntropyRecord)
    stream: ResidualStreamRecord | None = None
    outlier_gains: dict[str, list[int]] = field(default_factory=dict)
    int8: dict[str, Likelihood] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = zip(QUANTITIES, self.summary.values(), strict=True)
        return "\n".join(f"{quantity.label}: {value:,.{quantity.digits}f}" for quantity, value in rows)

    @property
    def summary(self) -> dict[str, float]:
        """A number a quantity of `QUANTITIES`, by its name; NaN for what was not measured."""
        return {quantity.name: float(quantity.value(self)) for quantity in QUANTITIES}

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and lists, for JSON; rows have as many entries as the layer has heads."""
        heads = self.attention.num_heads
        scores = {
            name: [row[:number].tolist() for row, number in zip(getattr(self.attention, name), heads, strict=True)]
            for name in ("max_logit", "sink_share", "spectral_gap")
        }
        stream: dict[str, Any] = {}
        if self.stream is not None:
            names = ("norm", "infinity_norm", "pearson_kurtosis", "neuron_kurtosis", "cosine")
            stream = {name: getattr(self.stream, name).tolist() for name in names}
            stream["outlier_dimensions"] = self.stream.outlier_dimensions
        return {
            **super().to_dict(),
            "attention_entropy": summarize(self.attention),
            **scores,
            "residual_stream": stream,
            "outlier_gains": self.outlier_gains,
            **({"int8": {name: found.to_dict() for name, found in self.int8.items()}} if self.int8 else {}),
            "summary": self.summary,
            "unmeasured": [*self.attention.unmeasured, *self.notes],
        }


def _heads(measurement: Measurement, name: str) -> Tensor:
    record = measurement.attention
    return torch.cat([row[:number] for row, number in zip(getattr(record, name), record.num_heads, strict=True)])


def _largest(name: str) -> Callable[[Measurement], Any]:
    return lambda found: math.nan if found.stream is None else getattr(found.stream, name).max()


def _outlier_dimensions(measurement: Measurement) -> float:
    # nothing is far from the mean of what is broken
    if measurement.stream is None or not measurement.stream.infinity_norm.isfinite().all():
        return math.nan
    return len(set().union(*measurement.stream.outlier_dimensions))


def _outlier_gains(measurement: Measurement) -> float:
    counts: dict[int, int] = defaultdict(int)
    for dimensions in measurement.outlier_gains.values():
        for dimension in dimensions:
            counts[dimension] += 1
    number = len(measurement.outlier_gains)
    return sum(count > number / 2 for count in counts.values()) if number else math.nan


@dataclass(frozen=True)
class Quantity:
    """One number of a `Measurement`: its name, its label in tables, what it is, and how it is shown."""

    name: str
    label: str
    value: Callable[[Measurement], Any]
    digits: int = 3


QUANTITIES = (
    Quantity("perplexity", "perplexity", lambda found: found.perplexity),
    Quantity("bits_per_byte", "bits per byte", lambda found: found.bits_per_byte, 4),
    Quantity("attention_entropy", "attention entropy, mean (nats)", lambda found: _heads(found, "entropy").mean()),
    Quantity("max_logit", "largest attention logit", lambda found: _heads(found, "max_logit").max(), 2),
    Quantity("sink_share", "weight on the first key, mean", lambda found: _heads(found, "sink_share").mean()),
    Quantity("spectral_gap", "spectral gap, mean", lambda found: _heads(found, "spectral_gap").mean()),
    Quantity("stream_norm", "norm of the stream, largest layer", _largest("norm"), 2),
    Quantity("infinity_norm", "infinity norm, largest layer", _largest("infinity_norm"), 2),
    Quantity("pearson_kurtosis", "Pearson kurtosis, largest layer", _largest("pearson_kurtosis"), 1),
    Quantity("neuron_kurtosis", "kurtosis over neurons, largest layer", _largest("neuron_kurtosis"), 1),
    Quantity("cosine", "cosine between tokens, largest layer", _largest("cosine")),
    Quantity("outlier_dimensions", "outlier dimensions (6 sigma)", _outlier_dimensions, 0),
    Quantity("outlier_gains", "outlier gains in most norms (3 sigma)", _outlier_gains, 0),
)


class TextFigures(NamedTuple):
    """What was measured of one text."""

    row: int  # its place among all texts that were given
    num_tokens: int
    nll: Tensor  # of every predicted token, in nats
    entropies: list[Tensor]  # a layer: (heads, queries), in nats; of several windows one after the other


class Meter:
    """
    Adds up what a model makes of texts.

    Args:
        model: in evaluation mode.
        reading: how texts are read.
        found: what is added to; into a `Measurement` attention and the residual stream go too.
        on_text: called with the figures of each text, for a `Measurement`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reading: Reading,
        found: Likelihood,
        on_text: Callable[[TextFigures], None] | None = None,
    ):
        self.model, self.reading, self.found, self.on_text = model, reading, found, on_text
        self._layers: dict[str, Tensor] = {}  # of the last batch: name of the layer -> (batch, heads, T)

    def read(self, texts: Iterable[str]) -> Generator[int]:
        """
        Reads the texts; after each forward pass, how many windows it had. What was read until then is in `found`,
        also where one stops.

        Raises:
            ValueError: for a model or text that cannot be measured.
        """
        with ExitStack() as stack:
            if isinstance(self.found, Measurement):
                self.record = self._look_inside(stack, self.found)
            index = 0
            for chunk in self.reading.chunks(texts):
                yield from self._read_chunk(chunk, index)
                index += len(chunk)

    def _look_inside(self, stack: ExitStack, found: Measurement) -> AttentionEntropyRecord:
        # the towers of other modalities read no text
        decoder = self.model.base_model.get_decoder()
        on_layer = None if self.on_text is None else self._keep
        recording = record_attention_entropy(decoder, reduce=False, logits=True, on_layer=on_layer)
        found.attention = stack.enter_context(recording)
        found.outlier_gains = find_outlier_gains(self.model)
        try:
            found.stream = stack.enter_context(record_residual_stream(self.model))
        except ValueError as error:
            found.notes.append(f"the residual stream, as {error}")
        return found.attention

    def _keep(self, measured: LayerEntropy) -> None:
        self._layers[measured.layer] = measured.entropy

    def _read_chunk(self, texts: list[str], index: int) -> Iterator[int]:
        windows: list[tuple[int, Window, int]] = []  # with the text's number, and the bytes that are new in it
        for number, (token_ids, bytes_until) in enumerate(self.reading.encode(texts)):
            if not token_ids:
                self.found.skipped_texts += 1
                continue
            before = 0
            for window in self.reading.windows(token_ids):
                until = bytes_until(window.end)
                windows.append((number, window, until - before))
                before = until
            self.found.num_texts += 1
            self.found.truncated_texts += window.end < len(token_ids)
        parts: dict[int, list[tuple[Tensor, list[Tensor]]]] = defaultdict(list)
        lengths: dict[int, int] = {}
        for _, group in groupby(windows, key=lambda entry: side(self.model, len(entry[1].input_ids))):
            alike = list(group)
            for start in range(0, len(alike), self.reading.batch_size):
                batch = alike[start : start + self.reading.batch_size]
                with torch.no_grad():
                    likelihoods = negative_log_likelihoods(self.model, [window for _, window, _ in batch])
                for row, ((number, window, num_bytes), nll) in enumerate(zip(batch, likelihoods, strict=True)):
                    self._add(window, nll, num_bytes, lengths.get(number, 0))
                    lengths[number] = window.end
                    if self.on_text is not None:
                        names = self.record.layer_names
                        queries = len(window.input_ids)
                        parts[number].append((nll, [self._layers[name][row, :, :queries] for name in names]))
                yield len(batch)
        for number, of_text in parts.items():
            nll = torch.cat([nll for nll, _ in of_text])
            layers = [torch.cat(layer, -1) for layer in zip(*(entropies for _, entropies in of_text), strict=True)]
            self.on_text(TextFigures(index + number, lengths[number], nll, layers))  # type: ignore[misc]  # it is there

    def _add(self, window: Window, nll: Tensor, num_bytes: int, before: int) -> None:
        found, total = self.found, nll.sum().item()
        found.num_tokens += window.end - before
        found.predicted_tokens += len(window.targets)
        found.num_bytes += num_bytes
        found.total += total
        found.weighted += window.weight * total
        found.weight += window.weight * len(window.targets)


def measure(
    model: PreTrainedModel | str,
    texts: Iterable[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    stride: int | None = None,
    rolling: bool = False,
    concatenate: bool = False,
    int8: bool = False,
    int8_clip: float | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Measurement:
    """
    Measures a causal language model on texts, in one pass over them.

    ```python
    found = measure("openai-community/gpt2", ["a text", "another"])
    found.perplexity, found.bits_per_byte
    found.attention.entropy  # (layers, heads), in nats
    found.stream.infinity_norm  # (layers,)
    ```

    Each text is read by itself and predicted but for its first token; padding counts nowhere, and `batch_size` changes
    nothing. Attention and the stream are of everything that the model reads: of overlapping windows, all of each.

    Args:
        model: a model of transformers at hand, measured where it is, in evaluation mode; or the Hub id or folder of
            one.
        texts: as many as are wanted.
        tokenizer: of a model at hand; by default that of `model`.
        max_length: tokens of a window; by default as many as model and tokenizer take. What is longer is cut.
        batch_size: windows in a forward pass.
        stride: read on in windows of `max_length`, each so many tokens behind the last: the strided perplexity of the
            documentation of transformers.
        rolling: read on in windows of `max_length` new tokens, and predict the first token too, from the one that
            begins or ends a text: the rolling log-likelihood of lm-eval.
        concatenate: make one text of all, with an empty line between them.
        int8: read everything again in simulated int8, see `simulate_int8`, with activations by tensor and by token.
        int8_clip: a third time, with activations by tensor, clipped at this quantile of the tokens' largest entries.
        device, dtype, trust_remote_code, revision: of a model that is loaded.

    Raises:
        OSError, ValueError: for a model that cannot be loaded or measured, or is not causal; for a text that it cannot
            read; and for texts in which no token is predicted.
    """
    if isinstance(model, str):
        check_reachable(model)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **options)
        model = load_model(model, device=device, dtype=dtype, **options)
    elif tokenizer is None:
        raise ValueError("a model at hand needs tokenizer= beside it")
    reading = Reading(
        tokenizer,  # type: ignore[arg-type]  # it is there now
        check_max_length(model, tokenizer, max_length),  # type: ignore[arg-type]
        batch_size=batch_size,
        stride=stride,
        rolling=rolling,
        concatenate=concatenate,
    )
    texts = list(texts) if int8 or int8_clip is not None else texts
    with evaluating(model):
        if not is_causal(model, reading.max_length):
            raise ValueError(
                f"{type(model).__name__} is no causal language model: its perplexity means something else"
            )
        found = Measurement()
        for _ in Meter(model, reading, found).read(texts):
            pass
        check_measured(found)
        for name, options in int8_ways(int8, int8_clip).items():
            with simulate_int8(model, **options):
                found.int8[name] = Likelihood()
                for _ in Meter(model, reading, found.int8[name]).read(texts):
                    pass
    return found


def int8_ways(int8: bool, clip: float | None) -> dict[str, dict[str, Any]]:
    """The arguments of `simulate_int8` of what `measure` was asked for, by their names."""
    ways: dict[str, dict[str, Any]] = {}
    if int8:
        ways |= {"by tensor": {"activations": "tensor"}, "by token": {"activations": "token"}}
    if clip is not None:
        ways[f"by tensor, clipped at {clip:g}"] = {"activations": "tensor", "clip": clip}
    return ways


def check_measured(found: Measurement) -> None:
    """Raises ValueError if no token was predicted, or no attention seen."""
    if found.predicted_tokens == 0:
        raise ValueError("no text of two tokens was read, so none was predicted")
    if found.attention.num_queries == 0:
        raise ValueError("; ".join(found.attention.unmeasured))
