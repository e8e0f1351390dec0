"""Fields of a recipe that change nothing beside the others: refused, or told where a recipe by name may have them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from modeling_lnfree import LNFreeConfig
from modeling_lnfree.configuration_lnfree import PRESETS
from modeling_lnfree.parts_lnfree import NORMS, WIRINGS, keep

from .errors import UserError


_NORMS = {name: build(1, 1.0, 1.0) for name, build in NORMS.items()}
_WITH_ALPHA = [name for name, norm in _NORMS.items() if hasattr(norm, "alpha")]
_WITH_EPS = [name for name, norm in _NORMS.items() if hasattr(norm, "eps")]


def _wire(position: str, is_parallel: bool) -> float:
    """What a block of this wiring makes of a number where its norms are identities."""
    wiring, _ = WIRINGS[position, is_parallel]
    block = SimpleNamespace(**{name: keep for _, names in WIRINGS.values() for name in names})
    branches = (lambda x: x * x + 0.5, lambda x: x**3 - 0.7)
    return wiring(block, 0.3, *branches, lambda x, y: 1.1 * x + 0.9 * y, lambda x, y: 0.8 * x + 1.2 * y)


# those that are wired as "pre" is, but for the norms
_NEED_NORMS = {key for key in WIRINGS if _wire(*key) == _wire("pre", key[1])}
# of the model: where it acts, and what that is called
_OF_THE_MODEL: dict[str, tuple[Callable[[LNFreeConfig], bool], str]] = {
    **dict.fromkeys(
        ("rope_theta", "partial_rotary_factor"),
        (lambda config: config.position_embedding_type == "rotary", "position_embedding_type='rotary'"),
    ),
    "norm_alpha_init": (
        lambda config: bool(_norms(config).intersection(_WITH_ALPHA)),
        f"a norm of type {' or '.join(_WITH_ALPHA)}",
    ),
    "layer_norm_eps": (
        lambda config: bool(_norms(config).intersection(_WITH_EPS) or config.normalized_projections),
        "a norm that divides",
    ),
    "norm_position": (
        lambda config: config.norm_type != "none" or not _needs_norms(config),
        "norms in the layers (norm_type)",
    ),
    "intermediate_size": (
        lambda config: config.is_heterogeneous or config.mlp_type != "none",
        "feed-forward layers (mlp_type)",
    ),
    "decay_slopes": (lambda config: config.slope_sharing is not None, "a learned slope (slope_sharing)"),
}
_WORKERS = (lambda value: value("dataloader_num_workers") > 0, "dataloader_num_workers")
# of the others
_REFUSED: dict[str, tuple[Callable[[Callable], bool], str]] = {
    "shuffle_buffer": (lambda value: value("streaming"), "streaming=True"),
    "dataloader_persistent_workers": _WORKERS,
    "dataloader_multiprocessing_context": _WORKERS,
}
_SAVED = (lambda value: value("save_strategy") != "no", "a save_strategy")
_EVALUATED = (lambda value: value("eval_strategy") != "no", "an eval_strategy")
_CHECKPOINTED = (
    lambda value: value("activation_checkpointing") or value("gradient_checkpointing"),
    "activation_checkpointing",
)
_ADAM = (lambda value: value("optim") not in ("sgd", "adagrad", "rmsprop", "adafactor"), "an Adam (optim)")
_REPORTED = (lambda value: value("report_to") not in ("none", [], ["none"]), "report_to")
_TRACKIO = (lambda value: "trackio" in value("report_to") or value("report_to") == "all", "report_to='trackio'")
# by what is switched elsewhere, perhaps by an override
_TOLD: dict[str, tuple[Callable[[Callable], bool], str]] = {
    "eval_steps": (lambda value: value("eval_strategy") == "steps", "eval_strategy='steps'"),
    "eval_delay": _EVALUATED,
    "eval_sequences": (lambda value: _EVALUATED[0](value) or value("eval_on_start"), _EVALUATED[1]),
    "save_steps": (lambda value: value("save_strategy") == "steps", "save_strategy='steps'"),
    **dict.fromkeys(("save_total_limit", "save_only_model", "save_on_each_node", "milestones"), _SAVED),
    "eval_fraction": (
        lambda value: value("eval_dataset") is None and not value("streaming"),
        "texts that are trained on without an eval_dataset or streaming",
    ),
    "num_train_epochs": (lambda value: value("max_steps") < 1, "max_steps=-1"),
    "warmup_steps": (
        lambda value: value("lr_scheduler_type") not in ("constant", "reduce_lr_on_plateau", "greedy"),
        "an lr_scheduler_type that warms up",
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _ADAM),
    "optim_args": (
        lambda value: value("optim") not in ("adamw_torch", "adamw_torch_fused", "adafactor"),
        "an optim that reads them",
    ),
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), _CHECKPOINTED),
    "dataloader_in_order": _WORKERS,
    "run_name": _REPORTED,
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKIO),
}


def check_effects(given: dict[str, Any], defaults: dict[str, Any], config: LNFreeConfig | None):
    """
    Refuses what was given and would change nothing.

    Args:
        given: the whole flat recipe.
        defaults: of the fields that have one.
        config: of the model, where it is not loaded.

    Raises:
        UserError: with the field and what it needs.
    """
    lines = _idle(given, defaults, _REFUSED, _reader(given, defaults))
    if config is not None:
        lines += _idle(given, defaults, _OF_THE_MODEL, config)
        # the preset's own field
        is_position = PRESETS.get(config.preset or "", {}).keys() == {"norm_position"}
        if is_position and config.norm_type == "none" and _needs_norms(config):
            lines.append(f"preset {config.preset} has no effect without norms in the layers, got {config.variant}")
    if lines:
        raise UserError(lines[0])


def find_idle(given: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """A line for each field that another switches off, as an override may do with those of a named recipe."""
    return _idle(given, defaults, _TOLD, _reader(given, defaults))


def _reader(given: dict[str, Any], defaults: dict[str, Any]) -> Callable[[str], Any]:
    return lambda name: defaults.get(name) if given.get(name) is None else given[name]


def _idle(given: dict[str, Any], defaults: dict[str, Any], table: dict[str, Any], seen: Any) -> list[str]:
    return [
        f"{name}={given[name]} has no effect without {needs}"
        for name, (acts, needs) in table.items()
        if given.get(name) not in (None, defaults.get(name)) and not acts(seen)
    ]


def _needs_norms(config: LNFreeConfig) -> bool:
    """Whether its norm position says nothing without norms."""
    return (config.norm_position, config.parallel_residual) in _NEED_NORMS


def _norms(config: LNFreeConfig) -> set[str]:
    return {config.norm_type, config.final_norm_type}
