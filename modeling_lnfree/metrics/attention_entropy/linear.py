"""Entropy and its gradient where the scores are linear in the keys, in blocks of queries and heads.

The derivation stands in `entropy.py`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .visibility import HIDDEN_BIAS, Visibility


# elements of the scores that are held at a time: a few blocks
BLOCK_ELEMENTS_OF_ACCELERATORS = 2**24
# and on a CPU, where every step works in place: what fits the nearest cache of a core, and so few queries of a head
# that there is little among their keys that some do not see
_CACHED_ELEMENTS = 2**17
_CACHED_QUERIES = 64
_LOG_2 = math.log(2)


class _Block(NamedTuple):
    """Some queries of all heads, and the keys from the first to the last that any of them sees."""

    queries: slice
    query: Tensor  # (heads of keys, groups x queries, head_dim)
    keys: slice
    key: Tensor  # (heads of keys, keys, head_dim)
    bias: (
        Tensor | None
    )  # 0, or minus infinity where hidden, of the last of these, (heads of keys, groups, queries, last)
    parts: list[slice]  # some heads of keys, whose scores are few enough

    def scores(self, part: slice, scaling: float, less: Tensor | None = None) -> Tensor:
        """Scores of a part, less a number for each query, `(heads of keys, groups x queries, keys)`."""
        query, key = self.query[part], self.key[part]
        start, beta = (query[:1, :1, :1], 0) if less is None else (less[part], -1)
        scores = torch.baddbmm(start, query, key.mT, beta=beta, alpha=scaling)
        if self.bias is not None:
            # added in a sixth of the time of a masked fill
            bias = self.bias[part]
            scores.view(*bias.shape[:3], -1)[..., -bias.shape[-1] :].add_(bias)
        return scores

    def rows(self, states: Tensor) -> Tensor:
        """Of `(heads of keys, groups, T)` what is of the queries, `(heads of keys, groups x queries, 1)`."""
        return states[:, :, self.queries].reshape(len(states), -1, 1)


def _blocks(query: Tensor, key: Tensor, mean: Tensor, visibility: Visibility) -> Iterator[_Block]:
    """All queries, of every sequence and head of keys; in the dtype of `mean`, which is subtracted from the keys."""
    (batch, kv_heads, num_keys, _), (_, heads, num_queries, _) = key.shape, query.shape
    heads_of_keys, groups = batch * kv_heads, heads // kv_heads
    query = query.reshape(heads_of_keys, groups, num_queries, -1)
    key = (key - mean).flatten(0, 1)
    elements = BLOCK_ELEMENTS_OF_ACCELERATORS
    step = elements // (batch * heads * num_keys)
    if key.is_cpu:
        elements = _CACHED_ELEMENTS * torch.get_num_threads()
        step = min(_CACHED_QUERIES // groups, elements // (groups * num_keys))
    step = min(max(1, step), num_queries)
    # all blocks of a causal head hide the same
    triangle = mean.new_full((step, step), -torch.inf).triu_(1) if visibility.is_causal else None
    for start in range(0, num_queries, step):
        queries = slice(start, min(start + step, num_queries))
        keys, hidden = visibility.part(queries.start, queries.stop)
        bias = None
        if triangle is not None:
            bias = triangle[: queries.stop - start, : queries.stop - start].expand(heads_of_keys, groups, -1, -1)
        elif hidden is not None:
            bias = mean.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            bias = bias.expand(batch, heads, -1, -1).reshape(heads_of_keys, groups, *hidden.shape[2:])
        rows = query[:, :, queries].flatten(1, 2).to(mean.dtype)
        some = max(1, elements // (rows.shape[1] * (keys.stop - keys.start)))
        parts = [slice(head, head + some) for head in range(0, heads_of_keys, some)]
        yield _Block(queries, rows, keys, key[:, keys], bias, parts)


class LinearEntropy(torch.autograd.Function):
    """Entropy of scores that are linear in finite keys, in nats, and their log-sum-exp to the base 2, `(batch, heads,
    T)` in the dtype of `mean`, `(batch, kv_heads, 1, head_dim)`, which is subtracted from the keys. Nothing waits for
    the backward pass but the inputs and these two, and what is computed `ahead`: up to a factor, the gradient of the
    queries, `(batch x kv_heads, groups, T, head_dim)`, and what each head gives to that of its keys, `(batch x
    kv_heads, groups, head_dim, S)`."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, mean: Tensor, scaling: float, visibility: Visibility, ahead: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        heads_of_keys, groups = len(query) * key.shape[1], query.shape[1] // key.shape[1]
        sums = mean.new_empty(3, *query.shape[:3])
        to_query = to_key = None
        if ahead:
            to_query = mean.new_empty(heads_of_keys, groups, *query.shape[2:])
            to_key = mean.new_zeros(heads_of_keys, groups, *key.mT.shape[2:])
        for block in _blocks(query, key, mean, visibility):
            found = mean.new_empty(3, *block.query.shape[:2])
            for part in block.parts:
                scores = block.scores(part, scaling / _LOG_2)
                largest, total, product = found[:, part]
                torch.amax(scores, -1, out=largest)
                # far from the largest, weights are 0 and so are their products with what is not infinite
                weights = scores.sub_(largest[..., None]).clamp_(min=HIDDEN_BIAS).exp2()
                torch.sum(weights, -1, out=total)
                torch.linalg.vecdot(weights, scores, out=product)
                if to_query is not None and to_key is not None:
                    slope = weights.mul_(scores.sub_((product / total)[..., None]))
                    rows, inverse = block.query[part], total.reciprocal()[..., None]
                    to_queries, to_keys = to_query[part, :, block.queries], to_key[part, ..., block.keys]
                    to_queries.copy_(torch.bmm(slope, block.key[part]).mul_(inverse).view(to_queries.shape))
                    rows, slope = (x.view(*to_queries.shape[:3], -1) for x in (rows * inverse, slope))
                    to_keys += torch.matmul(rows.mT, slope)
            rows = sums.view(3, heads_of_keys, groups, -1)[..., block.queries]
            rows.copy_(found.view(rows.shape))
        largest, total, product = sums
        bits = total.log2()
        return _LOG_2 * (bits - product / total), largest + bits, to_query, to_key

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor | None, Tensor | None]) -> None:
        query, key, mean, ctx.scaling, ctx.visibility, _ = inputs
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        ctx.save_for_backward(query, key, mean, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor | None, ...]:
        query, key, mean, entropy, logsumexp, to_query, to_key = ctx.saved_tensors
        by_head = (len(query) * key.shape[1], -1, query.shape[2])
        factor, bits, logsumexp = (
            states.reshape(by_head) for states in (-_LOG_2 * ctx.scaling * gradient, entropy / _LOG_2, logsumexp)
        )
        if to_query is not None and factor.equal(factor[..., :1].expand_as(factor)):
            to_query = factor[..., None] * to_query
            to_key = (factor[..., :1, None] * to_key).sum(1)
        else:
            to_query, to_key = _gradients(query, key, mean, factor, bits, logsumexp, ctx.scaling, ctx.visibility)
        to_query, to_key = to_query.view(query.shape), to_key.mT.reshape(key.shape)
        return to_query.to(query.dtype), to_key.to(key.dtype), None, None, None, None


