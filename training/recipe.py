"""
A recipe: flat `key: value` lines of YAML, which `key=value` on the command line overrides.

Its keys are the fields of `DataArguments` below, of `LNFreeConfig` (the model) and of transformers'
`TrainingArguments` (everything about the optimization), under the names that they have there.
"""

import difflib
import math
import os
import re
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from modeling_lnfree import LNFreeConfig
from modeling_lnfree.configuration_lnfree import read_variant
from modeling_lnfree.optimization import LayerOptimizer, MuonAdjustment
from modeling_lnfree.variants import rename_variant, variant_slug

from .catalog import find_file, read_values, read_yaml
from .effects import check_effects, find_idle
from .errors import UserError, explained, one_line
from .methods import MethodArguments, check_methods


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def check_model_id(model_id: str | Path, revision: str | None = None):
    """Raises UserError for what is neither a folder nor can be an id on the Hub, and for a revision of a folder."""
    try:
        if not os.path.isdir(model_id):
            validate_repo_id(str(model_id))
        elif revision is not None:
            raise UserError(
                f"revision={revision!r} is of the Hub, and {model_id} is a folder: name the folder of that state"
            )
    except HFValidationError:
        raise UserError(f"model {str(model_id)!r} is neither a folder nor an id of the Hub") from None


def parent_name(init_from: str) -> str:
    """What a model that is started from is called: its id on the Hub, or its folder's name; or its run's."""
    folder = Path(init_from)
    if not folder.is_dir():
        return init_from
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and (folder.parent / "recipe.yaml").is_file() else folder.name


@dataclass
class DataArguments(MethodArguments):
    """What is trained on, and what is measured on the way; the fields that neither the model nor the Trainer has."""

    variant: str | None = field(
        default="SM+R",
        metadata={"help": "the paper's notation: SM+LN+G, SM+LN+R, SM+G, SM+R, ...; with init_from, its own"},
    )
    preset: str | None = field(
        default=None, metadata={"help": "of a variant that names none: Stable makes SM+R to SM+R@Stable"}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a model to start from, of this family or stock GPT-2, GPT-NeoX or Llama, or "
            "folder of a run; None: random weights"
        },
    )
    trainable: str | None = field(
        default=None,
        metadata={
            "help": "'norms' (LN-tuning), or a regular expression that is searched in the names of the parameters; "
            "the others stay as they are; None: all"
        },
    )
    dataset: str = field(
        default="stdlib",
        metadata={
            "help": "'stdlib' (the Python source of this interpreter's standard library), a Hub id, or a local file"
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration (subset) of the dataset"})
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "evaluation data; None: the dataset's own validation or test split, else a part held out by hash"
        },
    )
    eval_fraction: float = field(default=0.05, metadata={"help": "share of the documents held out by hash"})
    text_column: str = field(default="content", metadata={"help": "column of the dataset that holds the text"})
    streaming: bool = field(
        default=False, metadata={"help": "read, shuffle and tokenize the train part while training; needs max_steps"}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "documents of a stream whose blocks are shuffled with each other"}
    )
    separate_documents: bool = field(
        default=False, metadata={"help": "no attention across the documents of a block; positions start at each again"}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder; None: a byte-level BPE of vocab_size trained on the train part"},
    )
    block_size: int = field(default=128, metadata={"help": "the paper's T: tokens in a training sequence"})
    train_tokens: int | None = field(
        default=None,
        metadata={"help": "budget in tokens, from which max_steps follows; None: max_steps is the budget"},
    )
    eval_sequences: int | None = field(
        default=None,
        metadata={
            "help": "sequences, spread over the evaluation part, of the evaluations on the way; the last is always "
            "over the whole part; None: all"
        },
    )
    entropy_steps: int = field(default=100, metadata={"help": "steps between two measurements on the probe batch"})
    entropy_sequences: int = field(default=32, metadata={"help": "sequences of the probe batch"})
    milestones: list[int] | None = field(
        default=None, metadata={"help": "steps whose checkpoints are kept beside the newest save_total_limit"}
    )
    decay_slopes: bool = field(
        default=False,
        metadata={"help": "weight decay on learned negative slopes too, as in the paper's published code"},
    )
    layer_optimizer: LayerOptimizer = field(
        default="adamw",
        metadata={"help": "of the matrices of the layers, all else being AdamW's: adamw, or muon (torch's own)"},
    )
    layer_learning_rate: float | None = field(
        default=None, metadata={"help": "of the matrices of the layers; None: learning_rate"}
    )
    layer_base_width: int | None = field(
        default=None,
        metadata={
            "help": "hidden size at which the rate of the layers' matrices holds; at another it is times "
            "layer_base_width / hidden_size; None: the same at all"
        },
    )
    muon_momentum: float | None = field(default=None, metadata={"help": "Muon's momentum; None: 0.95"})
    muon_adjustment: MuonAdjustment | None = field(
        default=None,
        metadata={
            "help": "Muon's rate by a matrix's sizes: match_rms_adamw (entries move as AdamW's do) or original; None: "
            "match_rms_adamw"
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "transformers' attention that trains and measures: eager, sdpa, flex_attention, "
            "flash_attention_2, ...; None: its own choice"
        },
    )
    fused_loss: bool | None = field(
        default=None,
        metadata={
            "help": "head and loss in one, by blocks of tokens, so that no step holds its logits; None: on a GPU"
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "torch.compile of each layer by itself: the first step comes sooner than with torch_compile, "
            "which is of the whole model"
        },
    )
    fsdp_size: int = field(
        default=1,
        metadata={
            "help": "processes that share one copy of weights, gradients and optimizer by FSDP2, the others being "
            "replicas of theirs; 1: every process has its own (DDP)"
        },
    )


