"""Exact attention entropy without attention maps.

A query with the scores `s_j = scaling * q.k_j` of the keys that it sees attends with `p = softmax(s)`. With the
largest score m, l = sum_j exp(s_j - m) and e = sum_j exp(s_j - m) (s_j - m), the entropy of `p` in nats is

    H = -sum_j p_j log p_j = log l - e / l,

where neither term is negative, neither is above log n by more than rounding, and nothing cancels at any score.

Scores are computed for a block of queries and heads at a time, which fits a cache of the CPU, from the first to the
last key that any of them sees, and by powers of 2, which are the cheaper ones. No (T, T) map is ever formed.

Precision: the rounding of a score is what is left. H does not change when one vector is added to every key, so the
mean of the keys is subtracted from every key first. What is left of the scores is at most `|scaling| |q| |k|`; where
that is not small, all is computed in float64 on the CPU. Accelerators compute in float32. On a GPU with Triton, where
no gradient is wanted, one kernel does all of it in one pass over the keys, and adds up what a record keeps
(`kernel.py`).

Gradient: dH/ds_j = -p_j (log p_j + H), from log-sum-exp and entropy of the query and from the scores, which the
backward pass computes again. A loss over the mean of a head has one gradient for all of its queries: over many keys it
is computed with the entropies, up to that factor. Scores that are not linear in the keys (additive biases, soft caps)
and sinks leave it to autograd, in blocks that are computed again.

Clipped softmax (arXiv 2306.12929), w_j = max((1 + a / n) p_j - a / n, 0) of n keys, gives no distribution. Its entropy
is that of w_j / sum_i w_i, from the scores of a block of queries too. A query that has no weight left has none.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .linear import BLOCK_ELEMENTS_OF_ACCELERATORS, LinearEntropy
from .visibility import HIDDEN_BIAS, Visibility, split_mask


# elements of the scores that are held at a time: what fits a cache of the CPU
_BLOCK_ELEMENTS = 2**20
# bound of the scores up to which they are rounded by less than 2e-5 in float32
_LARGE_SCORE = 2**8
# of the scores, up to which gradients are kept that are computed with the entropies
_LARGEST_SHARE = 0.1


def compute_attention_entropy(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Entropy of the attention distribution of every query, differentiable with respect to `query` and `key`.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, T, head_dim)`): any floating dtype.
        key (`torch.Tensor` of shape `(batch, kv_heads, S, head_dim)`): `kv_heads` divides `heads` (grouped heads).
        scaling (`float`): factor of the dot products, of either sign.
        attention_mask (`torch.Tensor` of shape `(batch | 1, heads | 1, T | 1, S)`, *optional*): bool, True where the
            query sees the key; or floating, added to the scores, where -10,000 and all below hide the key.
        is_causal (`bool`, defaults to `False`): the queries are the last T of the S positions, and see no later key.
        softcap (`float`, *optional*): the scores become `softcap * tanh(scores / softcap)` before the mask is added.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): score of one more key, which every query sees; minus
            infinity is no key.

    Returns:
        `torch.Tensor` of shape `(batch, heads, T)`: entropy in nats, from 0 to the logarithm of the number of keys
        that the query sees; float64 for float64 inputs, else float32. NaN for a query that sees no key
        but a sink, for one that is not finite or sees a key that is not, and where the scores leave the range of
        float64 (on an accelerator: of float32). A key concerns only the queries that see it, whatever its size.

    Raises:
        ValueError: for shapes or a dtype of `attention_mask` other than these.
    """
    if query.ndim != 4 or key.ndim != 4 or query.shape[::3] != key.shape[::3]:
        raise ValueError(
            "query must be (batch, heads, T, head_dim) and key (batch, kv_heads, S, head_dim), got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, heads, num_queries, _ = query.shape
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"heads must be a multiple of kv_heads, got {heads} and {key.shape[1]}")
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
            raise ValueError(f"attention_mask must be bool or floating, got {attention_mask.dtype}")
        allowed = ({1, batch}, {1, heads}, {1, num_queries}, {key.shape[2]})
        if attention_mask.ndim != 4 or not all(map(set.__contains__, allowed, attention_mask.shape)):
            raise ValueError(
                f"attention_mask must be ({batch} or 1, {heads} or 1, {num_queries} or 1, {key.shape[2]}) here, got "
                f"shape {tuple(attention_mask.shape)}"
            )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have one entry for each of the {heads} heads, got shape {tuple(sinks.shape)}")
    visible, bias = split_mask(attention_mask)
    visibility = Visibility(visible, is_causal, num_queries, key.shape[2], query.device)
    sinks = None if sinks is None else sinks.view(1, heads, 1, 1)
    return entropy_of_visible(query, key, scaling, visibility, bias=bias, softcap=softcap, sinks=sinks)[0]