def _gradients(
    query: Tensor,
    key: Tensor,
    mean: Tensor,
    factor: Tensor,
    bits: Tensor,
    logsumexp: Tensor,
    scaling: float,
    visibility: Visibility,
) -> tuple[Tensor, Tensor]:
    """Gradients `(heads of keys, groups, T, head_dim)` and `(heads of keys, head_dim, S)`, from factor, entropy and
    log-sum-exp to the base 2 of each query, `(heads of keys, groups, T)`, and from its scores, computed again."""
    to_query = mean.new_empty(*factor.shape, query.shape[-1])
    to_key = mean.new_zeros(len(factor), *key.mT.shape[2:])
    with torch.autocast(query.device.type, enabled=False):
        for block in _blocks(query, key, mean, visibility):
            factors, entropies, less = (block.rows(states) for states in (factor, bits, logsumexp))
            rows, to_rows = factors * block.query, torch.zeros_like(block.query)
            for part in block.parts:
                # as of heads inside a margin
                if not factors[part].any():
                    continue
                scores = block.scores(part, scaling / _LOG_2, less).clamp_(min=HIDDEN_BIAS)
                slope = scores.exp2().mul_(scores.add_(entropies[part]))
                torch.bmm(slope, block.key[part], out=to_rows[part])
                to_key[part, :, block.keys].add_(torch.bmm(rows[part].mT, slope))
            to_queries = to_query[:, :, block.queries]
            torch.mul(factors.view(*to_queries.shape[:3], 1), to_rows.view(to_queries.shape), out=to_queries)
    return to_query, to_key
