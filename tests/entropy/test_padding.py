"""Which keys a mask hides, and which queries are padding: from what is told, and never by a guess."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_lnfree import record_attention_entropy

from .models import SIZES, float64_maps, make_batch, make_model, mean_of_queries


UNKNOWN = "some inputs are padding, and which of its queries are is not known: pass padding_mask="


def make_layoutlm():
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("layoutlm", **SIZES), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(std=0.4)
    return model


@torch.no_grad()
def expected_of(model, batch):
    maps = torch.stack(model(**batch, output_attentions=True).attentions).double()
    return mean_of_queries(torch.special.entr(maps).sum(-1), batch["attention_mask"])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_masks_that_a_model_makes_need_padding_mask(padding):
    model, batch = make_layoutlm(), make_batch(padding)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=UNKNOWN), record_attention_entropy(model) as record:
            model(batch["input_ids"], None, batch["attention_mask"])
        assert record.layer_names == [] and record.num_queries == 0 and UNKNOWN in record.unmeasured[0]
        with record_attention_entropy(model, padding_mask=batch["attention_mask"]) as record:
            model(batch["input_ids"], None, batch["attention_mask"])
    assert record.num_queries == batch["attention_mask"].sum()
    torch.testing.assert_close(record.entropy.double(), expected_of(model, batch), atol=2e-5, rtol=0)


def test_a_batch_without_padding_needs_no_telling():
    model, batch = make_layoutlm(), make_batch("none")
    with record_attention_entropy(model) as record, torch.no_grad():
        model(batch["input_ids"], None, batch["attention_mask"])
    torch.testing.assert_close(record.entropy.double(), expected_of(model, batch), atol=2e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_mask_stands_above_what_the_model_is_told(implementation):
    model, batch = make_model("llama", implementation), make_batch("none")
    first_half = torch.zeros_like(batch["attention_mask"])
    first_half[:, :6] = 1
    with record_attention_entropy(model, padding_mask=first_half) as record, torch.no_grad():
        model(**batch)
    with record_attention_entropy(model) as expected, torch.no_grad():
        model(batch["input_ids"][:, :6])
    assert record.num_queries == 3 * 6
    torch.testing.assert_close(record.entropy, expected.entropy, atol=2e-5, rtol=0)


def test_padding_mask_of_other_queries():
    model, batch = make_model("llama"), make_batch("none")
    with pytest.raises(ValueError, match=r"padding_mask must be \(batch, T\), got shape \(13,\)"):
        record_attention_entropy(model, padding_mask=torch.ones(13)).__enter__()
    message = r"padding_mask is \(2, 13\), its queries are \(3, 13\)"
    with pytest.warns(UserWarning, match=message), torch.no_grad():
        with record_attention_entropy(model, padding_mask=torch.ones(2, 13)) as record:
            model(**batch)
    assert record.num_queries == 0


class Attention(nn.Module):
    is_causal = False

    def forward(self, hidden_states, context, mask):
        query, key = (states.unflatten(-1, (4, 8)).transpose(1, 2) for states in (hidden_states, context))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attention(self, query, key, key, mask, scaling=0.3)[0].flatten(2)


class Reader(nn.Module):
    """Queries that attend to the tokens, by a mask that tells of the tokens."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.config = AutoConfig.for_model("bert", **SIZES)
        self.config._attn_implementation = "sdpa"

    def forward(self, queries, tokens, attention_mask):
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=queries, attention_mask=attention_mask, encoder_hidden_states=tokens
        )
        return self.attention(queries, tokens, mask)


@pytest.mark.parametrize("num_latents", [4, 13])
def test_latents_are_not_taken_for_the_tokens_that_they_read(num_latents):
    torch.manual_seed(0)
    reader, mask = Reader(), make_batch("right")["attention_mask"]
    latents, tokens = torch.randn(3, num_latents, 32), torch.randn(3, 13, 32)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=UNKNOWN), record_attention_entropy(reader) as record:
            reader(latents, tokens, mask)
        assert record.num_queries == 0
        with record_attention_entropy(reader) as record:
            reader(latents, tokens, torch.ones_like(mask))
    assert record.num_queries == 3 * num_latents


