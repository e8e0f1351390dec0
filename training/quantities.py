"""What is measured during training beside attention entropy: a class a quantity."""

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from modeling_lnfree import LNFreeConfig

from .parametrization import (
    entropy_lower_bound,
    gram_norm,
    query_key_norm,
)


class Quantity(ABC):
    """What one forward pass of the probe batch shows; its file in the run's folder is `<name>.jsonl`."""

    name: str

    def watch(self, model: torch.nn.Module) -> AbstractContextManager:
        """Stands around the forward pass."""
        return nullcontext()

    @abstractmethod
    def measure(self, model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, float]]:
        """The record for the file, and the scalars for the log, after the forward pass."""


class NegativeSlope(Quantity):
    """Learned negative slopes: one a layer, or the one that all layers share."""

    name = "negative_slope"

    def measure(self, model):
        slopes = model.model.learned_slope.negative_slope.detach().float().tolist()
        return {"slopes": slopes}, {f"negative_slope/{index}": slope for index, slope in enumerate(slopes)}


class LearnedScalars(Quantity):
    """
    What designs learn by head, block or norm: residual gains, attention gains, temperatures, alphas and shifts of
    norms, and the biases of head gates, by their names in the state dict. Gains that are fixed are not among them.
    """

    name = "learned_scalars"
    kinds = ("residual_gains", "attention_gains", "temperature", "alpha", "shift", "head_gate.bias")

    def __init__(self, model: torch.nn.Module):
        self.names = [name for name, _ in model.named_parameters() if name.endswith(self.kinds)]

    def measure(self, model):
        parameters = dict(model.named_parameters())
        values = {name: parameters[name].detach().float() for name in self.names}
        scalars = {f"learned_scalars/{name}/mean": value.mean().item() for name, value in values.items()}
        return {name: value.tolist() for name, value in values.items()}, scalars


class Outliers(Quantity):
    """
    Outliers of the residual stream behind every layer, over all tokens of the probe batch:

    - `infinity_norm`, the largest absolute entry, and `pearson_kurtosis`, E[(x - m)^4] / E[(x - m)^2]^2 over all
      entries, 3 for a Gaussian (arXiv 2306.12929; there by sequence, and averaged);
    - `cosine`, the mean cosine of two different tokens of a sequence, 1 where all have become one;
    - `dimensions`, where an entry is larger than 6 in absolute value and more than 6 standard deviations of the
      layer's entries away from their mean (after arXiv 2208.07339).
    """

    name = "outliers"

    @contextmanager
    def watch(self, model):
        layers = model.model.layers
        # per layer: sums of x to x^4, number of entries, and sum of cosines and number of pairs
        self.sums = torch.zeros(len(layers), 7, dtype=torch.float64)
        self.most = torch.zeros(len(layers), model.config.hidden_size, 2, dtype=torch.float64)  # largest x and -x

        def add(layer: int, output: Tensor):
            states = output.to(torch.float32 if output.device.type == "mps" else torch.float64)
            tokens = states.shape[-2]
            unit = torch.nn.functional.normalize(states, dim=-1)
            # all pairs without a matrix of them: the square of the sum, less the pairs of a token with itself
            cosines = unit.sum(-2).square().sum() - unit.square().sum()
            squares = states.square()
            sums = [states.sum(), squares.sum(), (squares * states).sum(), squares.square().sum(), cosines]
            first = torch.stack(sums).cpu().double()
            numbers = first.new_tensor([states.numel(), len(states) * tokens * (tokens - 1)])
            self.sums[layer] += torch.stack([*first[:4], numbers[0], first[4], numbers[1]])
            flat = states.flatten(0, -2)
            self.most[layer] = torch.maximum(
                self.most[layer], torch.stack([flat.amax(0), -flat.amin(0)], -1).cpu().double()
            )

        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                stack.enter_context(
                    layer.register_forward_hook(lambda _, args, output, index=index: add(index, output))
                )
            yield
        self.sums = _add_up(self.sums, model.device)
        self.most = _add_up(self.most, model.device, torch.distributed.ReduceOp.MAX)

    def measure(self, model):
        mean, second, third, fourth = (self.sums[:, :4] / self.sums[:, 4:5]).T
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        infinity_norm = self.most.amax((1, 2))
        # one token has no other
        pairs = self.sums[:, 6]
        cosine = torch.where(pairs > 0, self.sums[:, 5] / pairs.clamp(min=1), torch.nan)
        signs = self.most.new_tensor([1.0, -1.0])
        away = (self.most * signs - mean[:, None, None]).abs() > 6 * variance.sqrt()[:, None, None]
        outliers = (away & (self.most > 6)).any(-1)
        record = {
            "infinity_norm": infinity_norm.tolist(),
            "pearson_kurtosis": (central / variance**2).tolist(),
            "cosine": cosine.tolist(),
            "dimensions": [row.nonzero().flatten().tolist() for row in outliers],
        }
        scalars = {
            f"outliers/layer_{layer}/{name}": value
            for name in ("infinity_norm", "pearson_kurtosis", "cosine")
            for layer, value in enumerate(record[name])
        }
        scalars |= {f"outliers/layer_{layer}/dimensions": float(row.sum()) for layer, row in enumerate(outliers)}
        return record, scalars


