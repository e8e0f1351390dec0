"""Simulated fixed point against a naive forward that rounds after every operation, and ranges against eager maps."""

import math

import pytest
import torch

from training.encryption.fixed_point import (
    MOST_BITS,
    _fixed_point,
    _RangeRecorder,
    _smallest,
    measure_fixed_point,
)

from ..conftest import every_backbone, every_variant, random_ids, tiny_model


def inputs():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": random_ids(2, 9), "attention_mask": mask}


@torch.no_grad()
def naive_ranges(model, input_ids, attention_mask):
    """Largest residual and attention score, a row at a time, without padding and in float64."""
    model = model.double()
    residual = score = 0.0
    for row, mask in zip(input_ids, attention_mask, strict=True):
        states = model(row[mask.bool()][None], output_hidden_states=True, output_attentions=True)
        # the last of them is after the final norm
        collected = []
        handle = model.model.norm.register_forward_pre_hook(lambda module, args, to=collected: to.append(args[0]))
        model(row[mask.bool()][None])
        handle.remove()
        residual = max([residual] + [s.abs().max().item() for s in (*states.hidden_states[:-1], *collected)])
        for layer, hidden in zip(model.model.layers, states.hidden_states[:-1], strict=True):
            hidden, attention = layer.input_layernorm(hidden), layer.self_attn
            heads = (1, hidden.shape[1], -1, attention.head_dim)
            query = attention.q_proj(hidden).view(heads).transpose(1, 2)
            key = attention.k_proj(hidden).view(heads).transpose(1, 2)
            scores = query @ key.mT * attention.scaling
            score = max(score, scores[..., torch.ones(scores.shape[-2:]).tril().bool()].abs().max().item())
    return residual, score


@every_variant
def test_ranges_match_naive_in_float64(variant):
    model, batch = tiny_model(variant, attn_implementation="eager"), inputs()
    recorder = _RangeRecorder(model)
    with torch.no_grad(), recorder.hooked(model):
        logits = model(**batch).logits
    assert logits.equal(model(**batch).logits)
    assert recorder.largest["value"] >= max(recorder.largest["residual"], logits[0].abs().max())
    residual, score = naive_ranges(model, **batch)
    assert recorder.largest["residual"] == pytest.approx(residual, rel=1e-5)
    assert recorder.largest["score"] == pytest.approx(score, rel=1e-5)