def test_a_mask_that_is_asked_for_with_one_query():
    torch.manual_seed(0)
    reader, mask, tokens = Reader(), make_batch("right")["attention_mask"], torch.randn(3, 13, 32)

    def read():
        broadcast = create_bidirectional_mask(
            config=reader.config, inputs_embeds=tokens[:, :1], attention_mask=mask, encoder_hidden_states=tokens
        )
        reader.attention(tokens, tokens, broadcast)

    with pytest.warns(UserWarning, match=UNKNOWN), record_attention_entropy(reader) as record:
        read()
    assert record.num_queries == 0
    with record_attention_entropy(reader, padding_mask=mask) as record:
        read()
    assert record.num_queries == mask.sum()
    # of 26 tokens, as many see 9, 4 and 13
    expected = sum(n * math.log(n) for n in (9, 4, 13)) / 26
    assert record.max_entropy[0, 0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [lambda seen: seen, lambda seen: -10_000 * (~seen).long()], ids=["bool", "int64"])
def test_eager_adds_masks_that_are_no_floats_and_so_does_the_record(make):
    model, batch = make_model("llama", "eager"), make_batch("none")
    batch["attention_mask"] = make(torch.ones(3, 1, 13, 13).bool().tril())
    with record_attention_entropy(model) as record, torch.no_grad():
        model(**batch)
        maps = torch.stack(model(**batch, output_attentions=True).attentions).double()
    torch.testing.assert_close(
        record.entropy.double(), torch.special.entr(maps).sum(-1).mean((1, 3)), atol=2e-5, rtol=0
    )
    # bool hides nothing by it
    seen = (maps[0] > 0).sum(-1).log().mean().item()
    assert record.max_entropy[0, 0].item() == pytest.approx(seen, abs=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_additive_masks_of_any_depth_hide_in_all_that_is_told(implementation, hidden):
    model, batch = make_model("llama", implementation), make_batch("none")
    batch["attention_mask"] = torch.zeros(3, 1, 13, 13).masked_fill(torch.ones(13, 13).triu(1).bool(), hidden)
    with torch.no_grad():
        with record_attention_entropy(model) as record:
            model(**batch)
        with record_attention_entropy(model) as expected:
            model(batch["input_ids"])
    for name in ("entropy", "max_entropy", "normalized_entropy", "head_distribution"):
        torch.testing.assert_close(getattr(record, name), getattr(expected, name), atol=2e-5, rtol=0)


def test_layers_that_change_their_mask_are_told_by_the_one_they_got():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "keep_window_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **sizes)).eval()
    batch = make_batch("left")
    with record_attention_entropy(model) as record, torch.no_grad():
        model(**batch)
    assert record.num_queries == batch["attention_mask"].sum()


def test_a_sink_of_minus_infinity_is_no_key():
    model, batch = make_model("gpt_oss", "eager"), make_batch("left")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-torch.inf)
        with record_attention_entropy(model) as record:
            model(**batch)
    maps = float64_maps(model, batch)[..., :-1]
    expected = mean_of_queries(torch.special.entr(maps).sum(-1), batch["attention_mask"])
    torch.testing.assert_close(record.entropy.double(), expected, atol=2e-5, rtol=0)
    largest = mean_of_queries((maps > 0).sum(-1).log(), batch["attention_mask"])
    torch.testing.assert_close(record.max_entropy, largest.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_of_masks_that_the_model_changes(implementation, padding):
    model, batch = make_model("llama", implementation), make_batch(padding)
    with torch.no_grad():
        with record_attention_entropy(model) as expected:
            model(**batch)
        for layer in model.model.layers:
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}),
                with_kwargs=True,
            )
        with record_attention_entropy(model) as record:
            model(**batch)
    assert record.num_queries == expected.num_queries
    torch.testing.assert_close(record.entropy, expected.entropy, atol=2e-5, rtol=0)