# of `DataArguments`: how the matrices of the layers are trained
LAYER_FIELDS = ("layer_optimizer", "layer_learning_rate", "layer_base_width", "muon_momentum", "muon_adjustment")
MUON_DEFAULTS = {"muon_momentum": 0.95, "muon_adjustment": "match_rms_adamw"}
# of `DataArguments`: what is trained of which model
START_FIELDS = ("init_from", "trainable")
DROPOUTS = ("embedding_dropout", "attention_dropout", "hidden_dropout")
DATA_FIELDS = {f.name for f in fields(DataArguments)}
TRAINING_FIELDS = {f.name for f in fields(TrainingArguments) if f.init}
# fields that older versions of transformers have under the second name alone
OLDER_NAMES = {f"activation_checkpointing{end}": f"gradient_checkpointing{end}" for end in ("", "_kwargs")}
# with transformers' own, in which layers differ
MODEL_HINTS = {**LNFreeConfig.__annotations__, "per_layer_config": dict[int, dict[str, Any]] | None}
MODEL_FIELDS = MODEL_HINTS.keys() - TRAINING_FIELDS
# of the fields of `DataArguments` and `TrainingArguments`
DEFAULTS = {
    f.name: f.default for f in (*fields(TrainingArguments), *fields(DataArguments)) if f.default is not MISSING
}
_TO_THE_HUB = "finished runs go to the Hub by 'lnfree publish', with the token of 'hf auth login'"
# with these of the Trainer's arguments a run would not be what its recipe and its results say
REFUSED = {
    "auto_find_batch_size": "a step has the tokens that the recipe says",
    "batch_eval_metrics": "the evaluation is over the whole part",
    "bf16_full_eval": "the trained model would be saved in half precision too",
    "dataloader_drop_last": "the evaluation is over the whole part",
    "deepspeed": "fsdp_size is what shards a model here",
    "fp16_full_eval": "the trained model would be saved in half precision too",
    "fsdp": "fsdp_size is what shards a model here",
    "ignore_data_skip": "a run goes on in its data where it was interrupted",
    "label_names": "the labels are the tokens themselves",
    "load_best_model_at_end": "variants are compared at equal steps",
    "metric_for_best_model": "variants are compared at equal steps",
    "parallelism_config": "fsdp_size is what shards a model here",
    "prediction_loss_only": "the evaluation is over the whole part",
    "resume_from_checkpoint": "a run goes on from its own last checkpoint by itself",
    # with it, separate_documents would have no effect
    "use_cache": "training keeps no cache",
    "use_liger_kernel": "it has none for this family",
    # the folder of a run has local paths, and no copy of the model's code
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_revision"), _TO_THE_HUB),
    **dict.fromkeys(("hub_strategy", "hub_always_push"), _TO_THE_HUB),
    # without an effect on any run
    "classifier_dropout": "it is of a classifier, which is made of the trained model",
    "fsdp_config": "fsdp_size is what shards a model here",
    "greater_is_better": "variants are compared at equal steps",
    "include_for_metrics": "the evaluation is by the loss alone",
    "liger_kernel_config": "it has none for this family",
    "local_rank": "a launcher says it",
    "remove_unused_columns": "blocks have one column",
    "restore_callback_states_from_checkpoint": "no callback keeps any",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "every run trains, and is evaluated at its end"),
}