@torch.no_grad()
def naive_fixed_point(model, input_ids, integer_bits, fraction_bits):
    """Logits of SM+R or SM+G, in float64, rounded after every operation."""

    def fixed(values):
        step = 2.0**-fraction_bits
        return torch.clamp(torch.round(values / step) * step, -(2.0**integer_bits), 2.0**integer_bits - step)

    model = model.double()
    for parameter in model.parameters():
        parameter.copy_(fixed(parameter))

    def linear(layer, states):
        return fixed(torch.nn.functional.linear(states, layer.weight, layer.bias))

    body, length = model.model, input_ids.shape[1]
    states = fixed(body.embed_tokens.weight[input_ids] + body.embed_positions.weight[:length])
    for layer in body.layers:
        attention = layer.self_attn
        query, key, value = (
            linear(part, states).view(*states.shape[:2], -1, attention.head_dim).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = fixed(fixed(query @ key.mT) * attention.scaling)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        output = fixed(fixed(scores.softmax(-1)) @ value).transpose(1, 2).reshape(states.shape)
        states = fixed(states + linear(attention.o_proj, output))
        hidden = fixed(layer.mlp.act_fn(linear(layer.mlp.up_proj, states)))
        states = fixed(states + linear(layer.mlp.down_proj, hidden))
    return linear(model.lm_head, fixed(body.norm(states)))


@pytest.mark.parametrize(("integer_bits", "fraction_bits"), [(6, 9), (1, 12), (4, 3)])
@pytest.mark.parametrize("variant", ["SM+R", "SM+G"])
def test_every_operation_is_rounded_as_in_a_naive_forward(variant, integer_bits, fraction_bits):
    model, input_ids = tiny_model(variant, attn_implementation="eager", num_hidden_layers=1), random_ids(3, 11)
    clear = model(input_ids).logits
    with torch.no_grad(), _fixed_point(model, integer_bits, fraction_bits):
        logits = model(input_ids).logits
    assert model(input_ids).logits.equal(clear)  # weights and operations are as before
    step = 2.0**-fraction_bits
    assert (logits / step).round().mul(step).equal(logits) and not logits.equal(clear)
    assert -(2.0**integer_bits) <= logits.min() and logits.max() <= 2.0**integer_bits - step
    expected = naive_fixed_point(model, input_ids, integer_bits, fraction_bits)
    # a sum in float32 that lies at a tie may round the other way
    same = (logits.double() - expected).abs() < step / 2
    assert same.double().mean() > 0.97
    assert (logits.double() - expected).abs().max() < 12 * step


@every_backbone
def test_public_positions_and_masks_are_not_rounded(backbone):
    model, batch = tiny_model("SM+R", backbone, attn_implementation="eager"), inputs()
    with torch.no_grad(), _fixed_point(model, 20, 20):
        logits = model(**batch).logits
    # 2 integer bits would not hold a position, nor a mask's -inf
    torch.testing.assert_close(logits, model(**batch).logits, atol=1e-4, rtol=0)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, -1] = 98 - changed["input_ids"][0, -1]
    with torch.no_grad(), _fixed_point(model, 2, 8):
        first, second = model(**batch).logits, model(**changed).logits
    assert first[0, :-1].equal(second[0, :-1])  # saturated, and still causal


def test_the_fewest_bits_are_enough_and_one_fewer_is_not():
    model, input_ids = tiny_model("SM+LN+G"), random_ids(8, 24)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model.model.norm.weight *= 8  # a model that is sure of what it predicts
        predicted = model(input_ids).logits.argmax(-1)

    @torch.no_grad()
    def evaluate():
        return torch.nn.functional.cross_entropy(model(input_ids).logits.flatten(0, 1), predicted.flatten()).item()

    clear = evaluate()
    results = measure_fixed_point(model, evaluate)
    assert model.config._attn_implementation == "sdpa" and evaluate() == clear
    integer, fraction = results["integer_bits"], results["fraction_bits"]
    tried = {(row["integer_bits"], row["fraction_bits"]): row["perplexity"] for row in results["tried"]}
    assert len(tried) == len(results["tried"])
    limit = 1.01 * results["perplexity"]
    assert results["tolerance"] == 0.01
    assert results["perplexity"] == pytest.approx(math.exp(clear), rel=1e-5)
    assert tried[integer, fraction] == results["fixed_point_perplexity"] <= limit
    assert tried[MOST_BITS, fraction] <= limit < tried[MOST_BITS, fraction - 1]
    assert tried[integer - 1, fraction] > limit
    assert (
        2 ** (results["integer_bits_to_hold"] - 1) <= results["largest_value"] < 2 ** results["integer_bits_to_hold"]
    )


def test_bisection_finds_every_threshold_and_none():
    for threshold in range(MOST_BITS + 1):
        assert _smallest(lambda bits, threshold=threshold: bits >= threshold) == threshold
    assert _smallest(lambda bits: False) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    model, input_ids = tiny_model("SM+R"), random_ids(2, 7)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = value

    @torch.no_grad()
    def evaluate():
        return model(input_ids, labels=input_ids).loss.item()

    with pytest.raises(ValueError, match="fixed point holds finite values only, got .* a perplexity of nan"):
        measure_fixed_point(model, evaluate)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="simulated in float32, the model is in bfloat16"):
        measure_fixed_point(tiny_model().bfloat16(), lambda: 0.0)