class ResidualStream(Quantity):
    """
    The residual stream behind every layer: the mean L2 norm of a token's vector, and the kurtosis of the activations'
    root mean squares over the hidden size, from 1 (all dimensions alike) to the hidden size (one outlier feature has
    everything), arXiv 2405.19279.
    """

    name = "residual_stream"

    @contextmanager
    def watch(self, model):
        layers = model.model.layers
        # per layer: sums over tokens of each dimension's square, and of the norm; number of tokens
        self.sums = torch.zeros(len(layers), model.config.hidden_size + 2, dtype=torch.float64)

        def add(layer: int, output: torch.Tensor):
            # the GPUs of Apple have no float64
            dtype = torch.float32 if output.device.type == "mps" else torch.float64
            squares = output.to(dtype).square().flatten(0, -2)  # (tokens, D)
            tokens = torch.full((1,), len(squares), device=squares.device)
            self.sums[layer] += torch.cat([squares.sum(0), squares.sum(-1).sqrt().sum()[None], tokens]).cpu()

        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                stack.enter_context(
                    layer.register_forward_hook(lambda _, args, output, index=index: add(index, output))
                )
            yield
        self.sums = _add_up(self.sums, model.device)

    def measure(self, model):
        mean_squares = self.sums[:, :-2] / self.sums[:, -1:]  # (layers, D)
        norm = (self.sums[:, -2] / self.sums[:, -1]).tolist()
        kurtosis = (mean_squares.square().mean(-1) / mean_squares.mean(-1).square()).tolist()
        scalars = {f"residual_stream/layer_{layer}/norm": value for layer, value in enumerate(norm)}
        scalars |= {f"residual_stream/layer_{layer}/kurtosis": value for layer, value in enumerate(kurtosis)}
        return {"norm": norm, "kurtosis": kurtosis}, scalars


class ZeroActivations(Quantity):
    """Share of the activations in every block's feed-forward layer that are exactly zero: what ReLU switches off."""

    name = "zero_activations"

    @contextmanager
    def watch(self, model):
        layers = model.model.layers
        self.counts = torch.zeros(len(layers), 2, dtype=torch.float64)  # zeros, activations

        def add(layer: int, output: torch.Tensor):
            self.counts[layer, 0] += (output == 0).sum().item()
            self.counts[layer, 1] += output.numel()

        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                stack.enter_context(
                    layer.mlp.act_fn.register_forward_hook(lambda _, args, output, index=index: add(index, output))
                )
            yield
        self.counts = _add_up(self.counts, model.device)

    def measure(self, model):
        share = (self.counts[:, 0] / self.counts[:, 1]).tolist()
        return {"share": share}, {f"zero_activations/layer_{layer}": value for layer, value in enumerate(share)}


def batch_entropy(states: Tensor) -> Tensor:
    """
    Mean over the neurons of .5 log(pi e s^2 + 1), s a neuron's standard deviation over the sequences (arXiv
    2208.01134, as its published code has it). A neuron is a position and a feature. It is no entropy in nats: that of
    a Gaussian has 2 pi e, and no 1.

    Args:
        states (`torch.Tensor` of shape `(batch, T, D)`): of at least two sequences.
    """
    return (math.pi * math.e * states.float().var(0) + 1).log().mean() / 2


