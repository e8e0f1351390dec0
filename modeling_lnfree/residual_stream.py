"""The residual stream of any decoder of transformers while it runs: its size, its outliers, how alike tokens are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .metrics.attention_entropy.reading import inner_model
from .metrics.attention_entropy.recorder import named_arguments


# an entry or a gain so many standard deviations from the mean is an outlier
_FAR_ENTRY, _FAR_GAIN = 6, 3


class ResidualStreamRecord:
    """
    What `record_residual_stream` measured behind every layer, over all tokens that are not padding. A tensor has an
    entry a layer, float64; behind the last layer is before the final norm.
    """

    def __init__(self, num_layers: int):
        # by layer, over the tokens: sums of the entries' first four powers and of the norms, number of tokens, sum of
        # the cosines of pairs and number of pairs, and sums of every dimension's squares
        self._sums: list[Tensor | None] = [None] * num_layers
        # by layer, (D, 2): the largest entry of every dimension, and of its negative
        self._most: list[Tensor | None] = [None] * num_layers

    @property
    def norm(self) -> Tensor:
        """Mean L2 norm of a token's vector."""
        return self._total[:, 4] / self._total[:, 5]

    @property
    def infinity_norm(self) -> Tensor:
        """Largest absolute entry (arXiv 2306.12929)."""
        return self._largest.amax((1, 2))

    @property
    def pearson_kurtosis(self) -> Tensor:
        """E[(x - m)^4] / E[(x - m)^2]^2 over all entries of all tokens, 3 for a Gaussian (arXiv 2306.12929, where it
        is of each sequence, and averaged)."""
        mean, second, third, fourth = self._moments
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        return central / (second - mean**2) ** 2

    @property
    def neuron_kurtosis(self) -> Tensor:
        """Kurtosis, over the dimensions, of their root mean square over the tokens: E[s^4] / E[s^2]^2, from 1, where
        all dimensions are alike, to the hidden size, where one has everything (arXiv 2405.19279)."""
        squares = self._total[:, 8:] / self._total[:, 5:6]  # (layers, D)
        return squares.square().mean(-1) / squares.mean(-1).square()

    @property
    def cosine(self) -> Tensor:
        """Mean cosine of two different tokens of a sequence, 1 where all have become one; NaN without such pairs."""
        return self._total[:, 6] / self._total[:, 7]

    @property
    def outlier_dimensions(self) -> list[list[int]]:
        """By layer, the dimensions where an entry is more than 6 standard deviations of the layer's entries away from
        their mean (after arXiv 2208.07339, without its bound on the magnitude, which knows one scale alone)."""
        mean, second = self._moments[:2]
        signs = self._largest.new_tensor([1.0, -1.0])
        away = (self._largest * signs - mean[:, None, None]).abs()
        far = away > _FAR_ENTRY * (second - mean**2).clamp(min=0).sqrt()[:, None, None]
        return [row.nonzero().flatten().tolist() for row in far.any(-1)]

    def add(self, layer: int, states: Tensor, mask: Tensor | None) -> None:
        """
        Adds what one pass gave behind a layer.

        Args:
            states (`torch.Tensor` of shape `(batch, T, D)`).
            mask (`torch.Tensor` of shape `(batch, T)`): 0 at padding; None: there is none.
        """
        # the GPUs of Apple have no float64
        states = states.detach().to(torch.float32 if states.device.type == "mps" else torch.float64)
        lengths = states.new_full((len(states),), states.shape[1])
        tokens = states.flatten(0, 1)  # (tokens, D)
        if mask is not None:
            mask = mask.to(states.device).bool()
            lengths, tokens = mask.sum(-1).to(states.dtype), states[mask]
            states = states.masked_fill(~mask[..., None], 0.0)
        if len(tokens) == 0:
            return
        squares = tokens.square()
        norms = squares.sum(-1).sqrt()
        unit = nn.functional.normalize(states, dim=-1)
        # all pairs without a matrix of them: the square of the sum, less the pairs of a token with itself
        cosines = unit.sum(1).square().sum() - unit.square().sum()
        powers = [tokens.sum(), squares.sum(), (squares * tokens).sum(), squares.square().sum()]
        pairs = (lengths * (lengths - 1)).sum()
        first = torch.stack([*powers, norms.sum(), lengths.sum(), cosines, pairs])
        self._add(
            layer,
            torch.cat([first, squares.sum(0)]).double().cpu(),
            torch.stack([tokens.amax(0), -tokens.amin(0)], -1).double().cpu(),
        )

    def _add(self, layer: int, sums: Tensor, most: Tensor) -> None:
        earlier, larger = self._sums[layer], self._most[layer]
        self._sums[layer] = sums if earlier is None else earlier + sums
        self._most[layer] = most if larger is None else torch.maximum(larger, most)

    def all_reduce(self, device: torch.device) -> None:
        """Adds up the measurements of all processes of the default process group, by way of `device`."""
        totals, largest = self._total.to(device), self._largest.to(device)
        torch.distributed.all_reduce(totals)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        self._sums, self._most = list(totals.cpu()), list(largest.cpu())

    @property
    def _total(self) -> Tensor:
        return torch.stack(_all(self._sums))  # (layers, 8 + D)

    @property
    def _largest(self) -> Tensor:
        return torch.stack(_all(self._most))  # (layers, D, 2)

    @property
    def _moments(self) -> Tensor:
        """Means of the entries' first four powers, `(4, layers)`."""
        total = self._total
        return (total[:, :4] / (total[:, 5:6] * (total.shape[1] - 8))).T


