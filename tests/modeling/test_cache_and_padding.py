"""Attention x padding x cache, with classifier and instrument: all as without padding and without a cache."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from modeling_lnfree import LNFreeForSequenceClassification, record_attention_entropy
from modeling_lnfree.modeling_lnfree import CACHE_NAME

from ..conftest import random_ids, tiny_config, tiny_model


CLOSE = {"atol": 2e-5, "rtol": 1e-5}
LENGTHS = (7, 12)  # of the two sequences
CACHES = ["none", "dynamic", "static, longer than the sequence"]
CELLS = [(implementation, cache) for implementation in ("eager", "sdpa") for cache in CACHES]
# with a cache, torch 2.13 compiles no flex attention for a CPU
CELLS.append(pytest.param("flex_attention", "none", marks=pytest.mark.slow))


def every_combination(test):
    test = pytest.mark.parametrize(("implementation", "cache"), CELLS)(test)
    return pytest.mark.parametrize("padding", ["none", "left", "right"])(test)


def make_batch(padding: str, vocab_size: int = 99):
    """Tokens, mask and positions of two sequences, of unlike lengths where they are padded."""
    lengths = [LENGTHS[1]] * 2 if padding == "none" else LENGTHS
    rows = [random_ids(length, vocab_size=vocab_size) for length in lengths]
    input_ids, mask = torch.zeros(2, LENGTHS[1], dtype=torch.long), torch.zeros(2, LENGTHS[1], dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(LENGTHS[1] - len(row), None) if padding == "left" else slice(0, len(row))
        input_ids[index, place], mask[index, place] = row, 1
    return rows, input_ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def make_cache(kind: str, config):
    if kind == "none":
        return None
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=20)


def run_in_parts(model, body, cache: str, input_ids, mask, positions):
    """The outputs of the last part, and how many tokens came before it."""
    kept, before = make_cache(cache, model.config), 0
    if kept is not None:
        for stop in (5, 8):
            part = slice(before, stop)
            told = {"attention_mask": mask[:, :stop], "position_ids": positions[:, part]}
            body(input_ids[:, part], **told, **{CACHE_NAME: kept})
            before = stop
    last = {"attention_mask": mask, "position_ids": positions[:, before:], **({CACHE_NAME: kept} if kept else {})}
    return model(input_ids[:, before:], use_cache=kept is not None, **last), before


@every_combination
@torch.no_grad()
def test_logits_and_entropies_are_those_without_padding_and_cache(cache, padding, implementation):
    model = tiny_model("SM+R")
    rows, input_ids, mask, positions = make_batch(padding)
    sums, alone = 0.0, []
    for row in rows:
        with record_attention_entropy(model) as record:
            alone.append(model(row[None]).logits[0])
        sums = sums + record.entropy.double() * len(row)
    model.set_attn_implementation(implementation)
    with record_attention_entropy(model) as record:
        output, before = run_in_parts(model, model, cache, input_ids, mask, positions)
    assert not record.unmeasured and record.num_queries == sum(map(len, rows))
    torch.testing.assert_close(record.entropy.double(), sums / record.num_queries, **CLOSE)
    for index, row in enumerate(alone):
        shown = mask[index, before:].bool()
        expected = row[int(mask[index, :before].sum()) :]
        torch.testing.assert_close(output.logits[index][shown], expected, **CLOSE)


@every_combination
@torch.no_grad()
def test_classes_are_those_without_padding_and_cache(cache, padding, implementation):
    model = LNFreeForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).eval()
    rows, input_ids, mask, positions = make_batch(padding)
    if padding == "right" and cache != "none":
        # the last token of the shorter one must be among the last part
        mask[0, :9] = 1
        input_ids[0, :9] = rows[0] = random_ids(9)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = torch.cat([model(row[None]).logits for row in rows])
    model.set_attn_implementation(implementation)
    output, _ = run_in_parts(model, model.model, cache, input_ids, mask, positions)
    torch.testing.assert_close(output.logits, expected, **CLOSE)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_entropies_with_a_cache_that_is_longer_than_the_window(padding, implementation):
    """A model of transformers whose queries see the last four tokens alone."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, initializer_range=0.3)).eval()
    rows, input_ids, mask, positions = make_batch(padding)
    sums, largest = 0.0, 0.0
    for row in rows:
        with record_attention_entropy(model) as record:
            model(row[None], use_cache=False)
        sums = sums + record.entropy.double() * len(row)
        largest = largest + torch.arange(1, len(row) + 1).clamp(max=4).double().log().sum()
    model.set_attn_implementation(implementation)
    with record_attention_entropy(model) as record:
        run_in_parts(model, model, "dynamic", input_ids, mask, positions)
    assert not record.unmeasured and record.num_queries == sum(map(len, rows))
    torch.testing.assert_close(record.entropy.double(), sums / record.num_queries, **CLOSE)
    expected = torch.full_like(record.max_entropy, largest.item() / record.num_queries)
    torch.testing.assert_close(record.max_entropy, expected, **CLOSE)


@torch.no_grad()
def test_a_mask_of_one_batch_is_not_kept_for_the_next():
    model = tiny_model("SM+R")
    for padding in ("left", "none", "right", "none"):
        rows, input_ids, mask, positions = make_batch(padding)
        told = {"attention_mask": mask} if padding != "none" else {}
        with record_attention_entropy(model) as record:
            model(input_ids, position_ids=positions, **told)
        assert record.num_queries == sum(map(len, rows))
