"""Models that turn a whole batch by other frequencies once one text is long: every text counts as if read alone."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_lnfree.metrics.attention_entropy.attention_entropy import AttentionEntropy
from training.measure import measure

from ..conftest import byte_tokenizer


TEXTS = ["a short text", "a text of more tokens than the model was first trained on", "short", "x" * 16, "y" * 17]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={**rope, "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]},
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def alone(model, tokenizer):
    """Mean entropy `(layers, heads)` and perplexity, of one pass a text."""
    entropies, likelihoods = [], []
    for text in TEXTS:
        input_ids = torch.tensor([tokenizer(text)["input_ids"]])
        output = model(input_ids, output_attentions=True, use_cache=False)
        entropies.append(torch.special.entr(torch.stack(output.attentions)[:, 0].double()).sum(-1))
        likelihoods.append(output.logits[0, :-1].double().log_softmax(-1).gather(1, input_ids[0, 1:, None]))
    return torch.cat(entropies, -1).mean(-1), math.exp(-torch.cat(likelihoods).mean())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_changes_nothing(model, batch_size, tmp_path):
    tokenizer = byte_tokenizer()
    expected, perplexity = alone(model, tokenizer)
    metric = AttentionEntropy(cache_dir=str(tmp_path))
    result = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, batch_size=batch_size)
    torch.testing.assert_close(torch.tensor(result["entropy"], dtype=torch.float64), expected, atol=2e-5, rtol=0)

    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    texts = {"dataset": str(tmp_path / "texts.txt"), "text_column": "text", "split": "train"}
    # and more samples than there are change nothing
    measured = measure(str(tmp_path / "model"), **texts, batch_size=batch_size, max_samples=9)
    assert measured["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    entropy = torch.tensor(measured["attention_entropy"]["entropy"], dtype=torch.float64)
    torch.testing.assert_close(entropy, expected, atol=2e-5, rtol=0)