@dataclass
class Recipe:
    """A checked recipe: `data`, the `model`'s fields and the `training` arguments' fields."""

    data: DataArguments
    model: dict[str, Any]
    training: dict[str, Any]

    def build_config(self, **overrides) -> LNFreeConfig:
        """The model's configuration; `overrides` are fields known later, such as the tokenizer's."""
        if self.data.init_from is not None:
            raise UserError(f"init_from={self.data.init_from}: its configuration is known when it is loaded")
        named = {"max_position_embeddings": self.data.block_size, **self.model, **overrides}
        return LNFreeConfig.from_variant(self.variant, **named)

    @property
    def variant(self) -> str:
        """The variant with its preset: `SM+R@Stable`; empty where `init_from` says which. ValueError for no name."""
        variant = self.data.variant or ""
        if not variant or self.data.preset is None or read_variant(variant)["preset"]:
            return variant
        return rename_variant(variant, preset=self.data.preset)

    def build_arguments(self) -> TrainingArguments:
        """The Trainer's arguments; raises UserError for those that it refuses."""
        # A NaN in the loss must show, not be replaced by the running mean. Every parameter has a part in every step.
        # Pinned memory, from which a batch is copied while the device computes, is for accelerators. On a machine
        # without one, processes of a launcher find each other only if the Trainer is told that it has none.
        accelerated = torch.accelerator.is_available()
        defaults: dict[str, Any] = {"logging_nan_inf_filter": False, "ddp_find_unused_parameters": False}
        defaults |= {"dataloader_pin_memory": accelerated, "use_cpu": not accelerated}
        if accelerated and self.training.get("dataloader_pin_memory", True):
            defaults["accelerator_config"] = {"non_blocking": True}
        if self.training.get("fp16") and (self.training.get("use_cpu") or not torch.accelerator.is_available()):
            raise UserError("fp16=True needs an accelerator: a CPU would train in float32 silently; bf16=True works")
        try:
            arguments = TrainingArguments(**{**defaults, **self.training})
            # refuses what is not known or not installed; the Trainer would after the data
            for callback in get_reporting_integration_callbacks(arguments.report_to):
                callback()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UserError(f"recipe: {one_line(error)}") from error
        # one process, one GPU: the Trainer would give each that it sees a batch, and a step more tokens than we say
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments

    @property
    def name(self) -> str:
        """
        The run's name, from its configuration: `gpt2-sm-r-t128-seed1337`; with `init_from`, from the model's name:
        `gpt2-tuned-t128-seed1337`.
        """
        if self.data.init_from is not None:
            parent = re.sub(r"[^\w.-]+", "-", parent_name(self.data.init_from).rpartition("/")[2])
            return f"{parent}-tuned-t{self.data.block_size}-seed{self.training['seed']}"
        config = self.build_config()
        variant = variant_slug(config.variant)
        return f"{config.backbone}-{variant}-t{self.data.block_size}-seed{self.training['seed']}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that all processes of the launcher train on in one step."""
        sequences = self.training.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
        accumulated = self.training.get("gradient_accumulation_steps", 1)
        return sequences * accumulated * self.data.block_size * int(os.environ.get("WORLD_SIZE", 1))

    @property
    def layer_options(self) -> dict[str, Any]:
        """Arguments of `build_optimizer`; none where the matrices of the layers are trained as all else."""
        given = {name: value for name in LAYER_FIELDS if (value := getattr(self.data, name)) is not None}
        return {} if given == {"layer_optimizer": "adamw"} else given

    @property
    def idle(self) -> list[str]:
        """A line for each field that another one switches off."""
        return find_idle(self.to_dict(), DEFAULTS)

    def to_dict(self) -> dict[str, Any]:
        """The flat recipe, with every default of `DataArguments` written out."""
        return {**asdict(self.data), **self.model, **self.training}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """
    Reads and checks a recipe.

    Args:
        path: a name of `RECIPES`, or a YAML file.
        overrides: `key=value` strings that replace its values; the value is read as YAML.

    Raises:
        UserError: for an unknown name or key (it names the nearest known ones), a value of the wrong type, a model
            that the configuration refuses, and checkpoints that could not be resumed exactly.
    """
    values = read_values(find_file(path, "recipe"), "recipe")
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"an override must be key=value, got {override!r}")
        with explained(f"the value of {override!r} is not YAML"):
            values[key] = read_yaml(value)
    return build_recipe(values)


