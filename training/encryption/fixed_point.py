"""
What range a model needs in fixed point, the arithmetic of private inference: its largest values, and the fewest bits
at which its perplexity stays within 1 %.

Fixed point is simulated in float32: after every operation of torch on private data, and once in every weight, values
are rounded to a multiple of 2^-fraction_bits and saturated to [-2^integer_bits, 2^integer_bits). What happens inside
one operation (a matrix product, a softmax, a LayerNorm, a fused GELU) is not rounded, and no approximation that a
protocol would put in its place is simulated; so the bits are the fewest that the model itself needs. And a ring does
not saturate but wraps: there, the integer bits must hold the largest value.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from modeling_lnfree.likelihood import to_perplexity
from modeling_lnfree.residual_stream import find_layers

from .counting import PrivateDispatchMode


TOLERANCE = 0.01
MOST_BITS = 20  # of either part; the float32 that simulates them has 24 in all


def measure_fixed_point(model: PreTrainedModel, evaluate: Callable[[], float]) -> dict[str, Any]:
    """
    Finds the smallest number of fractional bits, with `MOST_BITS` integer bits, at which perplexity is at most 1 %
    above that in floating point; and then, with those, the smallest number of integer bits. Both by bisection, so that
    one bit fewer was tried and is too few.

    Args:
        model: causal language model in float32, with an attention interface.
        evaluate: runs the model on the evaluation data and returns nats per token.

    Returns:
        `largest_residual`, `largest_score` (attention scores of visible keys, scaled) and `largest_value` (of any
        operation), absolute; `integer_bits_to_hold` that value; `perplexity` in floating point; `integer_bits` and
        `fraction_bits` (None where `MOST_BITS` do not suffice) beside a sign, and `fixed_point_perplexity` with them;
        `tried`, all that was; and `tolerance`.

    Raises:
        ValueError: for a model that is not in float32, whose layers are not found, or whose values or perplexity are
            not finite.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"fixed point is simulated in float32, the model is in {str(model.dtype)[6:]}")
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # whose scores pass by the dispatch
    try:
        recorder = _RangeRecorder(model)
        with recorder.hooked(model):
            reference = to_perplexity(evaluate())
        largest = recorder.largest["value"]
        if not (math.isfinite(largest) and math.isfinite(reference)):
            raise ValueError(f"fixed point holds finite values only, got {largest} and a perplexity of {reference}")
        tried = []

        @functools.cache
        def is_enough(integer_bits: int, fraction_bits: int) -> bool:
            with _fixed_point(model, integer_bits, fraction_bits):
                found = to_perplexity(evaluate())
            tried.append({"integer_bits": integer_bits, "fraction_bits": fraction_bits, "perplexity": found})
            return found <= (1 + TOLERANCE) * reference

        fraction = _smallest(lambda bits: is_enough(MOST_BITS, bits))
        integer = None if fraction is None else _smallest(lambda bits: is_enough(bits, fraction))
    finally:
        model.set_attn_implementation(implementation)
    chosen = {"integer_bits": integer, "fraction_bits": fraction}
    return {
        **{f"largest_{name}": value for name, value in recorder.largest.items()},
        "integer_bits_to_hold": max(0, math.frexp(largest)[1]),
        "perplexity": reference,
        **chosen,
        "fixed_point_perplexity": next((row["perplexity"] for row in tried if row.items() >= chosen.items()), None),
        "tolerance": TOLERANCE,
        "tried": tried,
    }


def _smallest(is_enough: Callable[[int], bool]) -> int | None:
    """The smallest of 0 to `MOST_BITS` that is enough, where one that is enough makes all larger ones so."""
    if not is_enough(MOST_BITS):
        return None
    low, high = -1, MOST_BITS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


class _HookedMode(PrivateDispatchMode):
    @contextmanager
    def hooked(self, model: PreTrainedModel) -> Iterator[None]:
        """Within, the mode is on while the model computes, and not while its outputs are used."""

        def enter(module, args, kwargs):
            self.mask = kwargs.get("attention_mask")
            self.__enter__()

        def leave(module, args, output):
            self.__exit__(None, None, None)

        handles = [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _RangeRecorder(_HookedMode):
    """Largest absolute values at the positions that hold a token."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.largest = {"residual": 0.0, "score": 0.0, "value": 0.0}
        self.blocks = find_layers(model)

    @contextmanager
    def hooked(self, model: PreTrainedModel) -> Iterator[None]:
        handles = [block.register_forward_pre_hook(lambda _, args: self._residual(args[0])) for block in self.blocks]
        # some blocks return a tuple
        last = self.blocks[-1].register_forward_hook(
            lambda _, args, output: self._residual(output if isinstance(output, Tensor) else output[0])
        )
        try:
            with super().hooked(model):
                yield
        finally:
            for handle in (*handles, last):
                handle.remove()

    def _residual(self, states: Tensor):
        """`(batch, T, D)`"""
        self._record("residual", states if self.mask is None else states[self.mask.bool()])

    def on_private(self, func, args: tuple, outputs, secret: list[Tensor]):
        if func.overloadpacket.__name__ == "_softmax":
            scores = args[0]  # (batch, heads, T, S)
            shown = scores > torch.finfo(scores.dtype).min / 2
            if self.mask is not None:
                shown &= self.mask.bool()[:, None, -scores.shape[2] :, None]
            self._record("score", scores[shown])
        else:
            tree_map(lambda leaf: self._record("value", leaf) if _is_float(leaf) else None, outputs)
        return outputs

    def _record(self, name: str, values: Tensor):
        # hidden scores are not values
        values = values[values > torch.finfo(values.dtype).min / 2]
        if values.numel():
            self.largest[name] = max(self.largest[name], values.abs().max().item())


class _FixedPointMode(_HookedMode):
    """Rounds and saturates what every operation returns."""

    def __init__(self, integer_bits: int, fraction_bits: int):
        super().__init__()
        self.bits = (integer_bits, fraction_bits)

    def on_private(self, func, args: tuple, outputs, secret: list[Tensor]):
        # a view shows values that are rounded already
        aliases = [value.alias_info for value in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return outputs
        return tree_map(lambda leaf: _round(leaf, *self.bits) if _is_float(leaf) else leaf, outputs)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _round(values: Tensor, integer_bits: int, fraction_bits: int) -> Tensor:
    """In place. Scores that a mask hides stay hidden: the mask is public."""
    lowest = torch.finfo(values.dtype).min
    hidden = values <= lowest / 2 if values.numel() and values.amin() <= lowest / 2 else None
    step = 2.0**-fraction_bits
    values.div_(step).round_().mul_(step).clamp_(-(2.0**integer_bits), 2.0**integer_bits - step)
    return values if hidden is None else values.masked_fill_(hidden, lowest)


@contextmanager
def _fixed_point(model: PreTrainedModel, integer_bits: int, fraction_bits: int) -> Iterator[None]:
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            _round(parameter, integer_bits, fraction_bits)
    try:
        with _FixedPointMode(integer_bits, fraction_bits).hooked(model):
            yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
