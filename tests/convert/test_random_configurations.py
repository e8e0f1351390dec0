"""Llamas, Mistrals, Qwens of configurations drawn at random: imported, generating, and back, as transformers' own."""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_lnfree import LNFreeForCausalLM
from training.convert.convert import convert

from ..conftest import random_ids
from .test_convert import random_weights


# and what only its configurations have; Mistral has no biases, Qwen2 always those of queries, keys and values
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, ("head_dim", "attention_bias", "mlp_bias")),
    "mistral": (MistralConfig, MistralForCausalLM, ("head_dim",)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, ()),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, ("head_dim", "attention_bias")),
}
ROPE = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


def rope(kind: str, choose: random.Random, positions: int, head_dim: int) -> dict:
    original = {"original_max_position_embeddings": positions // 2}
    factors = {name: [1 + choose.random() for _ in range(head_dim // 2)] for name in ("short_factor", "long_factor")}
    options = {
        "linear": {"factor": choose.choice([2.0, 3.5])},
        "dynamic": {"factor": 2.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": choose.choice([3.0, 4.0]), **original},
        "yarn": {"factor": choose.choice([2.0, 4.0]), **original},
        "longrope": {**factors, "factor": 2.0, **original},
    }
    return {"rope_type": kind, "rope_theta": choose.choice([500.0, 10000.0]), **options.get(kind, {})}


def draw(kind: str, choose: random.Random) -> dict:
    heads, width = choose.choice([1, 2, 3, 4]), choose.choice([6, 8, 10])
    positions = choose.choice([24, 48])
    optional = {
        "head_dim": choose.choice([width, 4, 12]),
        "attention_bias": choose.random() < 0.5,
        "mlp_bias": choose.random() < 0.5,
    }
    fields = {name: optional[name] for name in CLASSES[kind][2]}
    return {
        **{"vocab_size": choose.randint(60, 120), "hidden_size": heads * width, "num_attention_heads": heads},
        **{"num_key_value_heads": choose.choice([n for n in (1, 2, 3, 4) if heads % n == 0])},
        **{"intermediate_size": choose.randint(20, 70), "num_hidden_layers": choose.randint(1, 3)},
        **{"max_position_embeddings": positions, "rms_norm_eps": choose.choice([1e-6, 1e-5, 1e-2])},
        **{"hidden_act": choose.choice(["silu", "silu", "gelu", "relu", "gelu_pytorch_tanh"])},
        **{"tie_word_embeddings": choose.random() < 0.5, "bos_token_id": None, "eos_token_id": None},
        **({"sliding_window": None} if kind == "mistral" else {}),
        **{"rope_parameters": rope(choose.choice(ROPE), choose, positions, fields.get("head_dim", width))},
        **fields,
    }


def ours_and_theirs_agree(kind: str, seed: int, tmp_path):
    fields = draw(kind, random.Random(f"{kind} {seed}"))
    config_class, model_class, _ = CLASSES[kind]
    random_weights(model_class(config_class(**fields))).save_pretrained(tmp_path / "stock")
    ours = LNFreeForCausalLM.from_pretrained(convert(tmp_path / "stock", tmp_path / "ours")).eval()
    assert ours.config.backbone == "llama"
    back = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "ours", tmp_path / "back", to_stock=True)).eval()
    # Qwen2's biases need not be Qwen2's own class: with heads of another width it is Llama that has them
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}
    positions, vocab_size = fields["max_position_embeddings"], fields["vocab_size"]
    for length in (7, positions - 3, positions + 9):
        # frequencies that grow with the length stay behind in transformers' models
        theirs = model_class.from_pretrained(tmp_path / "stock").eval()
        input_ids = random_ids(2, length, vocab_size=vocab_size)
        with torch.no_grad():
            expected = theirs(input_ids).logits
            for model in (ours, back):
                torch.testing.assert_close(
                    model(input_ids).logits, expected, atol=1e-5, rtol=1e-5, msg=fields_of(fields)
                )
        theirs = model_class.from_pretrained(tmp_path / "stock").eval()
        assert ours.generate(input_ids, **options).equal(theirs.generate(input_ids, **options)), fields


def fields_of(fields: dict):
    return lambda message: f"{fields}: {message}"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", CLASSES)
def test_a_random_configuration_goes_there_and_back(kind, seed, tmp_path):
    ours_and_theirs_agree(kind, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 26))
@pytest.mark.parametrize("kind", CLASSES)
def test_many_random_configurations_go_there_and_back(kind, seed, tmp_path):
    ours_and_theirs_agree(kind, seed, tmp_path)
