"""What is measured during training beside attention: a class a quantity."""

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modeling_lnfree import LNFreeConfig
from modeling_lnfree.residual_stream import record_residual_stream

from .parametrization import entropy_lower_bound, gram_norm, query_key_norm


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


class HeadGates(Quantity):
    """Mean gate of every head over the tokens of the probe batch, in (0, 1) (arXiv 2306.12929)."""

    name = "head_gates"

    @contextmanager
    def watch(self, model):
        layers = model.model.layers
        # by layer: sums over the tokens of the heads' gates, and of 1
        self.sums = torch.zeros(len(layers), model.config.num_attention_heads + 1, dtype=torch.float64)

        def add(index: int, gate: Any, states: Tensor):
            gates = gate.gates(states)  # (B, T, H)
            self.sums[index, :-1] += gates.double().sum((0, 1)).cpu()
            self.sums[index, -1] += gates[..., 0].numel()

        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                stack.enter_context(
                    layer.self_attn.head_gate.register_forward_pre_hook(
                        lambda module, args, index=index: add(index, module, args[1])
                    )
                )
            yield
        self.sums = _add_up(self.sums, model.device)

    def measure(self, model):
        means = self.sums[:, :-1] / self.sums[:, -1:]
        scalars = {f"{self.name}/layer_{layer}/mean": heads.mean().item() for layer, heads in enumerate(means)}
        return {"mean": means.tolist()}, scalars


class ResidualStream(Quantity):
    """
    The residual stream behind every layer: the mean L2 norm of a token's vector, and the kurtosis of the activations'
    root mean squares over the hidden size, from 1 (all dimensions alike) to the hidden size (one outlier feature has
    everything), arXiv 2405.19279.
    """

    name = "residual_stream"

    @contextmanager
    def watch(self, model):
        with record_residual_stream(model) as self.record:
            yield
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.record.all_reduce(model.device)

    def measure(self, model):
        values = {"norm": self.record.norm.tolist(), "kurtosis": self.record.neuron_kurtosis.tolist()}
        return values, _by_layer(self.name, values)


class Outliers(Quantity):
    """
    Outliers of the residual stream behind every layer, over all tokens of the probe batch, as
    `modeling_lnfree.residual_stream` defines them: `infinity_norm`, `pearson_kurtosis`, `cosine` (the mean cosine of
    two different tokens of a sequence) and the outlier `dimensions`.

    Args:
        stream: whose record of the same pass it reads; by default it looks at the stream itself.
    """

    name = "outliers"

    def __init__(self, stream: ResidualStream | None = None):
        self.stream, self.looks = stream or ResidualStream(), stream is None

    def watch(self, model):
        return self.stream.watch(model) if self.looks else nullcontext()

    def measure(self, model):
        record = self.stream.record
        values = {name: getattr(record, name).tolist() for name in ("infinity_norm", "pearson_kurtosis", "cosine")}
        dimensions = record.outlier_dimensions
        scalars = _by_layer(self.name, {**values, "dimensions": [float(len(found)) for found in dimensions]})
        return {**values, "dimensions": dimensions}, scalars


def _by_layer(name: str, values: dict[str, list[float]]) -> dict[str, float]:
    return {f"{name}/layer_{layer}/{key}": value for key, row in values.items() for layer, value in enumerate(row)}


class ZeroActivations(Quantity):
    """Share of the activations in every block's feed-forward layer that are exactly zero: what ReLU switches off."""

    name = "zero_activations"

    @staticmethod
    def holds(model: PreTrainedModel) -> bool:
        """Whether every block has a ReLU: feed-forward layers that are fused or left out have none."""
        return model.config.hidden_act == "relu" and all(hasattr(layer.mlp, "act_fn") for layer in model.model.layers)

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
        plain_positions = config.rope_type in ("default", "linear", "dynamic", "llama3")
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


def _add_up(sums: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Sums over the processes, each of which saw its part of the probe batch."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    sums = sums.to(device)
    torch.distributed.all_reduce(sums)
    return sums.cpu()
