"""Weights that are a function of others while a model trains, and ordinary again at its end."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from .errors import UserError
from .methods import WeightParametrization


class SpectralNorm(nn.Module):
    """
    W / sigma(W), with the largest singular value sigma = u' W v (arXiv 1802.05957). The gradient goes through W; u and
    v are constants, which `update` brings up to date after every step of the optimizer, not in every forward pass: so
    accumulation and checkpointing compute with the same ones.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        u, v = leading_singular_vectors(weight.detach())
        self.register_buffer("u", u)
        self.register_buffer("v", v)

    def sigma(self, weight: Tensor) -> Tensor:
        """The largest singular value, as far as u and v are up to date."""
        # copies: `update` changes the buffers in place, and a backward pass may still need them
        with torch.autocast(weight.device.type, enabled=False):
            return torch.vdot(self.u.clone(), torch.mv(weight, self.v.clone()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight / self.sigma(weight)

    @torch.no_grad()
    def update(self, weight: Tensor):
        """One step of the power iteration."""
        self.v.copy_(nn.functional.normalize(torch.mv(weight.t(), self.u), dim=0))
        self.u.copy_(nn.functional.normalize(torch.mv(weight, self.v), dim=0))


class SigmaReparam(SpectralNorm):
    """
    gain * W / sigma(W) with a learned gain (sigma-reparametrization, arXiv 2303.06296).

    Args:
        gain: its start; None: sigma(W), so that the weight is W at first.
    """

    def __init__(self, weight: Tensor, gain: float | None):
        super().__init__(weight)
        self.gain = nn.Parameter(self.sigma(weight.detach()) if gain is None else weight.new_tensor(gain))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.gain / self.sigma(weight))


class WeightNorm(nn.Module):
    """gain * W / |W|, row by row, with a learned gain for each (arXiv 1602.07868); the weight is W at first."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.gain = nn.Parameter(torch.linalg.vector_norm(weight.detach(), dim=1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.gain / torch.linalg.vector_norm(weight, dim=1))[:, None]


def leading_singular_vectors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right singular vector of the largest singular value of an `(A, B)` matrix, `(A,)` and `(B,)`."""
    matrix = weight.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.t()
    short = torch.linalg.eigh(matrix @ matrix.t()).eigenvectors[:, -1]
    long = nn.functional.normalize(matrix.t() @ short, dim=0)
    u, v = (short, long) if wide else (long, short)
    return u.to(weight.dtype), v.to(weight.dtype)


def parametrize_weights(
    model: PreTrainedModel,
    kind: WeightParametrization,
    projections: list[str] | None = None,
    gain: float | None = None,
):
    """
    Parametrizes the linear layers in the layers of a model; those that are not trained stay as they are.

    Args:
        projections: their names, as `q_proj`; None: all.
        gain: start of sigma-reparametrization's gain; None: the spectral norm.

    Raises:
        UserError: for a name that the model does not have.
    """
    linear = {name: module for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    known = sorted({name.rpartition(".")[2] for name in linear})
    for name in projections or []:
        if name not in known:
            raise UserError(f"parametrized_projections must be of {', '.join(known)}, got {name!r}")
    for name, module in linear.items():
        if (projections is not None and name.rpartition(".")[2] not in projections) or not module.weight.requires_grad:
            continue
        weight = module.weight
        parametrization: nn.Module
        if kind == "sigma_reparam":
            parametrization = SigmaReparam(weight, gain)
        else:
            parametrization = SpectralNorm(weight) if kind == "spectral_norm" else WeightNorm(weight)
        parametrize.register_parametrization(module, "weight", parametrization)


def _parametrized(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            yield name, module


def is_parametrized(model: PreTrainedModel) -> bool:
    """Whether any weight of the model is parametrized."""
    return any(True for _ in _parametrized(model))


def update_spectral_norms(model: PreTrainedModel):
    """One step of the power iteration of every spectral norm: after each step of the optimizer."""
    for _, module in _parametrized(model):
        [parametrization] = module.parametrizations.weight
        if isinstance(parametrization, SpectralNorm):
            parametrization.update(module.parametrizations.weight.original)


def split_state(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    The state dict of the ordinary model with the weights that the parametrizations give now; and what these are made
    of, under its own names.
    """
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if ".parametrizations." in name}
    ordinary = {name: tensor for name, tensor in state.items() if name not in own}
    with torch.no_grad():
        ordinary |= {f"{name}.weight": module.weight.detach() for name, module in _parametrized(model)}
    return ordinary, own


def fold_weights(model: PreTrainedModel):
    """Makes the weights ordinary parameters of the values that they have."""
    for _, module in list(_parametrized(model)):
        parametrize.remove_parametrizations(module, "weight")


def entropy_lower_bound(logit_norm: Tensor, visible: Tensor) -> Tensor:
    """
    The least entropy in nats that a query can have whose `visible` logits have an L2 norm of at most `logit_norm`
    (arXiv 2303.06296, theorem 3.1, for one query). It is reached: by one logit that stands out above equal others.
    """
    number = visible.to(logit_norm.dtype).clamp(min=1)
    others = number - 1
    ratio = torch.where(others > 0, number / others.clamp(min=1), 1).sqrt()
    # weight of each of the others, relative to the one that stands out
    weight = torch.exp(-logit_norm * ratio)
    sum_of_weights = 1 + others * weight
    return sum_of_weights.log() + logit_norm * (number * others).sqrt() * weight / sum_of_weights


def query_key_norm(query: nn.Linear, key: nn.Linear, head_dim: int, *, rotated: bool = False) -> Tensor:
    """
    By head, the spectral norm of W_Q' W_K, with the biases as one more column (`torch.DoubleTensor` of shape
    `(heads,)`); where positions rotate between the two, the product of both norms, which is not less.
    """
    matrices = []
    has_bias = query.bias is not None or key.bias is not None
    for layer in (query, key):
        matrix = layer.weight.detach().double()
        if has_bias:
            bias = matrix.new_zeros(len(matrix)) if layer.bias is None else layer.bias.detach().double()
            matrix = torch.cat([matrix, bias[:, None]], 1)
        # of each head, the triangular factor of its transpose: (heads, head_dim, head_dim)
        matrices.append(torch.linalg.qr(matrix.view(-1, head_dim, matrix.shape[1]).mT).R)
    query_factor, key_factor = matrices
    key_factor = key_factor.repeat_interleave(len(query_factor) // len(key_factor), 0)
    if rotated:
        return torch.linalg.matrix_norm(query_factor, 2) * torch.linalg.matrix_norm(key_factor, 2)
    return torch.linalg.matrix_norm(query_factor @ key_factor.mT, 2)


def gram_norm(states: Tensor, *, with_bias: bool, rotated: bool = False) -> Tensor:
    """
    The spectral norm of X X' for each sequence of an attention layer's inputs, `(batch, T, D)`, with a column of ones
    where the projections have biases; where positions rotate between the two, the largest norm of a row times that of
    all, which is not less. `(batch,)`.
    """
    states = states.detach().double()
    if with_bias:
        states = nn.functional.pad(states, (0, 1), value=1.0)
    if rotated:
        norms = torch.linalg.vector_norm(states, dim=-1)
        return norms.amax(-1) * torch.linalg.vector_norm(norms, dim=-1)
    smaller = states @ states.mT if states.shape[1] <= states.shape[2] else states.mT @ states
    # rounding may leave it a little too small
    return torch.linalg.eigvalsh(smaller)[:, -1] * (1 + 1e-12 * math.prod(smaller.shape[-2:]) ** 0.5)
