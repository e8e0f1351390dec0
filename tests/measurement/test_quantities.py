"""`modeling_lnfree.measure` against float64 by definition, on six families and on ours."""

import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from modeling_lnfree import measure, record_residual_stream
from modeling_lnfree.likelihood import Reading
from modeling_lnfree.measurement import QUANTITIES
from modeling_lnfree.residual_stream import find_outlier_gains

from ..conftest import byte_tokenizer
from ..entropy.models import make_batch, make_model, make_uneven_llama
from .naive import TEXTS, by_definition, make, make_tokenizer


MODELS = [
    *("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "mistral", "opt"),
    *("SM+LN+G", "SM+R", "SAS", "Gated", "PeriLN", "QKNorm", "SoftCap", "Clipped", "all at once"),
]
HEADS = ("entropy", "max_logit", "sink_share", "spectral_gap")
LAYERS = ("norm", "infinity_norm", "pearson_kurtosis", "neuron_kurtosis", "cosine")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("name", MODELS)
def test_every_quantity_matches_its_definition(name, tokenizer):
    model = make(name)
    with torch.no_grad():
        # an outlier dimension, at some tokens
        model.get_input_embeddings().weight[tokenizer("a")["input_ids"][0], 3] += 60.0
    sequences = tokenizer(TEXTS)["input_ids"]
    expected = by_definition(model, sequences)
    for batch_size in (2, 5) if name in ("gpt2", "SAS") else (2,):
        found = measure(model, TEXTS, tokenizer=tokenizer, batch_size=batch_size)
        assert found.nll == pytest.approx(expected["nll"].mean().item(), rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(found.nll))
        for quantity in HEADS:
            values = getattr(found.attention, quantity).double()
            torch.testing.assert_close(values, expected[quantity], atol=5e-5, rtol=1e-5, msg=quantity)
        for quantity in LAYERS:
            assert getattr(found.stream, quantity).tolist() == pytest.approx(expected[quantity], rel=2e-4), quantity
        assert found.stream.outlier_dimensions == expected["outlier_dimensions"]
        assert found.attention.unmeasured == [] and found.num_tokens == sum(map(len, sequences))
    if name in ("gpt2", "SM+R"):
        assert 3 in found.stream.outlier_dimensions[0]


def test_bits_per_byte_are_by_the_bytes_of_the_text_whatever_the_tokenizer(tokenizer):
    model = make("llama")
    found = measure(model, TEXTS, tokenizer=tokenizer)
    nll = by_definition(model, tokenizer(TEXTS)["input_ids"])["nll"]
    assert found.num_bytes == len("".join(TEXTS))
    assert found.bits_per_byte == pytest.approx(nll.sum().item() / math.log(2) / found.num_bytes, rel=1e-5)
    # of a text that is cut, the part that was read
    cut = measure(model, TEXTS, tokenizer=tokenizer, max_length=4)
    assert cut.num_bytes == sum(min(len(text), 4) for text in TEXTS) and cut.truncated_texts == 3


def test_bytes_of_a_text_that_is_cut_within_a_character_are_those_that_were_read():
    text = "é€ 😀😀a" * 3
    ((token_ids, bytes_until),) = Reading(byte_tokenizer(), 8).encode([text])
    # one token a byte
    assert len(token_ids) == len(text.encode())
    assert [bytes_until(number) for number in range(1, len(token_ids) + 1)] == list(range(1, len(token_ids) + 1))


def test_special_tokens_have_no_bytes(tokenizer):
    framed = make_tokenizer(bos_token="a", eos_token="b")
    framed.backend_tokenizer.post_processor = TemplateProcessing(single="a $A b", special_tokens=[("a", 0), ("b", 1)])
    assert framed("cd")["input_ids"] == [0, 2, 3, 1]
    found = measure(make("llama"), ["cd", "cdefgh"], tokenizer=framed)
    assert (found.num_tokens, found.num_bytes) == (12, 8)
    cut = measure(make("llama"), ["cd", "cdefgh"], tokenizer=framed, max_length=3)
    assert (cut.num_tokens, cut.num_bytes, cut.truncated_texts) == (6, 4, 2)


def test_result_is_one_object_with_numbers_for_tables_and_for_json(tokenizer):
    model = make("SM+LN+G")
    found = measure(model, TEXTS, tokenizer=tokenizer)
    assert list(found.summary) == [quantity.name for quantity in QUANTITIES]
    assert found.summary["max_logit"] == pytest.approx(found.attention.max_logit.max().item())
    assert found.summary["cosine"] == pytest.approx(found.stream.cosine.max().item())
    plain = found.to_dict()
    assert plain["summary"] == found.summary and plain["unmeasured"] == []
    assert plain["sink_share"] == found.attention.sink_share.tolist()
    assert plain["residual_stream"]["norm"] == found.stream.norm.tolist()
    assert f"perplexity: {found.perplexity:,.3f}" in str(found)


def test_a_model_by_its_folder_is_loaded_as_asked(tokenizer, tmp_path):
    model = make("gpt2")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = {dtype: measure(str(tmp_path), TEXTS, dtype=dtype, device="cpu") for dtype in (None, "bfloat16")}
    assert found[None].nll == pytest.approx(measure(model, TEXTS, tokenizer=tokenizer).nll, rel=1e-6)
    half = measure(model.bfloat16(), TEXTS, tokenizer=tokenizer)
    assert found[None].nll != found["bfloat16"].nll == pytest.approx(half.nll, rel=5e-3)


def test_layers_of_different_heads_have_rows_of_their_own_length(tokenizer):
    model = make_uneven_llama()
    plain = measure(model, TEXTS, tokenizer=tokenizer).to_dict()
    for name in ("max_logit", "sink_share", "spectral_gap"):
        assert [len(row) for row in plain[name]] == [4, 2]
    assert plain["summary"]["sink_share"] == pytest.approx(sum(map(sum, plain["sink_share"])) / 6)
    assert plain["summary"]["max_logit"] == max(map(max, plain["max_logit"]))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_no_part_of_the_stream(padding):
    model, batch = make_model("gpt2"), make_batch(padding)
    with record_residual_stream(model) as padded, torch.no_grad():
        model(**batch)
    with record_residual_stream(model) as alone, torch.no_grad():
        for token_ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            positions = torch.arange(13)[mask][None]
            model(token_ids[mask][None], position_ids=None if padding == "right" else positions)
    for name in LAYERS:
        torch.testing.assert_close(getattr(padded, name), getattr(alone, name), atol=1e-5, rtol=1e-4, msg=name)


def test_outlier_gains_are_those_far_from_the_mean_of_their_norm():
    model = make_model("llama", hidden_size=32)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 9.0
        model.model.layers[1].post_attention_layernorm.weight[[5, 7]] = -9.0
        model.model.norm.weight[5] = 4.0
    found = find_outlier_gains(model)
    assert len(found) == 5
    assert {name: dimensions for name, dimensions in found.items() if dimensions} == {
        "layers.0.input_layernorm": [5],
        "layers.1.post_attention_layernorm": [5, 7],
        "norm": [5],
    }
    assert measure(model, ["abc"], tokenizer=make_tokenizer()).summary["outlier_gains"] == 1
    assert find_outlier_gains(make("SM+R-noLNf")) == {}


def test_a_model_in_training_is_measured_without_dropout_and_left_as_it_was(tokenizer):
    model = make("gpt2").train()
    model.transformer.h[1].eval()
    found = measure(model, TEXTS, tokenizer=tokenizer)
    assert model.training and not model.transformer.h[1].training
    assert found.nll == measure(model.eval(), TEXTS, tokenizer=tokenizer).nll
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "texts", "options", "message"),
    [
        ("bert", TEXTS, {}, "BertLMHeadModel is no causal language model"),
        ("gpt2", ["a", ""], {}, "no text of two tokens was read"),
        ("gpt2", TEXTS, {"stride": 0}, "stride must be in 1 to 64, the length of a window, got 0"),
        ("gpt2", TEXTS, {"stride": 9, "max_length": 8}, "stride must be in 1 to 8, the length of a window, got 9"),
        ("gpt2", TEXTS, {"stride": 4, "rolling": True}, "choose one"),
        ("gpt2", TEXTS, {"rolling": True}, "rolling needs a tokenizer with a token that begins or ends a text"),
        ("gpt2", TEXTS, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("gpt2", TEXTS, {"tokenizer": None}, "a model at hand needs tokenizer= beside it"),
        ("gpt2", TEXTS, {"int8_clip": 1.5}, "clip must be a quantile above 0 and at most 1, got 1.5"),
    ],
)
def test_what_cannot_be_measured_is_one_error(name, texts, options, message, tokenizer):
    model = make(name)
    if name == "bert":
        model = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match=message):
        measure(model, texts, **{"tokenizer": tokenizer, **options})


def test_a_broken_stream_has_no_number_of_outliers(tokenizer):
    model = make("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    summary = measure(model, TEXTS[:2], tokenizer=tokenizer).summary
    assert all(math.isnan(summary[name]) for name in ("stream_norm", "infinity_norm", "outlier_dimensions"))
