"""How texts are read by a causal language model, in windows, and how well it predicts them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .metrics.attention_entropy.reading import pad


class Window(NamedTuple):
    """What a model reads of a text at a time, and what of it counts."""

    input_ids: list[int]
    targets: list[int]  # tokens that are predicted, each at its position
    first: int = 0  # the position that predicts the first of them
    weight: float = 1.0  # of each of them in the perplexity
    end: int = 0  # number of the text's tokens up to the last target


def whole(token_ids: list[int], max_length: int) -> Iterator[Window]:
    """The first `max_length` tokens; each but the first is predicted."""
    kept = token_ids[:max_length]
    yield Window(kept, kept[1:], end=len(kept))


def strided(token_ids: list[int], max_length: int, stride: int) -> Iterator[Window]:
    """
    Windows of `max_length`, each `stride` tokens behind the last, in which what the last has not read is predicted.
    Weights are those of the recipe in the documentation of transformers ("Perplexity of fixed-length models"): each
    window counts as one token fewer than are new in it, though all of them are predicted where there is context.
    """
    previous = 0
    for begin in range(0, len(token_ids), stride):
        end = min(begin + max_length, len(token_ids))
        first = max(previous, begin + 1)
        targets = token_ids[first:end]
        weight = (end - previous - 1) / len(targets) if targets else 0.0
        yield Window(token_ids[begin:end], targets, first - begin - 1, weight, end)
        previous = end
        if end == len(token_ids):
            break


def rolling(token_ids: list[int], max_length: int, prefix: int) -> Iterator[Window]:
    """
    Windows in which `max_length` tokens at a time are predicted, the first from the token `prefix`, each later window
    from the token before it; the last is filled up with context. As lm-eval's rolling log-likelihood.
    """
    tokens = [prefix, *token_ids]
    for predicted in range(0, len(token_ids), max_length):
        end = min(predicted + max_length, len(token_ids))
        begin = max(0, end - max_length)
        yield Window(tokens[begin:end], tokens[predicted + 1 : end + 1], predicted - begin, end=end)


def negative_log_likelihoods(model: PreTrainedModel, windows: list[Window]) -> list[Tensor]:
    """
    Of every target of each window, in nats, in float64, off by less than 1e-6 for logits in float32.

    Raises:
        ValueError: for what the model cannot read.
    """
    if not windows:
        return []
    sequences = [window.input_ids for window in windows]
    known = getattr(model.get_input_embeddings(), "num_embeddings", math.inf)
    # on an accelerator, such a token ends the process
    if (largest := max(max([*window.input_ids, *window.targets]) for window in windows)) >= known:
        raise ValueError(f"the tokenizer gives token {largest}, and the model knows {known}: one is not the other's")
    inputs = pad(sequences, model.device)
    try:
        logits = model(**inputs, use_cache=False).logits  # (batch, T, vocab)
    # by a batch too large for the memory, or a text too long for the positions
    except (RuntimeError, LookupError, ValueError, MemoryError) as error:
        size = f"{len(sequences)} texts of {max(map(len, sequences))} tokens at a time"
        raise ValueError(f"{size} cannot be measured: {error or type(error).__name__}") from error
    return [
        _cross_entropy(row[window.first : window.first + len(window.targets)], window.targets)
        for row, window in zip(logits, windows, strict=True)
    ]


def _cross_entropy(logits: Tensor, targets: list[int]) -> Tensor:
    # A log-softmax in float32 is off by the rounding of the largest logit, and over a long text that adds up.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(-1, keepdim=True)
    partition = (logits - largest).exp_().sum(-1)  # 1 at least
    wanted = logits.gather(-1, torch.tensor(targets, dtype=torch.long, device=logits.device)[:, None])
    # not every device has float64
    largest, partition, wanted = (part.cpu().double() for part in (largest[:, 0], partition, wanted[:, 0]))
    return partition.log() + (largest - wanted)


@torch.no_grad()
def is_causal(model: PreTrainedModel, max_length: int) -> bool:
    """Whether another last token changes nothing before it."""
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.arange(min(max_length, 8), device=model.device) % vocabulary  # (T,)
    second = first.clone()
    second[-1] = (second[-1] + vocabulary // 2) % vocabulary
    logits = model(input_ids=torch.stack([first, second]), use_cache=False).logits[:, :-1].float()
    # rows of a batch may be rounded differently
    tolerance = torch.finfo(model.dtype).eps ** 0.5 * logits.abs().max() if logits.numel() else 0
    return not (logits[0] - logits[1]).abs().gt(tolerance).any()


@dataclass(frozen=True)
class Reading:
    """
    How texts are read.

    Args:
        tokenizer: adds the special tokens that it adds by itself.
        max_length: tokens of a window.
        batch_size: windows in a forward pass. It does not change what is measured.
        stride: read texts of any length in overlapping windows, see `strided`; None: what is longer is cut.
        rolling: read texts of any length in disjoint windows, see `rolling`.
        concatenate: make one text of all, with an empty line between them; without `rolling`, `stride` is then
            `max_length` unless it is given.

    Raises:
        ValueError: for a value that is not possible.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    batch_size: int = 8
    stride: int | None = None
    rolling: bool = False
    concatenate: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.stride is not None and self.rolling:
            raise ValueError("stride and rolling are two ways to read a long text: choose one")
        if self.stride is not None and not 1 <= self.stride <= self.max_length:
            raise ValueError(f"stride must be in 1 to {self.max_length}, the length of a window, got {self.stride}")
        if self.rolling and self.prefix is None:
            raise ValueError("rolling needs a tokenizer with a token that begins or ends a text, and it has neither")

    @property
    def prefix(self) -> int | None:
        """The token from which the first one of a text is predicted, where windows roll."""
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    def windows(self, token_ids: list[int]) -> Iterator[Window]:
        """Of a text's tokens."""
        stride = self.max_length if self.stride is None and self.concatenate else self.stride
        if self.rolling:
            return rolling(token_ids, self.max_length, self.prefix)  # type: ignore[arg-type]  # looked at before
        return whole(token_ids, self.max_length) if stride is None else strided(token_ids, self.max_length, stride)

    def chunks(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """The texts, some at a time."""
        given = iter(["\n\n".join(texts)] if self.concatenate else texts)
        while chunk := list(islice(given, self.batch_size)):
            yield chunk

    def encode(self, texts: list[str]) -> list[tuple[list[int], Callable[[int], int]]]:
        """Of every text, its tokens, and the bytes up to the end of so many of them."""
        with_offsets = bool(getattr(self.tokenizer, "is_fast", False))
        # not verbose: what is longer than the model's positions is cut afterwards
        options = {"return_attention_mask": False, "return_offsets_mapping": with_offsets, "verbose": False}
        encoded = self.tokenizer(texts, **options)
        offsets = encoded["offset_mapping"] if with_offsets else [None] * len(texts)
        return [
            (ids, self._bytes_until(text, ids, spans))
            for text, ids, spans in zip(texts, encoded["input_ids"], offsets, strict=True)
        ]

    def _bytes_until(
        self, text: str, token_ids: list[int], spans: list[tuple[int, int]] | None
    ) -> Callable[[int], int]:
        # special tokens end at character 0
        ends = [] if spans is None else list(accumulate((end for _, end in spans), max))

        def bytes_until(number: int) -> int:
            if number >= len(token_ids):
                return _size(text)
            if spans is None:
                return _size(self.tokenizer.decode(token_ids[:number]))
            begin, end = spans[number]
            before, after = _alike(spans, number)
            if begin == end or not before:
                return _size(text[: ends[number - 1]])
            # in the middle of what several tokens make together, as an emoji
            return _size(text[:begin]) + _size(text[begin:end]) * before // (before + after)

        return bytes_until


def _size(text: str) -> int:
    """In bytes."""
    return len(text.encode("utf-8", errors="surrogatepass"))


def _alike(spans: list[tuple[int, int]], number: int) -> tuple[int, int]:
    """How many tokens right before this one, and from it on, have the characters that it has."""
    before = next((i for i in range(number) if spans[number - 1 - i] != spans[number]), number)
    return before, next(
        (i for i in range(len(spans) - number) if spans[number + i] != spans[number]), len(spans) - number
    )


def to_perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats per token; infinite where that overflows."""
    return torch.tensor(nll, dtype=torch.float64).exp().item()


@dataclass
class Likelihood:
    """
    How well texts are predicted.

    Attributes:
        nll: mean negative log-likelihood of a predicted token, in nats.
        perplexity: exp of it; infinite where that overflows.
        bits_per_byte: of all predicted tokens together, by the bytes of the texts in UTF-8, which do not depend on the
            tokenizer. Of a text that was cut, the bytes that were read count.
        num_texts, skipped_texts, truncated_texts: texts that were read, that had no token, and that were cut.
        num_tokens, predicted_tokens, num_bytes: what was read.
    """

    num_texts: int = 0
    skipped_texts: int = 0
    truncated_texts: int = 0
    num_tokens: int = 0
    predicted_tokens: int = 0
    num_bytes: int = 0
    total: float = field(default=0.0, repr=False)  # nats of all predicted tokens
    weighted: float = field(default=0.0, repr=False)
    weight: float = field(default=0.0, repr=False)

    @property
    def nll(self) -> float:
        return self.weighted / self.weight if self.weight else math.nan

    @property
    def perplexity(self) -> float:
        return to_perplexity(self.nll)

    @property
    def bits_per_byte(self) -> float:
        return self.total / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        names = ("num_texts", "skipped_texts", "truncated_texts", "num_tokens", "predicted_tokens", "num_bytes")
        return {name: getattr(self, name) for name in ("perplexity", "nll", "bits_per_byte", *names)}
