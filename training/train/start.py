"""The model that a run starts with: random weights, or those of another model, and which of them are trained."""

import re
from types import MethodType

import torch
from transformers import PreTrainedTokenizerBase

from modeling_lnfree import LNFreeForCausalLM, use_fast_cpu, use_fused_loss

from ..convert.convert import load_in_family
from ..errors import UserError, one_line
from ..parametrization import parametrize_weights
from ..recipe import DROPOUTS, Recipe
from .norm_removal import wrap_norms


def load_parent(recipe: Recipe) -> LNFreeForCausalLM | None:
    """
    The model that the recipe starts from, None where it starts from random weights.

    Raises:
        UserError: for a model that cannot be had, that is shorter than the recipe's blocks, or of which nothing is to
            be trained; and for an attention implementation that the model cannot have, also if there is no parent.
    """
    if recipe.data.init_from is None:
        # without weights: what cannot be had is told before the data
        with torch.device("meta"):
            choose_attention(LNFreeForCausalLM(recipe.build_config()), recipe)
        return None
    parent = load_in_family(recipe.data.init_from)
    choose_attention(parent, recipe)
    if recipe.data.block_size > parent.config.max_position_embeddings:
        raise UserError(
            f"block_size={recipe.data.block_size} is longer than the max_position_embeddings="
            f"{parent.config.max_position_embeddings} of {recipe.data.init_from}"
        )
    choose_trainable(parent, recipe)
    return parent


def start_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, vocab_size: int, parent: LNFreeForCausalLM | None
) -> LNFreeForCausalLM:
    """The model in which training begins, of random weights unless there is a parent."""
    if parent is None:
        model = LNFreeForCausalLM(
            recipe.build_config(
                vocab_size=vocab_size,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    else:
        config = parent.config
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"tokenizer={recipe.data.tokenizer} has {len(tokenizer)} tokens, {recipe.data.init_from} knows "
                f"{config.vocab_size}"
            )
        for name in DROPOUTS:
            if name in recipe.model:
                setattr(config, name, recipe.model[name])
        model = LNFreeForCausalLM(config)
        model.load_state_dict(parent.state_dict())
        model.generation_config = parent.generation_config
    choose_trainable(model, recipe)
    if recipe.data.remove_norms_from is not None:
        wrap_norms(model, recipe.data.keep_final_norm, recipe.data.remove_norms_skip_first)
    choose_attention(model, recipe)
    # before the layers get classes of their own
    use_fast_cpu(model)
    if takes_fused_loss(recipe):
        use_fused_loss(model)
    if recipe.data.weight_parametrization is not None:
        parametrize_weights(
            model,
            recipe.data.weight_parametrization,
            recipe.data.parametrized_projections,
            recipe.data.parametrization_gain_init,
        )
    if recipe.data.compile_layers:
        compile_layers(model)
    elif recipe.training.get("torch_compile"):
        flatten_mlps(model)
    return model


def compile_layers(model: LNFreeForCausalLM):
    """`torch.compile` of each layer by itself."""
    flatten_mlps(model)
    for layer in model.model.layers:
        layer.compile()


def flatten_mlps(model: LNFreeForCausalLM):
    """
    Makes the feed-forward layers see tokens in one dimension while they are compiled: with batch and time apart,
    torch's partitioner keeps a mask of ReLU's signs for the backward pass, beside the activations that tell them.
    """
    for layer in model.model.layers:
        layer.mlp.forward = MethodType(_forward_flat, layer.mlp)  # type: ignore[union-attr]  # a module has one


def _forward_flat(self, hidden_states: torch.Tensor, *negative_slope: torch.Tensor) -> torch.Tensor:
    forward = type(self).forward
    if not torch.compiler.is_compiling():
        return forward(self, hidden_states, *negative_slope)
    return forward(self, hidden_states.flatten(0, -2), *negative_slope).unflatten(0, hidden_states.shape[:-1])


def takes_fused_loss(recipe: Recipe) -> bool:
    """What the recipe says, or whether training is on an accelerator."""
    on_cpu = recipe.training.get("use_cpu", not torch.accelerator.is_available())
    return not on_cpu if recipe.data.fused_loss is None else recipe.data.fused_loss


def choose_attention(model: LNFreeForCausalLM, recipe: Recipe):
    """Raises UserError for an attention implementation that is not known, not installed or not exact for the model."""
    if recipe.data.attn_implementation is not None:
        try:
            model.set_attn_implementation(recipe.data.attn_implementation)
        except (ValueError, ImportError) as error:
            raise UserError(f"attn_implementation={recipe.data.attn_implementation!r}: {one_line(error)}") from error


def choose_trainable(model: LNFreeForCausalLM, recipe: Recipe):
    """
    Lets the parameters alone be trained that the recipe's `trainable` names.

    Raises:
        UserError: if the model has none of them.
    """
    trainable, name = recipe.data.trainable, recipe.data.init_from or model.config.variant
    if trainable is None:
        return
    pattern = trainable
    if trainable == "norms":
        if model.config.norm_type == "none":
            raise UserError(
                f"trainable='norms': {name} ({model.config.variant}) has no norms in its layers; a regular expression "
                "over the names of its parameters trains others"
            )
        pattern = r"norm\."
    chosen = [parameter for key, parameter in model.named_parameters() if re.search(pattern, key)]
    if not chosen:
        names = ", ".join(key for key, _ in list(model.named_parameters())[:3])
        raise UserError(f"trainable={trainable!r} is found in no parameter of {name}; they are {names}, ...")
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