class BatchEntropy(Quantity):
    """
    Batch entropy behind every layer, over the probe batches of all processes: how much the layer still tells sequences
    apart. Not measured where that is a single sequence.
    """

    name = "batch_entropy"

    @contextmanager
    def watch(self, model):
        layers = model.model.layers
        self.values: list[float] = []

        def add(output: Tensor):
            # at once, since the states of all layers may be more than the memory has room for
            states = output.to(torch.float32 if output.device.type == "mps" else torch.float64)
            number = _add_up(torch.tensor(float(len(states)), dtype=torch.float64), model.device).item()
            if number > 1:
                mean = _add_up(states.sum(0), model.device) / number
                squares = _add_up((states - mean.to(states.device)).square().sum(0), model.device)
                self.values.append((math.pi * math.e * squares / (number - 1) + 1).log().mean().item() / 2)

        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.register_forward_hook(lambda _, args, output: add(output)))
            yield

    def measure(self, model):
        return {"entropy": self.values}, {f"batch_entropy/layer_{layer}": v for layer, v in enumerate(self.values)}


class EntropyBound(Quantity):
    """
    The least attention entropy that spectral norms leave possible (arXiv 2303.06296, theorem 3.1), mean over the
    queries of the probe batch, each with the number of keys that it sees and with the scores as they are scaled; and
    the spectral norms themselves: of every matrix in the layers, and of W_Q' W_K by head. Nats.
    """

    name = "entropy_bound"

    @staticmethod
    def holds(config: LNFreeConfig) -> bool:
        """Whether attention is the softmax of scores that the projections alone bound."""
        normed = {"q_proj", "k_proj"} & set(config.normalized_projections)
        # others multiply cosine and sine by a factor
        rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        plain_positions = rope_type in ("default", "linear", "dynamic", "llama3")
        return not normed and config.softmax_clipping is None and plain_positions

    @contextmanager
    def watch(self, model):
        config = model.config
        rotated = config.position_embedding_type == "rotary"
        attentions = [layer.self_attn for layer in model.model.layers]
        self.norms = [
            query_key_norm(attention.q_proj, attention.k_proj, attention.head_dim, rotated=rotated)
            for attention in attentions
        ]
        # by layer and head: sum over the queries of the bound, and their number
        self.sums = torch.zeros(len(attentions), config.num_attention_heads, 2, dtype=torch.float64)

        def add(index: int, attention: Any, states: Tensor, position_ids: Tensor):
            has_bias = attention.q_proj.bias is not None or attention.k_proj.bias is not None
            gram = gram_norm(states, with_bias=has_bias, rotated=rotated)  # (B,)
            logit_norm = attention.scaling * self.norms[index][:, None] * gram[:, None, None]  # (B, H, 1)
            if attention.temperature is not None:
                logit_norm = logit_norm / attention.temperature.detach().abs()[:, None]
            visible = (position_ids + 1)[:, None]  # (B, 1, T)
            bound = entropy_lower_bound(logit_norm, visible).expand(len(states), -1, -1)
            self.sums[index, :, 0] += bound.sum((0, 2)).cpu()
            self.sums[index, :, 1] += bound.shape[0] * bound.shape[2]

        with ExitStack() as stack:
            for index, attention in enumerate(attentions):
                stack.enter_context(
                    attention.register_forward_pre_hook(
                        lambda module, args, kwargs, index=index: add(index, module, args[0], kwargs["position_ids"]),
                        with_kwargs=True,
                    )
                )
            yield
        self.sums = _add_up(self.sums, model.device)

    def measure(self, model):
        bound = (self.sums[..., 0] / self.sums[..., 1]).tolist()
        norms = {
            f"layer_{layer}/{name}": torch.linalg.matrix_norm(module.weight.detach().double(), 2).item()
            for layer, block in enumerate(model.model.layers)
            for name, module in block.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        scalars = {f"spectral_norm/{name}": norm for name, norm in norms.items()}
        for layer, heads in enumerate(bound):
            scalars[f"entropy_bound/layer_{layer}/mean"] = sum(heads) / len(heads)
        record = {"bound": bound, "query_key_norm": torch.stack(self.norms).tolist(), "spectral_norm": norms}
        return record, scalars


def _add_up(sums: torch.Tensor, device: torch.device, how: Any = torch.distributed.ReduceOp.SUM) -> torch.Tensor:
    """Sums (or what `how` says) over the processes, each of which saw its part of the probe batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    sums = sums.to(device)
    torch.distributed.all_reduce(sums, how)
    return sums.cpu()