def _all(rows: list[Tensor | None]) -> list[Tensor]:
    seen = [row for row in rows if row is not None]
    if not seen or len(seen) < len(rows):
        raise ValueError(f"{len(seen)} of {len(rows)} layers were measured: the model read nothing, or not by them")
    return seen


def find_layers(model: nn.Module) -> nn.ModuleList:
    """
    The layers of a decoder: its outermost list of as many modules as its configuration has layers.

    Raises:
        ValueError: if there is no such list.
    """
    inner = inner_model(model)
    decoder = inner.base_model.get_decoder()
    number = decoder.config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(f"{type(inner).__name__} has no list of its {number} layers")


@contextmanager
def record_residual_stream(model: nn.Module) -> Iterator[ResidualStreamRecord]:
    """
    Measure the residual stream behind every layer of a decoder in all its forward passes inside the `with` block.

    ```python
    with record_residual_stream(model) as record:
        model(**batch)
    record.infinity_norm  # (layers,)
    ```

    Padding is what `attention_mask` of two dimensions says. Sums are in float64, and nothing is kept of the states.

    Raises:
        ValueError: for a model without a list of its layers, and for layers that do not give `(batch, T, D)`.
    """
    layers = find_layers(model)
    record = ResidualStreamRecord(len(layers))
    masks: list[Tensor | None] = [None]

    def keep_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = dict(named_arguments(module, args, kwargs)).get("attention_mask")
        masks[0] = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def add(index: int, output: Tensor | tuple) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.ndim != 3:
            raise ValueError(f"layer {index} gives {tuple(states.shape)}, and not (batch, T, hidden size)")
        mask = masks[0]
        # with a cache, it tells of the tokens before too
        record.add(index, states, None if mask is None else mask[:, -states.shape[1] :])

    with ExitStack() as stack:
        decoder = inner_model(model).base_model.get_decoder()
        stack.enter_context(decoder.register_forward_pre_hook(keep_mask, with_kwargs=True))
        for index, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_hook(lambda _, args, output, index=index: add(index, output)))
        yield record


def find_outlier_gains(model: nn.Module) -> dict[str, list[int]]:
    """
    By the name of every norm over the hidden size in the decoder, the dimensions whose gain is more than 3 standard
    deviations away from the mean of its gains (arXiv 2105.06990). Empty for a model without norms.
    """
    decoder = inner_model(model).base_model.get_decoder()
    size, found = decoder.config.get_text_config().hidden_size, {}
    for name, module in decoder.named_modules():
        gain = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(gain, Tensor) and gain.shape == (size,):
            away = gain.detach().double() - gain.detach().double().mean()
            far = away.abs() > _FAR_GAIN * away.square().mean().sqrt()
            found[name] = far.nonzero().flatten().tolist()
    return found