def entropy_of_visible(
    query: Tensor,
    key: Tensor,
    scaling: float,
    visibility: Visibility,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    clipping: float | None = None,
    by_head: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`compute_attention_entropy` of checked arguments, with what a record needs beside. Gradients are cheaper with
    `by_head` if that of the result is the same for all queries of a head, and dearer if it is not.

    Returns:
        The entropy, `(batch, heads, T)`; the number of seen scores whose query or key holds an infinity,
        `(batch, heads, T)`, or None where queries and keys are known to be finite, and by the kernel, which counts
        them itself; and which queries `clipping` (the a above) leaves no weight, bool, `(batch, heads, T)`, or None
        without it. `sinks` is `(batch | 1, heads, T | 1, 1)`.
    """
    if clipping is None and _kernel_takes(query, key, bias, sinks):
        result = kernel_result(query, key, scaling, visibility, bias=bias, softcap=softcap, sinks=sinks)
        return result.entropy, None, None
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    given, (query, key) = (query, key), (query.to(dtype), key.to(dtype))
    arguments = (scaling, visibility, bias, softcap, sinks)
    infinite = empty = None
    with torch.autocast(query.device.type, enabled=False):
        if query.numel() == 0 or key.numel() == 0:
            entropy = query.new_full(query.shape[:3], torch.nan)
        elif clipping is not None:
            if query.device.type == "cpu":
                query, key = query.double(), key.double()
            entropy, infinite = _streamed_entropy(query, key, *arguments, clipping)
            empty = entropy.isinf()
            entropy = entropy.masked_fill(empty, torch.nan)
        elif query.device.type != "cpu":
            entropy, infinite = _streamed_entropy(query, key, *arguments)
        else:
            linear = bias is None and softcap is None and sinks is None
            mean = visibility.mean_key(key.detach()) if linear else None
            if not _scores_are_small(query, key if mean is None else key.detach() - mean, scaling, bias):
                entropy, infinite = _streamed_entropy(query.double(), key.double(), *arguments)
            elif mean is not None:
                # queries and keys are as large as the gradients
                few = 2 * query.shape[-1] <= _LARGEST_SHARE * key.shape[2]
                ahead = by_head and few and torch.is_grad_enabled() and any(states.requires_grad for states in given)
                entropy, *_ = LinearEntropy.apply(*given, mean, scaling, visibility, ahead)
            else:
                entropy, _ = _streamed_entropy(query, key, *arguments)
    entropy = entropy.to(dtype)
    # without what rounding leaves beside the range. The gradient goes through: at the ends it is 0 by itself, to
    # rounding, and where it is not cut off it is the same for all queries of a head. The difference is exact
    computed, largest = entropy.detach(), largest_entropy(visibility, sinks).to(dtype)
    entropy = entropy + (computed.clamp(min=0.0).minimum(largest) - computed)
    if visibility.mask is not None:
        entropy = entropy.masked_fill(visibility.number() == 0, torch.nan)
    return entropy, infinite, empty


def largest_entropy(visibility: Visibility, sinks: Tensor | None) -> Tensor:
    """The largest that each query can reach, the logarithm of the number of keys that it sees, in nats,
    `(batch | 1, heads | 1, T)`; `sinks` as `entropy_of_visible` has them."""
    number = visibility.number()
    return number.log() if sinks is None else (number + ~(sinks.squeeze(-1) <= HIDDEN_BIAS)).log()


class Measurement(NamedTuple):
    """What a record keeps of one attention call, and the entropies that it is made of."""

    entropy: Tensor  # (batch, heads, T), in nats; NaN where the query is padding, sees no key or is broken
    total: Tensor  # (heads, 5), or 6 where softmax is clipped, as `AttentionEntropyRecord` adds them up
    logits: Tensor | None  # likewise


def measure_attention(
    query: Tensor,
    key: Tensor,
    scaling: float,
    visibility: Visibility,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    clipping: float | None = None,
    padded: Tensor | None = None,
    logits: bool = False,
) -> Measurement:
    """Entropies and sums over the queries, by head, with the arguments of `entropy_of_visible`.

    Args:
        padded (`torch.Tensor` of shape `(batch | 1, T)`, *optional*): bool, True for queries that do not count.
        logits (`bool`): whether to look at the scores too.
    """
    scored: dict[str, Any] = {"bias": bias, "softcap": softcap, "sinks": sinks}
    if clipping is None and _kernel_takes(query, key, bias, sinks):
        result = kernel_result(query, key, scaling, visibility, **scored, padded=padded, logits=logits)
        if not logits:
            return Measurement(result.entropy, result.total, None)
        gaps = spectral_gaps(result.own_weight, _counted(visibility, padded))
        return Measurement(result.entropy, result.total, torch.cat([result.logits, gaps], -1))

    scored["clipping"] = clipping
    # the usual case: every query counts, and sees as many keys in every sequence and head
    usual = padded is None and visibility.mask is None
    entropy, infinite, empty = entropy_of_visible(query, key, scaling, visibility, **scored, by_head=usual)
    number, counted, largest = visibility.number(), _counted(visibility, padded), largest_entropy(visibility, sinks)
    dtype = torch.float32 if entropy.device.type == "mps" else torch.float64
    if infinite is None and usual:
        total = F.pad(entropy.detach().sum((0, 2), dtype=dtype)[:, None], (0, 4))
        total[:, 1] = largest.sum((0, 2), dtype=dtype) * (len(query) / len(largest))
        total[:, 4] = len(query) * query.shape[2]
    else:
        entropy = entropy.masked_fill(~counted, torch.nan)
        infinite = torch.zeros_like(number) if infinite is None else infinite
        columns = [entropy.detach(), largest, entropy.isnan() * number, infinite, torch.ones_like(largest)]
        if empty is not None:
            columns = [columns[0].masked_fill(empty, 0.0), *columns[1:], empty]
        stacked = torch.stack(torch.broadcast_tensors(*columns), -1)
        total = torch.where(counted[..., None], stacked, 0).sum((0, 2), dtype=dtype)
    if not logits:
        return Measurement(entropy, total, None)
    values = logits_of_visible(query, key, scaling, visibility, **scored).to(dtype)  # (batch, heads, T, 4)
    gaps = spectral_gaps(values[..., 3], counted)
    values, counted = values[..., :3], counted[..., None]
    most = values[..., :1].masked_fill(~counted, -torch.inf).amax((0, 2))
    sums = values[..., 1:].masked_fill(~counted, 0.0).sum((0, 2))
    return Measurement(entropy, total, torch.cat([most, sums, gaps], -1))


def _counted(visibility: Visibility, padded: Tensor | None) -> Tensor:
    """Queries that count, those that see a key and are no padding, `(batch | 1, heads | 1, T)`."""
    counted = visibility.number() > 0
    return counted if padded is None else counted & ~padded[:, None]


@functools.cache
def _load_kernel() -> Callable | None:
    """The kernel for GPUs; None where Triton or its file is missing, without which all else works."""
    try:
        from .kernel import kernel_entropy
    except ImportError:
        return None
    return kernel_entropy


def _kernel_takes(query: Tensor, key: Tensor, bias: Tensor | None, sinks: Tensor | None) -> bool:
    """Whether the kernel computes this: it has no gradient, and knows one sink a head."""
    if query.device.type != "cuda":
        return False
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (query, key, bias, sinks)
    )
    known = query.dtype == key.dtype and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    one_a_head = sinks is None or sinks.shape[0] == sinks.shape[2] == 1
    return not differentiable and known and one_a_head and query.shape[-1] <= 256 and _load_kernel() is not None


def kernel_result(
    query: Tensor,
    key: Tensor,
    scaling: float,
    visibility: Visibility,
    *,
    sinks: Tensor | None = None,
    **options,
):
    """What the kernel gives (`KernelResult`), of queries and keys as the model has them; `options` are its own."""
    return _load_kernel()(  # type: ignore[misc]  # `_kernel_takes` has looked that it is there
        query,
        key,
        scaling=scaling,
        is_causal=visibility.is_causal,
        mask=visibility.mask,
        sinks=None if sinks is None else sinks.flatten(),
        **options,
    )


def _scores_are_small(query: Tensor, key: Tensor, scaling: float, bias: Tensor | None) -> bool:
    """Whether everything is finite, and the scores are so small that float32 is enough."""
    bound = abs(scaling) * torch.linalg.vector_norm(query.detach(), dim=-1).max()
    bound = bound * torch.linalg.vector_norm(key.detach(), dim=-1).max()
    if bias is not None:
        bound = bound + bias.detach().clamp(min=HIDDEN_BIAS).where(bias > HIDDEN_BIAS, 0.0).abs().max()
    return bool(bound <= _LARGE_SCORE)


def _in_blocks(function: Callable[..., Tensor], elements: int, num_queries: int, *tensors: Tensor | None) -> Tensor:
    """`function(start, stop, *tensors)` of blocks of queries, put together; of `elements` for each query. With a
    gradient, a block keeps nothing but its tensors, and is computed again."""
    on_cpu = any(tensor is not None and tensor.is_cpu for tensor in tensors)
    step = max(1, (_BLOCK_ELEMENTS if on_cpu else BLOCK_ELEMENTS_OF_ACCELERATORS) // elements)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    blocks = []
    for start in range(0, num_queries, step):
        arguments = (start, min(start + step, num_queries), *tensors)
        if differentiable:
            blocks.append(checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(function(*arguments))
    return torch.cat(blocks, 2)


def _streamed_entropy(
    query: Tensor,
    key: Tensor,
    scaling: float,
    visibility: Visibility,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    clipping: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`log l - e / l` by way of the scores, in the dtype of `query`, and the number of seen scores whose query or key
    holds an infinity, both `(batch, heads, T)`. An infinite entropy is that of a query without a weight."""
    batch, heads, num_queries, _ = query.shape
    query_size, key_size = query.detach().abs().amax(-1), key.detach().abs().amax(-1)
    # NaN times a weight of zero would enter the gradients of the queries that do not see it
    query, key = (
        states.masked_fill(~size.isfinite()[..., None], 0.0) for states, size in ((query, query_size), (key, key_size))
    )
    linear = bias is None and softcap is None and sinks is None and clipping is None
    bias, sinks = (
        None if tensor is None else tensor.to(query.dtype).expand(-1, -1, num_queries, -1) for tensor in (bias, sinks)
    )

    def entropy(
        start: int, stop: int, query: Tensor, key: Tensor, bias: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        block = visibility.block(start, stop)
        scores = _scores(query[:, :, start:stop], key[:, :, : block.num_keys], scaling, softcap)
        if bias is not None:
            scores = scores + bias[:, :, start:stop]
        hidden = None if block.mask is None else ~block.mask
        if sinks is not None:
            rows = sinks[:, :, start:stop].expand(batch, -1, -1, -1)
            hidden = torch.zeros_like(scores[:1, :1], dtype=torch.bool) if hidden is None else hidden
            hidden = torch.cat([hidden.expand(*rows.shape[:3], -1), rows <= HIDDEN_BIAS], -1)
            scores = torch.cat([scores, rows], -1)
        if hidden is not None:
            # a query that sees no key gets all: its NaN would enter the gradient of the others
            scores = scores.masked_fill(hidden & ~hidden.all(-1, keepdim=True), -torch.inf)
        # far from the largest, weights are 0 and so are their products with what is not infinite
        behind = (scores - scores.detach().amax(-1, keepdim=True)).clamp(min=HIDDEN_BIAS)
        weights = behind.exp()
        total = weights.sum(-1)
        if clipping is None:
            return total.log() - torch.linalg.vecdot(weights, behind) / total
        weights = clip_weights(weights / total[..., None], clipping, block.number()[..., None])
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        # a weight of 0 has a term, and a gradient, of 0
        terms = weights * torch.where(weights == 0, 1.0, weights).log()
        return (-terms.sum(-1)).masked_fill(total[..., 0] == 0, torch.inf)

    if linear:
        result, *_ = LinearEntropy.apply(query, key, query.new_zeros(1), scaling, visibility, False)
    else:
        result = _in_blocks(entropy, batch * heads * visibility.num_keys, num_queries, query, key, bias, sinks)
    number = visibility.number()
    broken = (number == 0) | ~query_size.isfinite() | (visibility.count(~key_size.isfinite(), heads) > 0)
    infinite = torch.where(query_size.isinf(), number, visibility.count(key_size.isinf(), heads))
    return result.masked_fill(broken, torch.nan), infinite


def clip_weights(weights: Tensor, clipping: float, number: Tensor) -> Tensor:
    """Weights as clipped softmax leaves them, of queries that see `number` keys."""
    least = clipping / number.clamp(min=1)
    return ((1 + least) * weights - least).clamp(min=0.0)


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Scores of some queries, `(batch, heads, T, S)`, without a copy of grouped keys."""
    batch, heads, num_queries, head_dim = query.shape
    scores = scaling * (query.reshape(batch, key.shape[1], -1, head_dim) @ key.mT)
    scores = scores.view(batch, heads, num_queries, key.shape[2])
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


@torch.no_grad()
def logits_of_visible(
    query: Tensor,
    key: Tensor,
    scaling: float,
    visibility: Visibility,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    clipping: float | None = None,
) -> Tensor:
    """Of every query, with the arguments of `entropy_of_visible`: the largest score of the keys that it sees, its
    weight on the first of them, the log-sum-exp of its scores, those of sinks included, and its weight on its own key,
    NaN unless the queries are those of the keys and see none behind them; `(batch, heads, T, 4)`, in float32 at
    least. Weights are clipped, where they are, and not divided by their sum."""
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    if query.is_cpu and query.numel() and key.numel() and not _scores_are_small(query, key, scaling, bias):
        dtype, query, key = torch.float64, query.double(), key.double()
    batch, heads, num_queries, _ = query.shape
    is_triangular = num_queries == visibility.num_keys and (
        visibility.is_causal or (visibility.mask is not None and not bool(visibility.mask.triu(1).any()))
    )

    def logits(start: int, stop: int, query: Tensor, key: Tensor) -> Tensor:
        block = visibility.block(start, stop)
        scores = _scores(query[:, :, start:stop], key[:, :, : block.num_keys], scaling, softcap)
        if bias is not None:
            scores = scores + bias.expand(-1, -1, num_queries, -1)[:, :, start:stop]
        if block.mask is not None:
            scores = scores.masked_fill(~block.mask, -torch.inf)
        largest = scores.amax(-1)
        # of all that the weights are shared by
        highest = largest
        if sinks is not None:
            sink = sinks.to(dtype).expand(batch, -1, num_queries, -1)[:, :, start:stop, 0]
            highest = torch.maximum(largest, sink)
        # differences to the highest score, which do not lose the weights where scores are large
        weights = (scores - highest[..., None]).exp()
        total = weights.sum(-1)
        if sinks is not None:
            total = total + (sink - highest).exp()
        first = torch.zeros(1, 1, 1, dtype=torch.long, device=query.device)
        if block.mask is not None:
            first = block.mask.int().argmax(-1)
        on_first = weights.gather(-1, first[..., None].expand(*scores.shape[:3], 1))[..., 0]
        on_own = torch.full_like(on_first, torch.nan)
        if is_triangular:
            on_own = weights.diagonal(start, -2, -1)
        on_first, on_own = on_first / total, on_own / total
        if clipping is not None:
            on_first, on_own = (clip_weights(each, clipping, block.number()) for each in (on_first, on_own))
        return torch.stack([largest, on_first, highest + total.log(), on_own], -1)

    with torch.autocast(query.device.type, enabled=False):
        return _in_blocks(logits, max(1, batch * heads * visibility.num_keys), num_queries, query, key)


def spectral_gaps(own: Tensor, counted: Tensor) -> Tensor:
    """Of every head, the sum over the sequences of the difference between the two largest eigenvalues of its map, and
    the number of sequences, `(heads, 2)`. The map of a causal head is triangular, so its eigenvalues are the weights
    of the queries on their `own` keys, `(batch, heads, T)`; a sequence needs two queries that are `counted`."""
    eigenvalues = own.masked_fill(~counted, -torch.inf)
    if own.shape[-1] < 2:
        return own.new_zeros(own.shape[1], 2)
    largest, second = eigenvalues.topk(2).values.unbind(-1)  # (batch, heads)
    has_two = counted.expand_as(own).sum(-1) > 1
    return torch.stack([(largest - second).masked_fill(~has_two, 0.0).sum(0), has_two.sum(0)], -1)
