"""The Llama backbone against transformers' own Llama: logits, greedy generation, scaled rotary positions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM

from ..conftest import greedy, random_ids, randomized


SIZES = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    "max_position_embeddings": 32,
}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 8, "rope_theta": 10000.0},
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0},
    "longrope": {
        **{"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]},
        **{"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    },
}


def both(fields: dict) -> tuple[LNFreeForCausalLM, LlamaForCausalLM]:
    """The same weights in both; Llama's names are ours."""
    stock = randomized(LlamaForCausalLM(LlamaConfig(rms_norm_eps=1e-5, **{**SIZES, **fields})))
    ours = LNFreeForCausalLM(LNFreeConfig.from_variant("SM+RMS+S", "llama", **SIZES, **fields)).eval()
    assert ours.config.backbone == "llama" and ours.config.variant == "SM+RMS+S"
    ours.load_state_dict(stock.state_dict())
    return ours, stock


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "head_dim": 16}, {"tie_word_embeddings": True}],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_and_generation_match_llama(fields, implementation):
    ours, stock = both(fields)
    input_ids = random_ids(2, 17)
    for model in (ours, stock):
        model.set_attn_implementation(implementation)
    torch.testing.assert_close(ours(input_ids).logits, stock(input_ids).logits, atol=1e-5, rtol=1e-5)
    assert greedy(ours, input_ids).equal(greedy(stock, input_ids, eos_token_id=None))


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("length", [12, 40], ids=["short", "past the length"])
def test_scaled_rotary_positions_match_llama(rope, length):
    ours, stock = both({"rope_parameters": ROPE[rope]})
    input_ids = random_ids(2, length)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids).logits, stock(input_ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rope", ROPE)
def test_scaled_rotary_models_are_loaded_whole(rope, tmp_path):
    ours, _ = both({"rope_parameters": ROPE[rope]})
    ours.save_pretrained(tmp_path)
    loaded, input_ids = LNFreeForCausalLM.from_pretrained(tmp_path), random_ids(2, 12)
    assert loaded(input_ids).logits.equal(ours(input_ids).logits)


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_scaled_rotary_models_compile(rope):
    ours, _ = both({"rope_parameters": ROPE[rope]})
    input_ids = random_ids(2, 12)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(input_ids, use_cache=False).logits
    torch.testing.assert_close(compiled, ours(input_ids).logits, atol=1e-5, rtol=1e-5)
