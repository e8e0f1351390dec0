"""Simulated int8 against a quantization in float64 that is written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_lnfree import measure
from modeling_lnfree.int8 import round_to_int8, simulate_int8

from .naive import TEXTS, make, make_tokenizer, reference


def rounded(values, size):
    """To the nearest of 255 numbers from -size to size."""
    step = size / 127
    return (values / step).round().clamp(-127, 127) * step


class Rounded(nn.Module):
    """A linear layer of float64 in int8, row by row."""

    def __init__(self, layer, by_token, quantile):
        super().__init__()
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        self.weight = torch.stack([rounded(row, row.abs().max()) for row in weight])
        self.bias, self.by_token, self.quantile = layer.bias, by_token, quantile

    def forward(self, states):
        tokens = states.reshape(-1, states.shape[-1])
        sizes = [token.abs().max() for token in tokens]
        size = torch.quantile(torch.stack(sizes), self.quantile)
        tokens = torch.stack([rounded(t, s if self.by_token else size) for t, s in zip(tokens, sizes, strict=True)])
        return F.linear(tokens, self.weight, self.bias).view(*states.shape[:-1], -1)


@torch.no_grad()
def naive_nll(model, sequences, by_token, quantile=1.0):
    copy, values = reference(model), []
    for name, module in list(copy.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and not name.endswith(("lm_head", "embed_out")):
            parent, _, own = name.rpartition(".")
            setattr(copy.get_submodule(parent), own, Rounded(module, by_token, quantile))
    for token_ids in sequences:
        logits = copy(torch.tensor([token_ids])).logits[0, :-1]
        values.append(F.cross_entropy(logits, torch.tensor(token_ids[1:], dtype=torch.long), reduction="sum"))
    return sum(values).item() / sum(len(token_ids) - 1 for token_ids in sequences)


@pytest.mark.parametrize("name", ["gpt2", "opt", "SM+R"])
def test_perplexity_in_int8_matches_float64_by_definition(name):
    # a rounding in float32 may fall to the other side, so in float64 here too
    model, tokenizer, texts = make(name).double(), make_tokenizer(), TEXTS[:3]
    sequences = tokenizer(texts)["input_ids"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure(model, texts, tokenizer=tokenizer, int8=True, int8_clip=0.75, batch_size=2)
    expected = {
        "by tensor": naive_nll(model, sequences, by_token=False),
        "by token": naive_nll(model, sequences, by_token=True),
        "by tensor, clipped at 0.75": naive_nll(model, sequences, by_token=False, quantile=0.75),
    }
    assert {way: likelihood.nll for way, likelihood in found.int8.items()} == pytest.approx(expected, rel=1e-6)
    assert len({round(value, 9) for value in [found.nll, *expected.values()]}) == 4
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert found.to_dict()["int8"]["by token"]["perplexity"] == pytest.approx(math.exp(expected["by token"]))


def test_texts_that_can_be_read_once_are_read_in_every_way():
    model, tokenizer = make("SM+R"), make_tokenizer()
    for options in ({"int8": True}, {"int8_clip": 0.9}):
        found = measure(model, iter(TEXTS), tokenizer=tokenizer, **options)
        expected = measure(model, TEXTS, tokenizer=tokenizer, **options)
        assert found.nll == expected.nll
        assert {way: each.nll for way, each in found.int8.items()} == {w: e.nll for w, e in expected.int8.items()}


def test_output_projection_and_embeddings_stay_as_they_are_and_all_is_put_back_after_an_error():
    model = make("gpt2")  # whose output projection is its embedding
    embedding, weight = model.lm_head.weight.clone(), model.transformer.h[0].attn.c_attn.weight.clone()
    with pytest.raises(RuntimeError, match="on the way"), simulate_int8(model, activations="token"):
        assert model.lm_head.weight.equal(embedding)
        columns = model.transformer.h[0].attn.c_attn.weight.T
        assert all(len(column.unique()) <= 255 for column in columns) and not columns.T.equal(weight)
        raise RuntimeError("on the way")
    assert model.transformer.h[0].attn.c_attn.weight.equal(weight)


def test_int8_of_bfloat16_rounds_once():
    values = torch.randn(64, 256).bfloat16()
    largest = values.abs().amax(-1, keepdim=True)
    step = largest.double() / 127
    expected = ((values.double() / step).round() * step).bfloat16()
    assert (round_to_int8(values, largest) == expected).double().mean() > 0.99


def test_zero_activations_stay_zero():
    model = make("SM+R")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = measure(model, ["abc"], tokenizer=make_tokenizer(), int8=True)
    assert {way: likelihood.nll for way, likelihood in found.int8.items()} == pytest.approx(
        {"by tensor": math.log(61), "by token": math.log(61)}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "channel"}, "activations must be 'tensor' or 'token', got 'channel'"),
        ({"activations": "tensor", "clip": 0}, "clip must be a quantile above 0 and at most 1, got 0"),
    ],
)
def test_what_int8_is_not_is_told(options, message):
    with pytest.raises(ValueError, match=message), simulate_int8(make("gpt2"), **options):
        pass
