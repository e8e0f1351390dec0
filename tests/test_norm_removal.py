"""Norms taken out while a model is fine-tuned: the wrapped model, its schedule, and what is folded at the end."""

import pytest
import torch

from modeling_lnfree import LNFreeForCausalLM
from training.errors import UserError
from training.train.norm_removal import (
    RemovableNorm,
    Removal,
    fold,
    plan_removals,
    wrap_norms,
)

from .conftest import every_backbone, random_ids, tiny_model


def removed(model: LNFreeForCausalLM, removals: list[Removal], constant: float = 1.7) -> LNFreeForCausalLM:
    """The wrapped model with these parts gone, each for a constant of its own."""
    for index, removal in enumerate(removals):
        norm = model.get_submodule(removal.name)
        norm.share[removal.part], norm.deviation[removal.part] = 0.0, constant + 0.3 * index
    return model


def naive_logits(model: LNFreeForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """The wrapped model by its definition, in float64, from its parameters and constants alone."""
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def norm(states, name, part=0):
        states = states - states.mean(-1, keepdim=True)
        deviation = (states.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        constant = state[f"{name}.deviation"][part]
        share = state[f"{name}.share"][part]
        scaled = states / deviation if share == 1 else states / constant
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(states, name):
        return states @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def rotate(states):
        if config.position_embedding_type != "rotary":
            return states
        size = config.rotary_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
        angles = torch.arange(states.shape[2], dtype=torch.float64)[:, None] / config.rope_theta**exponents
        angles = torch.cat([angles, angles], -1)
        turned, left = states[..., :size], states[..., size:]
        half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
        return torch.cat([turned * angles.cos() + half * angles.sin(), left], -1)

    states = state["model.embed_tokens.weight"][input_ids]
    if config.position_embedding_type == "learned":
        states = states + state["model.embed_positions.weight"][: input_ids.shape[1]]
    mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"

        def attention(x, layer=layer):
            query_key, value = (norm(x, f"{layer}.input_layernorm", part) for part in (0, 1))
            q, k, v = (
                linear(read, f"{layer}.self_attn.{name}_proj").unflatten(-1, (heads, width)).transpose(1, 2)
                for name, read in (("q", query_key), ("k", query_key), ("v", value))
            )
            scores = (rotate(q) @ rotate(k).mT / width**0.5).masked_fill(~mask, -torch.inf)
            return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")

        def mlp(x, layer=layer):
            x = linear(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.up_proj")
            return linear(x.relu(), f"{layer}.mlp.down_proj")

        if config.parallel_residual:
            states = states + attention(states) + mlp(states)
        else:
            states = states + attention(states)
            states = states + mlp(states)
    final = norm(states, "model.norm") if "model.norm.share" in state else states
    return final @ state["lm_head.weight"].T


def wrapped(backbone: str, **fields) -> LNFreeForCausalLM:
    torch.manual_seed(3)
    model = tiny_model("SM+LN+R", backbone, **fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return wrap_norms(model, keep_final_norm=False)


@every_backbone
def test_before_the_first_removal_logits_are_the_originals(backbone):
    torch.manual_seed(3)
    model = tiny_model("SM+LN+R", backbone).eval()
    input_ids = random_ids(2, 11)
    expected = model(input_ids).logits
    torch.testing.assert_close(wrap_norms(model, keep_final_norm=False)(input_ids).logits, expected, atol=1e-5, rtol=0)


@every_backbone
def test_after_each_removal_the_model_equals_a_naive_computation(backbone):
    model = wrapped(backbone)
    removals = [removal for _, removal in plan_removals(model.config.num_hidden_layers, 1, [1, 1, 1, 1], False)]
    assert len(removals) == 3 * model.config.num_hidden_layers + 1
    input_ids = random_ids(2, 9)
    seen = []
    for number in range(len(removals) + 1):
        logits = removed(model, removals[:number])(input_ids).logits.double()
        torch.testing.assert_close(logits, naive_logits(model, input_ids), atol=1e-4, rtol=1e-4)
        seen.append(logits)
    # each removal changes something
    assert all((after - before).abs().max() > 1e-3 for before, after in zip(seen, seen[1:], strict=False))


@every_backbone
@pytest.mark.parametrize("keep", [False, True], ids=["all", "but-the-final"])
def test_folded_model_equals_the_wrapped_one(backbone, keep):
    torch.manual_seed(3)
    model = wrapped(backbone) if not keep else None
    if keep:
        model = wrap_norms(tiny_model("SM+LN+R", backbone).eval(), keep_final_norm=True)
    layers = model.config.num_hidden_layers
    removed(model, [removal for _, removal in plan_removals(layers, 1, [1, 1, 1, 1], keep)])
    input_ids = random_ids(2, 9)
    expected = model(input_ids).logits
    folded = fold(model)
    assert folded.config.variant == ("SM+R" if keep else "SM+R-noLNf")
    kinds = [type(module) for module in folded.modules()]
    assert kinds.count(torch.nn.LayerNorm) == int(keep) and RemovableNorm not in kinds
    torch.testing.assert_close(folded(input_ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert folded.half()(input_ids).logits.isfinite().all()


def test_a_model_of_constant_deviations_loses_nothing():
    """One token, one position, and weights of 0: every stream has the same deviation, which the running mean finds."""
    model = wrapped("gpt2", embedding_dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    input_ids = torch.full((2, 1), 7)
    expected = model(input_ids).logits
    model.train()
    model(input_ids)
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, RemovableNorm)]
    for norm in norms:
        norm.end_step()
        norm.share.zero_()
    torch.testing.assert_close(fold(model)(input_ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_running_mean_is_over_all_tokens_of_a_step_and_stands_still_once_removed():
    norm = RemovableNorm(torch.nn.LayerNorm(8), skip_first=True).train()
    streams = torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    deviations = (streams.double().var(-1, unbiased=False) + 1e-5).sqrt()[..., 1:]  # position 0 is left out
    means = [deviations[:2].mean(), deviations[2].mean()]
    norm(streams[0]), norm(streams[1]), norm.end_step()
    torch.testing.assert_close(norm.deviation.double(), means[0][None], atol=1e-6, rtol=0)
    norm(streams[2]), norm.end_step()
    after = 0.9 * means[0] + 0.1 * means[1]
    torch.testing.assert_close(norm.deviation.double(), after[None], atol=1e-6, rtol=0)
    norm.share.zero_()
    norm(100 * streams[2]), norm.end_step()
    torch.testing.assert_close(norm.deviation.double(), after[None], atol=1e-6, rtol=0)
    norm.eval()
    norm(streams[0])
    assert norm.seen.tolist() == [0, 0]


def test_removals_go_in_the_published_order():
    planned = plan_removals(2, 20, [2, 2, 3, 4], keep_final_norm=False)
    assert [(step, removal.name.removeprefix("model."), removal.part) for step, removal in planned] == [
        (20, "layers.0.post_attention_layernorm", 0),
        (22, "layers.1.post_attention_layernorm", 0),
        (24, "layers.0.input_layernorm", 0),
        (26, "layers.1.input_layernorm", 0),
        (29, "layers.0.input_layernorm", 1),
        (32, "layers.1.input_layernorm", 1),
        (36, "norm", 0),
    ]
    assert len(plan_removals(2, 20, [2, 2, 3, 4], keep_final_norm=True)) == 6


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(UserError, match="norm_type='none'"):
        wrap_norms(tiny_model("SM+R"), keep_final_norm=False)
    with pytest.raises(UserError, match="layers.1.input_layernorm.*not removed"):
        fold(wrapped("gpt2"))
