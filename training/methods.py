"""How a model is trained beside the optimizer: the fields of a recipe for it, and which of them go together."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .errors import UserError


WeightParametrization = Literal["sigma_reparam", "weight_norm", "spectral_norm"]


@dataclass
class MethodArguments:
    """Penalties in the loss, weights that are made of others while training, norms that are taken out."""

    entropy_weight: float | None = field(
        default=None,
        metadata={"help": "of the penalty on attention entropy in the loss (AERO: 1e-5, 5e-5); None: no penalty"},
    )
    entropy_margin: float = field(
        default=0.2,
        metadata={"help": "share of a head's largest entropy around its threshold where the penalty is 0"},
    )
    entropy_target_init: float = field(
        default=0.5, metadata={"help": "start of the thresholds, as shares of a head's largest entropy"}
    )
    entropy_target_learned: bool = field(default=True, metadata={"help": "whether the thresholds are trained"})
    weight_parametrization: WeightParametrization | None = field(
        default=None,
        metadata={
            "help": "of the matrices of the layers while training: sigma_reparam, weight_norm or spectral_norm; the "
            "finished model has ordinary weights"
        },
    )
    parametrized_projections: list[str] | None = field(
        default=None, metadata={"help": "the matrices that are parametrized, as q_proj; None: all"}
    )
    parametrization_gain_init: float | None = field(
        default=None, metadata={"help": "start of sigma_reparam's gains; None: the spectral norm"}
    )
    batch_entropy_weight: float | None = field(
        default=None,
        metadata={"help": "of the penalty on batch entropy in the loss (0.005 to 0.1 in the paper); None: no penalty"},
    )
    batch_entropy_target: float = field(default=0.5, metadata={"help": "start of the targets, one a layer"})
    batch_entropy_floor: float = field(default=0.2, metadata={"help": "least value that a target acts with"})
    remove_norms_from: int | None = field(
        default=None,
        metadata={"help": "step before which the first norm is taken out, one after the other; None: they stay"},
    )
    remove_norms_gaps: list[int] = field(
        default_factory=lambda: [2, 2, 3, 2],
        metadata={
            "help": "steps from one to the next: MLP norms, norms of query and key, norms of values, and before the "
            "final one (arXiv 2507.02559: 2 2 3 2 for GPT-2 small and medium, 4 4 6 2 for large and xl)"
        },
    )
    remove_norms_taper: int = field(
        default=0, metadata={"help": "steps over which a norm becomes a constant, along a cosine; 0: at once"}
    )
    remove_norms_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "nats: the next norm goes when the smoothed training loss is at most this above what it was "
            "before the first went; None: by remove_norms_gaps"
        },
    )
    remove_norms_auxiliary_weight: float = field(
        default=0.0,
        metadata={"help": "in the loss, of the spread of the final norm's deviations (arXiv 2507.02559: 0.1 to 0.01)"},
    )
    remove_norms_skip_first: bool = field(
        default=False, metadata={"help": "leave position 0 out of the constants, whose deviation is far off in many"}
    )
    keep_final_norm: bool = field(default=False, metadata={"help": "leave the norm before the output projection"})


METHOD_FIELDS = tuple(f.name for f in fields(MethodArguments))
NORM_REMOVAL_FIELDS = tuple(name for name in METHOD_FIELDS if name.startswith("remove_norms")) + ("keep_final_norm",)
# without the field behind it, a field has no effect
_NEEDS = {
    **dict.fromkeys(("entropy_margin", "entropy_target_init", "entropy_target_learned"), "entropy_weight"),
    **dict.fromkeys(("batch_entropy_target", "batch_entropy_floor"), "batch_entropy_weight"),
    **dict.fromkeys(("parametrized_projections", "parametrization_gain_init"), "weight_parametrization"),
    **dict.fromkeys((name for name in NORM_REMOVAL_FIELDS if name != "remove_norms_from"), "remove_norms_from"),
}


def check_methods(data: MethodArguments, given: dict[str, Any]):
    """
    Refuses what would have no effect or cannot be had of `METHOD_FIELDS`.

    Args:
        given: the whole flat recipe.

    Raises:
        UserError: with the field, its value and what is allowed.
    """
    for name, least, most in (
        *(("entropy_margin", 0, 1), ("entropy_target_init", 0, 1)),
        *(("batch_entropy_target", 0, math.inf), ("batch_entropy_floor", 0, math.inf)),
        *(("remove_norms_taper", 0, math.inf), ("remove_norms_auxiliary_weight", 0, math.inf)),
    ):
        if not least <= getattr(data, name) <= most:
            raise UserError(f"{name} must be in [{least}, {most}], got {getattr(data, name)}")
    for name in ("entropy_weight", "batch_entropy_weight", "parametrization_gain_init", "remove_norms_tolerance"):
        if getattr(data, name) is not None and not 0 < getattr(data, name) < math.inf:
            raise UserError(f"{name} must be finite and more than 0, got {getattr(data, name)}")
    defaults = MethodArguments()
    for name, needed in _NEEDS.items():
        if getattr(data, name) != getattr(defaults, name) and getattr(data, needed) is None:
            raise UserError(f"{name}={getattr(data, name)} has no effect without {needed}")
    if data.parametrization_gain_init is not None and data.weight_parametrization != "sigma_reparam":
        raise UserError(
            f"parametrization_gain_init={data.parametrization_gain_init} has no effect with weight_parametrization="
            f"{data.weight_parametrization!r}"
        )
    for name in ("entropy_weight", "batch_entropy_weight", "weight_parametrization", "remove_norms_from"):
        if getattr(data, name) is not None and given["fsdp_size"] > 1:
            raise UserError(
                f"{name}={getattr(data, name)} needs whole weights and an optimizer in every process, and "
                f"fsdp_size={given['fsdp_size']} shards them: train with fsdp_size=1 (DDP)"
            )
    sequences = given.get("per_device_train_batch_size", 8)
    if data.batch_entropy_weight is not None and sequences < 2:
        raise UserError(
            "batch_entropy_weight needs a per_device_train_batch_size of at least 2, since a single sequence has no "
            f"batch entropy, got {sequences}"
        )
    if data.remove_norms_from is not None:
        _check_norm_removal(data, data.remove_norms_from, given)


def _check_norm_removal(data: MethodArguments, first_step: int, given: dict[str, Any]):
    if given.get("init_from") is None:
        raise UserError(f"remove_norms_from={first_step} needs init_from: a trained model that has norms")
    for name in ("weight_parametrization", "trainable"):
        if given.get(name) is not None:
            raise UserError(f"{name}={given[name]!r} and remove_norms_from do not go together")
    if first_step < 2:
        # the running mean needs a step
        raise UserError(f"remove_norms_from must be at least 2, got {first_step}")
    if len(data.remove_norms_gaps) != 4 or min(data.remove_norms_gaps) < 0:
        raise UserError(
            "remove_norms_gaps must be four numbers of steps: MLP, query and key, value, and before the final norm; "
            f"got {data.remove_norms_gaps}"
        )
    if data.remove_norms_auxiliary_weight and data.keep_final_norm:
        raise UserError("remove_norms_auxiliary_weight has no effect with keep_final_norm=True")
    if given["max_steps"] < 1:
        raise UserError("remove_norms_from needs a budget: max_steps or train_tokens")
