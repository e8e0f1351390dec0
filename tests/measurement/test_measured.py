"""What is told of measured models, by results that are written by hand, and the stream's thresholds in closed form."""

import math

import pytest
import torch
from transformers import DynamicCache

from modeling_lnfree import measure, record_residual_stream
from modeling_lnfree.measurement import QUANTITIES
from modeling_lnfree.modeling_lnfree import CACHE_NAME
from modeling_lnfree.residual_stream import ResidualStreamRecord, find_outlier_gains
from training.measured import describe, notes, tabulate_measured
from training.tables import Table, to_text

from ..entropy.models import make_model
from .naive import TEXTS, make, make_tokenizer


def result(name: str, perplexity: float, **changes) -> dict:
    summary = {**dict.fromkeys((quantity.name for quantity in QUANTITIES), 1.0), "perplexity": perplexity}
    entropy = {"mean_entropy": 1.25, "layer_entropy": [1.0, 1.5], "head_distribution": [0.25, 0.0, 0.5, 0.25]}
    return {
        **{"model": name, "revision": None, "dataset": "texts", "summary": summary, "parameters": 1000},
        **{"num_texts": 7, "skipped_texts": 2, "truncated_texts": 3, "max_length": 16, "num_tokens": 99},
        **{"perplexity": perplexity, "predicted_tokens": 90, "bits_per_byte": 2.5, "attention_entropy": entropy},
        **{"interrupted": False, "unmeasured": ["the stream, by no list of layers"], **changes},
    }


def test_differences_are_to_the_first_model():
    table = tabulate_measured([result("a", 10.0), result("b", 30.0), result("c", 6.5)])
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["perplexity"] == ["10.000", "30.000 (+20.000)", "6.500 (-3.500)"]
    assert rows["parameters"] == ["1,000", "1,000 (+0)", "1,000 (+0)"]


def test_what_a_model_does_not_have_has_no_difference():
    first, second = result("a", 3.0), result("b", 3.0)
    second["summary"]["outlier_gains"] = math.nan
    rows = {row[0]: row[1:] for row in tabulate_measured([first, second]).rows}
    assert rows["outlier gains in most norms (3 sigma)"] == ["1", "nan"]
    assert rows["perplexity"] == ["3.000", "3.000 (+0.000)"]


def test_what_was_left_out_is_told_by_its_own_number():
    told = describe(result("a", 10.0, interrupted=True)).splitlines()
    assert told[0] == "a on 7 texts of texts: perplexity 10.000 over 90 tokens, 2.5000 bits per byte"
    assert told[1].endswith("1.250 nats; by layer 1.00, 1.50; heads in the quarters of their largest entropy: "
                            "25 %, 0 %, 50 %, 25 %")  # fmt: skip
    assert told[2:] == notes(result("a", 10.0, interrupted=True)) == [
        "interrupted: what was read until then, 99 tokens, is measured",
        "3 of 9 texts are longer than max_length=16 tokens: the rest of them is left out; --stride and --rolling read "
        "on",
        "2 of 9 texts are without a token: left out",
        "not measured: the stream, by no list of layers",
    ]  # fmt: skip


def test_columns_of_numbers_are_set_to_the_right():
    assert to_text([Table(["", "one"], [["a", "1"], ["long", "100"]])]) == "      one\na       1\nlong  100"


def one_hot(size: int, value: float = 1.0, place: int = 0) -> torch.Tensor:
    states = torch.full((1, 1, size), 100.0, dtype=torch.float64)
    states[0, 0, place] += value
    return states