def build_recipe(values: dict[str, Any]) -> Recipe:
    """Checks a flat recipe given as a dictionary; see `load_recipe`."""
    recipe = _sort_values(values)
    data, training = recipe.data, recipe.training
    _check_refused(recipe)
    _check_numbers(recipe)
    _check_preset(recipe)
    _check_layer_optimizer(recipe)
    _check_compile(recipe)
    if data.train_tokens is not None:
        training["max_steps"] = -(-data.train_tokens // recipe.tokens_per_step)
    if training.get("max_steps", -1) == 0 or training.get("max_steps", -1) < -1:
        raise UserError(
            f"max_steps must be at least 1, or -1 to train for num_train_epochs, got {training['max_steps']}"
        )
    if not training.get("output_dir", "runs"):
        raise UserError(f"output_dir must be a folder, got {training['output_dir']!r}")
    check_methods(data, {**recipe.to_dict(), "max_steps": training.get("max_steps", -1)})
    _check_start(recipe, values)
    config = None
    if data.init_from is None:
        try:
            config = recipe.build_config()
        except (ValueError, StrictDataclassError) as error:
            raise UserError(one_line(error)) from None
        if data.block_size > config.max_position_embeddings:
            raise UserError(
                f"block_size={data.block_size} is longer than max_position_embeddings={config.max_position_embeddings}"
            )
    check_effects(recipe.to_dict(), DEFAULTS, config)
    _check_data(recipe)
    _check_checkpoints(recipe)
    training.setdefault("output_dir", f"runs/{recipe.name}")
    return recipe


def _sort_values(values: dict[str, Any]) -> Recipe:
    """The recipe of these values, each of the type of its field. Raises UserError for what is no field."""
    parts: dict[str, dict[str, Any]] = {"data": {}, "model": {}, "training": {"seed": 1337}}
    for key, value in values.items():
        # YAML 1.1 reads no as False
        if value is False and str(key).endswith("_strategy"):
            value = "no"
        key = key if key in TRAINING_FIELDS else OLDER_NAMES.get(key, key)
        for part, known in (("data", DATA_FIELDS), ("training", TRAINING_FIELDS), ("model", MODEL_FIELDS)):
            if key in known:
                parts[part][key] = value
                break
        else:
            nearest = difflib.get_close_matches(
                str(key), DATA_FIELDS | MODEL_FIELDS | TRAINING_FIELDS, n=1, cutoff=0.0
            )
            raise UserError(f"unknown key {key!r} in the recipe; the nearest known one is {nearest[0]!r}")
    for part, hints in (
        *(("data", get_type_hints(DataArguments)), ("training", get_type_hints(TrainingArguments))),
        ("model", MODEL_HINTS),
    ):
        for key, value in parts[part].items():
            takes_float = float in (hints[key], *get_args(hints[key]))
            # in quotes, as a caller of `build_recipe` may have it
            if takes_float and isinstance(value, str) and _NUMBER.fullmatch(value):
                parts[part][key] = value = float(value)
            # an integer is a float to everybody but a type checker
            checked = float(value) if type(value) is int and takes_float else value
            try:
                type_validator(key, checked, hints[key])
            except TypeError as error:
                raise UserError(f"recipe: {error}") from None
    return Recipe(DataArguments(**parts["data"]), parts["model"], parts["training"])


def _check_refused(recipe: Recipe):
    """Raises UserError for values with which a run would not be what its recipe and its results say."""
    training, given = recipe.training, recipe.to_dict()
    for name, reason in REFUSED.items():
        if given.get(name) not in (None, DEFAULTS.get(name)):
            raise UserError(f"{name} is not supported in a recipe: {reason}")
    if training.get("eval_do_concat_batches") is False:
        raise UserError(
            "eval_do_concat_batches=False is not supported in a recipe: the evaluation is over the whole part"
        )
    if training.get("save_strategy") == "best":
        raise UserError("save_strategy='best' is not supported in a recipe: variants are compared at equal steps")
    if isinstance(training.get("accelerator_config"), dict) and training["accelerator_config"].get("split_batches"):
        raise UserError("split_batches is not supported in a recipe: a step has the tokens that the recipe says")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if recipe.model.get(name) is not None:
            raise UserError(f"{name} must be left out of a recipe: it is the tokenizer's; got {recipe.model[name]}")


def _check_numbers(recipe: Recipe):
    """Raises UserError for numbers out of range."""
    given = recipe.to_dict()
    # a block of one token predicts nothing
    for name, least in (
        *(("block_size", 2), ("train_tokens", 1), ("eval_sequences", 1)),
        *(("entropy_steps", 1), ("entropy_sequences", 1)),
        *(("shuffle_buffer", 1), ("fsdp_size", 1), ("layer_base_width", 1)),
        *(("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1), ("gradient_accumulation_steps", 1)),
        *(("logging_steps", 1), ("save_steps", 1), ("eval_steps", 1), ("eval_accumulation_steps", 1)),
        *(("dataloader_num_workers", 0), ("seed", 0), ("weight_decay", 0)),
    ):
        if given.get(name) is not None and not given[name] >= least:
            raise UserError(f"{name} must be at least {least}, got {given[name]}")
    if given["seed"] >= 2**32:
        raise UserError(f"seed must be less than 2**32, got {given['seed']}")
    if not 0 <= given.get("label_smoothing_factor", 0) < 1:
        raise UserError(f"label_smoothing_factor must be in [0, 1), got {given['label_smoothing_factor']}")
    if not 0 < given["eval_fraction"] < 1:
        raise UserError(f"eval_fraction must be in (0, 1), got {given['eval_fraction']}")
    for name in ("learning_rate", "layer_learning_rate", "num_train_epochs"):
        if given.get(name) is not None and not 0 < given[name] < math.inf:
            raise UserError(f"{name} must be finite and more than 0, got {given[name]}")


def _check_preset(recipe: Recipe):
    """Raises UserError for a variant that is no name, and a preset beside what names its own."""
    data = recipe.data
    if data.preset is not None and data.init_from is not None:
        raise UserError(f"preset={data.preset!r} has no effect with init_from={data.init_from!r}, a model as it is")
    try:
        preset = read_variant(recipe.variant)["preset"] if recipe.variant else None
    except ValueError as error:
        raise UserError(str(error)) from None
    if data.preset not in (None, preset):
        raise UserError(f"preset={data.preset!r} has no effect on variant={data.variant!r}, which names its own")


def _check_compile(recipe: Recipe):
    given = recipe.to_dict()
    for name in (
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("entropy_weight", "batch_entropy_weight", "remove_norms_from"),
    ):
        # what looks into a layer in every step would have it compiled anew in every step
        if given["compile_layers"] and given.get(name):
            raise UserError(f"compile_layers=True and {name}={given[name]} do not go together")


def _check_data(recipe: Recipe):
    """Raises UserError for data without a tokenizer or an end."""
    data, training = recipe.data, recipe.training
    if data.tokenizer is None and recipe.model.get("vocab_size", 0) < 258:
        raise UserError(
            "a recipe without a tokenizer trains one, and needs a vocab_size of at least 258 (256 bytes and 2 special "
            f"tokens), got {recipe.model.get('vocab_size')}"
        )
    if data.streaming and (data.tokenizer is None or training.get("max_steps", -1) < 0):
        raise UserError("streaming=True needs a tokenizer and max_steps: a stream's end is not known beforehand")


def _check_checkpoints(recipe: Recipe):
    """Raises UserError for checkpoints that could not be resumed exactly, or would not be there."""
    training = recipe.training
    save_steps, logging_steps = training.get("save_steps", 500), training.get("logging_steps", 500)
    if training.get("save_strategy", "steps") == "steps" and save_steps % logging_steps:
        # the loss summed since the last log is not part of a checkpoint
        raise UserError(
            f"save_steps must be a multiple of logging_steps, got save_steps={save_steps} and "
            f"logging_steps={logging_steps}"
        )
    for step in recipe.data.milestones or []:
        if step < 1 or step % save_steps:
            raise UserError(f"milestones must be multiples of save_steps={save_steps}, got {step}")


def _check_layer_optimizer(recipe: Recipe):
    """Refuses what would have no effect or cannot be had, and writes out Muon's defaults."""
    data, optim = recipe.data, recipe.training.get("optim", "adamw_torch")
    if recipe.layer_options and optim not in ("adamw_torch", "adamw_torch_fused"):
        name, value = list(recipe.layer_options.items())[-1]
        raise UserError(f"{name}={value} needs AdamW for what is no matrix of a layer, got optim={optim!r}")
    if data.layer_optimizer == "adamw":
        for name in ("muon_momentum", "muon_adjustment"):
            if getattr(data, name) is not None:
                raise UserError(f"{name}={getattr(data, name)} has no effect with layer_optimizer='adamw'")
        return
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"layer_optimizer='muon' needs torch 2.9 or newer, found {torch.__version__}")
    for name, value in MUON_DEFAULTS.items():
        if getattr(data, name) is None:
            setattr(data, name, value)
    if data.muon_momentum is not None and not 0 <= data.muon_momentum < 1:
        raise UserError(f"muon_momentum must be in [0, 1), got {data.muon_momentum}")


def _check_start(recipe: Recipe, values: dict[str, Any]):
    """Refuses what cannot be started from or trained, and writes out what follows from `START_FIELDS`."""
    data = recipe.data
    if data.trainable is not None:
        try:
            re.compile(data.trainable)
        except re.error as error:
            raise UserError(f"trainable={data.trainable!r} is no regular expression: {error}") from None
    if data.init_from is None:
        if data.variant is None:
            raise UserError("variant must be given unless init_from is")
        return
    if (Path(data.init_from) / "recipe.yaml").is_file() and (Path(data.init_from) / "model").is_dir():
        data.init_from = str(Path(data.init_from) / "model")
    check_model_id(data.init_from)
    given = sorted(recipe.model.keys() - set(DROPOUTS))
    if values.get("variant") is not None:
        given.insert(0, "variant")
    if given:
        raise UserError(
            f"{', '.join(given)} cannot be given with init_from: the model of {data.init_from} has its own"
        )
    data.variant = None
    data.tokenizer = data.tokenizer or data.init_from
