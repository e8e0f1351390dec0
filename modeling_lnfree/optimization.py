"""An optimizer with a rule of its own for the matrices of the layers: Muon, or AdamW at another rate."""

import math
from collections.abc import Collection
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Conv1D, PreTrainedModel


LayerOptimizer = Literal["adamw", "muon"]
MuonAdjustment = Literal["original", "match_rms_adamw"]


def build_optimizer(
    model: PreTrainedModel,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    layer_optimizer: LayerOptimizer = "muon",
    layer_learning_rate: float | None = None,
    layer_base_width: int | None = None,
    muon_momentum: float = 0.95,
    muon_adjustment: MuonAdjustment = "match_rms_adamw",
    decayed: Collection[str] | None = None,
    **adamw,
) -> torch.optim.Optimizer:
    """
    One optimizer for a whole model, of which the matrices of the layers follow their own rule and all else AdamW. For
    a plain Trainer: `Trainer(..., optimizers=(build_optimizer(model), None))`.

    The matrices of the layers are the weights of the linear layers of the base model, without embeddings and heads.
    Muon (https://kellerjordan.github.io/posts/muon) is torch's own: the update of a matrix is made orthogonal, so that
    it moves all directions by the same amount.

    Args:
        learning_rate: of AdamW.
        weight_decay: on the weights of linear layers and embeddings, unless `decayed` names others; by the rate of
            their group (decoupled).
        layer_optimizer: `"muon"`, or `"adamw"` for the layers too.
        layer_learning_rate: of the matrices of the layers; `learning_rate` by default.
        layer_base_width: the width at which `layer_learning_rate` holds; at another it is times
            `layer_base_width / hidden_size` (maximal-update parametrization, arXiv 2203.03466). None: the same at all.
        muon_momentum: Muon's.
        muon_adjustment: Muon's rate, for an `(A, B)` matrix, times `0.2 * sqrt(max(A, B))`, so that its entries move
            as AdamW's do (`"match_rms_adamw"`, arXiv 2502.16982), or times `sqrt(max(1, A / B))` (`"original"`).
        decayed: names of the parameters with weight decay.
        adamw: further arguments of `torch.optim.AdamW`, such as `betas`.

    Raises:
        ImportError: for Muon, if torch has none (before 2.9).
        ValueError: for a rate, momentum or width out of range, and a model without linear layers.
    """
    layer_learning_rate = learning_rate if layer_learning_rate is None else layer_learning_rate
    for name, value in (("learning_rate", learning_rate), ("layer_learning_rate", layer_learning_rate)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and more than 0, got {value}")
    if not 0 <= muon_momentum < 1:
        raise ValueError(f"muon_momentum must be in [0, 1), got {muon_momentum}")
    for name, chosen, allowed in (
        ("layer_optimizer", layer_optimizer, get_args(LayerOptimizer)),
        ("muon_adjustment", muon_adjustment, get_args(MuonAdjustment)),
    ):
        if chosen not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {chosen!r}")
    if layer_base_width is not None:
        if layer_base_width < 1:
            raise ValueError(f"layer_base_width must be at least 1, got {layer_base_width}")
        layer_learning_rate *= layer_base_width / model.config.hidden_size

    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    matrices = _matrices(base, nn.Linear)
    decayed = get_decayed_parameters(model) if decayed is None else decayed
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in matrices, name in decayed), []).append(parameter)
    if not any(is_matrix for is_matrix, _ in groups):
        raise ValueError(f"{type(model).__name__} has no linear layers to train in its base model")
    # the rate that the Trainer logs as its own is the first group's: that of AdamW
    layers, others = (
        [
            {"params": parameters, "lr": rate, "weight_decay": weight_decay * decays}
            for (is_matrix, decays), parameters in sorted(groups.items(), key=lambda item: item[0][1], reverse=True)
            if is_matrix == wanted
        ]
        for wanted, rate in ((True, layer_learning_rate), (False, learning_rate))
    )
    if layer_optimizer == "adamw":
        return torch.optim.AdamW(others + layers, lr=learning_rate, **adamw)
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"layer_optimizer='muon' needs torch 2.9 or newer, found {torch.__version__}")
    return AdamWAndMuon(
        torch.optim.AdamW(others, lr=learning_rate, **adamw),
        torch.optim.Muon(layers, lr=layer_learning_rate, momentum=muon_momentum, adjust_lr_fn=muon_adjustment),
    )


def get_decayed_parameters(model: nn.Module) -> list[str]:
    """
    Names of the parameters that weight decay is for: the weights of linear layers and embeddings. Not biases and
    norms, and not gains, gates, temperatures, alphas, shifts and slopes, which it would pull to zero.
    """
    weights = _matrices(model, (nn.Linear, nn.Embedding, Conv1D))
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights]


def get_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """
    The parameters that are trained, those with weight decay (`get_decayed_parameters`) and those without, for an
    optimizer of torch: `Trainer(..., optimizers=(torch.optim.AdamW(get_parameter_groups(model, 0.1)), None))`.
    """
    decayed = set(get_decayed_parameters(model))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed].append(parameter)
    return [{"params": groups[decays], "weight_decay": weight_decay * decays} for decays in groups]


def _matrices(model: nn.Module, kinds: type | tuple[type, ...]) -> set[int]:
    """Ids of the matrices of modules of these kinds; of a parametrized weight, of what it is made of."""
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    return {id(parameter) for module in modules for parameter in module.parameters() if parameter.ndim == 2}


class AdamWAndMuon(torch.optim.Optimizer):
    """
    Two optimizers as one, so that schedulers, loss scaling and checkpoints see the parameters of both. The state and
    the groups are this one's: each rule gets its groups when it makes its step.

    Args:
        rules: over different parameters.
    """

    def __init__(self, *rules: torch.optim.Optimizer):
        self.rules: list[tuple[torch.optim.Optimizer, int]] = []
        super().__init__([group for rule in rules for group in rule.param_groups], {})
        self.rules = [(rule, len(rule.param_groups)) for rule in rules]

    def add_param_group(self, param_group: dict[str, Any]):
        """A group that is added later is of the first rule, and comes before all others."""
        if not self.rules:
            return super().add_param_group(param_group)
        rule, length = self.rules[0]
        super().add_param_group({**rule.defaults, **param_group})
        self.param_groups.insert(0, self.param_groups.pop())
        self.rules[0] = (rule, length + 1)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = iter(self.param_groups)
        # below AVX-512 torch multiplies bfloat16 many times slower than float32, and Muon takes most of a step
        slow = torch.backends.cpu.get_cpu_capability() == "AVX2"
        with WideProducts() if slow else nullcontext():
            for rule, length in self.rules:
                rule.state, rule.param_groups = self.state, [next(groups) for _ in range(length)]
                rule.step()
        return loss


class WideProducts(TorchFunctionMode):
    """Multiplies bfloat16 matrices on a CPU in float32 and rounds the result, as bfloat16 instructions do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.addmm, torch.Tensor.matmul) and all(a.is_cpu and a.dtype == torch.bfloat16 for a in args):
            return func(*(a.float() for a in args), **kwargs).bfloat16()
        return func(*args, **kwargs)