@pytest.mark.parametrize("value", [2.0, -2.0])
def test_an_outlier_is_more_than_6_deviations_from_the_mean(value):
    # of n entries, one that differs is sqrt(n - 1) deviations away
    record = ResidualStreamRecord(1)
    record.add(0, one_hot(36, value), None)
    assert record.outlier_dimensions == [[]]
    record = ResidualStreamRecord(2)
    record.add(0, one_hot(38, value), None)
    record.add(1, one_hot(38, 3 * value, 5), None)
    assert record.outlier_dimensions == [[0], [5]]
    # of all layers together, and the largest of any layer
    found = measure(make("gpt2"), ["abc"], tokenizer=make_tokenizer())
    found.stream = ResidualStreamRecord(2)
    found.stream.add(0, one_hot(38, 3 * value, 5), None)
    found.stream.add(1, one_hot(38, value) / 10, None)
    assert found.summary["outlier_dimensions"] == 2
    assert found.summary["infinity_norm"] == found.stream.infinity_norm[0] > found.stream.infinity_norm[1]


def test_moments_of_a_stream_far_from_0_are_exact():
    states = 300 + torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    record = ResidualStreamRecord(1)
    record.add(0, states, None)
    away = states.double() - states.double().mean()
    expected = (away**4).mean() / (away**2).mean() ** 2
    assert record.pearson_kurtosis.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("size", "found"), [(8, 0), (12, 1)])
def test_an_outlier_gain_is_more_than_3_deviations_from_the_mean(size, found):
    model = make_model("llama", hidden_size=size)
    with torch.no_grad():
        model.model.norm.weight[1] = -1.0
    assert len(find_outlier_gains(model)["norm"]) == found


def test_gains_in_half_of_the_norms_are_not_in_most():
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[3] = model.transformer.h[0].ln_2.weight[3] = 9.0
        model.transformer.ln_f = torch.nn.Identity()
    assert len(find_outlier_gains(model)) == 4
    assert measure(model, ["abc"], tokenizer=make_tokenizer()).summary["outlier_gains"] == 0


def test_stream_with_a_cache_is_that_without():
    model, input_ids = make_model("gpt2"), torch.randint(1, 61, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), record_residual_stream(model) as whole:
        model(input_ids, attention_mask=mask, position_ids=positions)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), record_residual_stream(model) as parts:
        for part in (slice(0, 6), slice(6, 9)):
            told = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            model(input_ids[:, part], **told, **{CACHE_NAME: cache})
    for name in ("norm", "infinity_norm", "pearson_kurtosis", "neuron_kurtosis"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=1e-4)


def test_a_model_without_a_list_of_its_layers_is_measured_but_for_the_stream():
    model = make("gpt2")
    model.config.num_hidden_layers = 3
    found = measure(model, TEXTS, tokenizer=make_tokenizer())
    assert found.stream is None and math.isnan(found.summary["stream_norm"]) and math.isfinite(found.nll)
    [note] = found.to_dict()["unmeasured"]
    assert note == "the residual stream, as GPT2LMHeadModel has no list of its 3 layers"


def test_loss_of_a_model_in_bfloat16_is_of_float32_logits():
    model, tokenizer = make("SM+R").bfloat16(), make_tokenizer()
    found = measure(model, TEXTS, tokenizer=tokenizer, batch_size=1)
    total, number = 0.0, 0
    for token_ids in tokenizer(TEXTS)["input_ids"]:
        with torch.no_grad():
            log_probs = model(torch.tensor([token_ids])).logits[0, :-1].double().log_softmax(-1)
        total -= log_probs.gather(-1, torch.tensor(token_ids[1:], dtype=torch.long)[:, None]).sum().item()
        number += len(token_ids) - 1
    assert found.nll == pytest.approx(total / number, rel=1e-6)


def test_a_token_just_past_the_vocabulary_is_named():
    # the last letter is token 60, and predicted alone
    model = make_model("gpt2", vocab_size=60)
    with pytest.raises(ValueError, match="the tokenizer gives token 60, and the model knows 60"):
        measure(model, ["ab8"], tokenizer=make_tokenizer())
    assert measure(model, ["ab7"], tokenizer=make_tokenizer()).predicted_tokens == 2
