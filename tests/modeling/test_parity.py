"""The model against code that no one here wrote (GPT-2, GPT-NeoX), and a naive float64 forward."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from modeling_lnfree import (
    LNFreeForCausalLM,
)
from modeling_lnfree.configuration_lnfree import PROJECTIONS

from ..conftest import every_backbone, every_variant, greedy, random_ids, randomized, tiny_config, tiny_model
from .naive import naive_logits


def test_sm_ln_g_logits_and_generation_match_gpt2():
    theirs = randomized(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
        )
    )
    ours = tiny_model("SM+LN+G", biased_projections=list(PROJECTIONS))
    state = {}
    for name, tensor in theirs.transformer.state_dict().items():
        name = name.replace("wte.", "embed_tokens.").replace("wpe.", "embed_positions.").replace("ln_f.", "norm.")
        name = name.replace("h.", "layers.", 1) if name.startswith("h.") else name
        name = name.replace("ln_1", "input_layernorm").replace("ln_2", "post_attention_layernorm")
        name = (
            name.replace("attn.c_proj", "self_attn.o_proj")
            .replace("c_fc", "up_proj")
            .replace("mlp.c_proj", "mlp.down_proj")
        )
        tensor = tensor.T if "proj.weight" in name or "c_attn.weight" in name else tensor
        if "c_attn" in name:
            for part, projection in zip(tensor.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                state["model." + name.replace("attn.c_attn", f"self_attn.{projection}")] = part.contiguous()
        else:
            state["model." + name] = tensor.contiguous()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    ours.load_state_dict(state)
    input_ids = random_ids(2, 37)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, atol=1e-5, rtol=1e-5)
    assert greedy(ours, input_ids).equal(greedy(theirs, input_ids, eos_token_id=None))


def test_sm_ln_g_logits_and_generation_match_gpt_neox():
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    theirs = randomized(
        GPTNeoXForCausalLM(
            GPTNeoXConfig(**sizes, max_position_embeddings=64, rope_parameters=rope, bos_token_id=0, eos_token_id=0)
        )
    )
    ours = tiny_model("SM+LN+G", "pythia", biased_projections=list(PROJECTIONS))
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = (
            name.replace("gpt_neox.", "model.").replace("embed_out.", "lm_head.").replace("embed_in.", "embed_tokens.")
        )
        name = name.replace("final_layer_norm.", "norm.").replace("attention.dense", "self_attn.o_proj")
        name = name.replace("dense_h_to_4h", "up_proj").replace("dense_4h_to_h", "down_proj")
        if "query_key_value" in name:
            # (heads, q/k/v, head_dim, ...)
            for part, projection in zip(
                tensor.view(4, 3, 8, -1).unbind(1), ("q_proj", "k_proj", "v_proj"), strict=True
            ):
                part = part.reshape(32, -1) if name.endswith("weight") else part.flatten()
                state[name.replace("attention.query_key_value", f"self_attn.{projection}")] = part
        else:
            state[name] = tensor
    ours.load_state_dict(state)
    input_ids = random_ids(2, 37)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, atol=1e-5, rtol=1e-5)
    assert greedy(ours, input_ids).equal(greedy(theirs, input_ids, eos_token_id=None))


@every_variant
@every_backbone
def test_logits_match_a_naive_float64_forward(variant, backbone):
    slope = {"negative_slope": 0.3} if "LR-" in variant else {}
    model = tiny_model(variant, backbone, initializer_range=0.1, **slope)
    if model.config.slope_sharing == "layer":
        model.model.learned_slope.negative_slope.data = torch.tensor([0.3, -0.2, 0.7])
    input_ids = random_ids(2, 13)
    expected = naive_logits(model.config, model.double().state_dict(), input_ids)
    torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.float()(input_ids).logits.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["SM+G", "SM+R", "SM+LR-layer", "SM+LR-global", "SM+R-noLNf"])
@every_backbone
def test_ln_free_graph_has_no_norm_but_the_final_one(variant, backbone):
    model = tiny_model(variant, backbone)
    graph = torch.export.export(model, (random_ids(1, 8),), {"use_cache": False}).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    norms = [t for t in targets if any(word in t for word in ("norm", "rsqrt", "var", "std", "mean"))]
    assert len(norms) == (0 if variant.endswith("-noLNf") else 1), norms
    names = [name for name, _ in model.named_parameters() if "norm" in name]
    assert names == ([] if variant.endswith("-noLNf") else ["model.norm.weight", "model.norm.bias"])
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.model.layers.modules())


def test_ln_graph_has_two_norms_a_block_and_the_final_one():
    graph = torch.export.export(tiny_model("SM+LN+R"), (random_ids(1, 8),), {"use_cache": False}).graph
    assert sum("layer_norm" in str(node.target) for node in graph.nodes) == 2 * 3 + 1


@pytest.mark.parametrize("biased", [[], ["q_proj", "k_proj"], ["v_proj", "down_proj"], list(PROJECTIONS)], ids=len)
def test_what_has_no_bias_has_no_bias_parameter(biased):
    model = tiny_model("SM+R-noLNf", biased_projections=biased)
    found = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")}
    assert found == set(biased)


def test_global_slope_is_one_parameter_that_every_layer_moves():
    model = tiny_model("SM+LR-global")
    assert model.model.learned_slope.negative_slope.shape == (1,)
    input_ids = random_ids(2, 9)
    model(input_ids, labels=input_ids).loss.backward()
    together = model.model.learned_slope.negative_slope.grad.clone()
    layered = tiny_model("SM+LR-layer")
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name != "model.learned_slope.negative_slope"
    }
    layered.load_state_dict(
        {**state, "model.learned_slope.negative_slope": model.model.learned_slope.negative_slope.detach().repeat(3)}
    )
    layered(input_ids, labels=input_ids).loss.backward()
    assert layered.model.learned_slope.negative_slope.grad.abs().min() > 0
    torch.testing.assert_close(together, layered.model.learned_slope.negative_slope.grad.sum()[None])


@every_variant
@every_backbone
def test_initial_weights_follow_the_paper(variant, backbone):
    model = LNFreeForCausalLM(tiny_config(variant, backbone, hidden_size=128, vocab_size=1000, initializer_range=0.02))
    for name, parameter in model.named_parameters():
        if name.endswith("negative_slope"):
            assert (parameter == 0.01).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            # down_proj and o_proj too: no scaling of residual projections with depth
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize("sharing", ["layer", "global"])
def test_learned_slopes_start_at_the_given_one(sharing):
    model = LNFreeForCausalLM(tiny_config(f"SM+LR-{sharing}", negative_slope=0.25))
    assert (model.model.learned_slope.negative_slope == 0.25).all()
