"""What is counted by running equals a count by hand, in every variant; what it costs equals arithmetic by hand."""

import math

import pytest
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from modeling_lnfree import LNFreeForCausalLM
from training.encryption.counting import count_operations, totals
from training.encryption.tables import compare_costs, difference, tabulate
from training.tables import to_markdown

from ..conftest import every_backbone, every_variant, tiny_config


SIZES = [
    {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99},
    {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 131, "intermediate_size": 80},
]
sizes = pytest.mark.parametrize("size", SIZES, ids=["d32", "d48"])


def count_by_hand(config, batch, passes, last_only):
    """
    By layer and outside: elements (softmax and norms: rows by length) and calls, from the architecture alone.

    Args:
        passes: pairs (queries, keys) of the forward passes.
        last_only: whether each computes the last position's logits only.
    """
    width, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size
    activation = {"R": "relu", "L": "leaky_relu", "G": "gelu"}[config.variant.split("+")[-1][0]]
    rotary = config.position_embedding_type == "rotary"
    layer, outside = {}, {}

    def add(counts, name, elements, calls=1, row=None):
        count = counts.setdefault(name, {"calls": 0, "elements": 0})
        count["calls"] += calls
        count["elements"] += elements
        if row:
            rows = count.setdefault("rows", {})
            rows[str(row)] = rows.get(str(row), 0) + elements // row

    def product(counts, rows, inputs, outputs, times=1):
        add(counts, "matmul", times * rows * outputs)
        add(counts, "opening", times * (rows * inputs + inputs * outputs))
        add(counts, "truncation", times * rows * outputs)

    for queries, keys in passes:
        tokens = batch * queries
        if config.norm_type == "layernorm":
            add(layer, "layer_norm", 2 * tokens * width, calls=2, row=width)
        for _ in range(4):  # q, k, v, o
            product(layer, tokens, width, width)
        if rotary:
            add(layer, "truncation", 4 * tokens * heads * config.rotary_dim, calls=4)
        product(layer, queries, width // heads, keys, times=batch * heads)
        add(layer, "truncation", batch * heads * queries * keys)  # 1 / sqrt(d)
        add(layer, "softmax", batch * heads * queries * keys, row=keys)
        if keys > 1:
            maxima = batch * heads * queries * (keys - 1)
            add(layer, "comparison", maxima, calls=math.ceil(math.log2(keys)))
        product(layer, queries, keys, width // heads, times=batch * heads)
        product(layer, tokens, width, inner)
        add(layer, activation, tokens * inner)
        if activation != "gelu":
            add(layer, "comparison", tokens * inner)
        if activation == "leaky_relu":
            add(layer, "truncation", tokens * inner)
        product(layer, tokens, inner, width)
        if config.final_norm_type == "layernorm":
            add(outside, "layer_norm", tokens * width, row=width)
        logits = (batch if last_only else tokens) * config.vocab_size
        product(outside, logits // config.vocab_size, width, config.vocab_size)
        add(outside, "embedding", tokens * config.vocab_size, row=config.vocab_size)
        add(outside, "sampling", logits, row=config.vocab_size)
    return layer, outside


def check(phase, config, batch, passes, last_only):
    layer, outside = count_by_hand(config, batch, passes, last_only)
    assert phase["layers"] == [layer] * config.num_hidden_layers
    assert phase["outside"] == outside
    for name, total in phase["total"].items():
        for key in ("calls", "elements"):
            in_layers = config.num_hidden_layers * layer.get(name, {}).get(key, 0)
            assert total[key] == in_layers + outside.get(name, {}).get(key, 0)
        if "rows" in total:
            assert sum(int(length) * rows for length, rows in total["rows"].items()) == total["elements"]


@sizes
@every_variant
@every_backbone
def test_a_forward_pass_counts_as_by_hand(variant, backbone, size):
    config = tiny_config(variant, backbone, **size)
    counts = count_operations(LNFreeForCausalLM, config, length=13, batch_size=2)
    check(counts["forward"], config, 2, [(13, 13)], last_only=False)
    check(counts["token"], config, 2, [(1, 13)], last_only=True)
    assert counts["generation"] is None and counts["variant"] == variant


@sizes
@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+R"])
@every_backbone
def test_generation_with_a_cache_counts_as_by_hand(variant, backbone, size):
    config = tiny_config(variant, backbone, **size)
    counts = count_operations(LNFreeForCausalLM, config, length=5, new_tokens=4)
    check(counts["generation"], config, 1, [(5, 5), (1, 6), (1, 7), (1, 8)], last_only=True)
    check(counts["forward"], config, 1, [(5, 5)], last_only=False)


def test_one_token_and_its_softmax_of_one():
    counts = count_operations(LNFreeForCausalLM, tiny_config("SM+G"), length=1, new_tokens=1)
    assert "comparison" not in counts["forward"]["total"]
    assert counts["generation"] == counts["forward"] == counts["token"]  # one position's logits either way


@every_variant
@every_backbone
def test_the_baseline_is_sm_ln_g_of_the_same_sizes(variant, backbone):
    config = tiny_config(variant, backbone)
    counts = count_operations(LNFreeForCausalLM, config, length=7, new_tokens=2)
    reference = count_operations(LNFreeForCausalLM, tiny_config("SM+LN+G", backbone), length=7, new_tokens=2)
    baseline = counts["baseline"] if variant != "SM+LN+G" else counts
    for phase in ("forward", "token", "generation"):
        found = totals(baseline[phase]) if variant == "SM+LN+G" else baseline[phase]
        assert found == totals(reference[phase]) and found["estimates"]["SEMI2K"]["rounds"] > 0
    changes = difference(counts["forward"]["total"], reference["forward"]["total"])
    assert (changes == []) == (variant == "SM+LN+G")
    if variant == "SM+R":
        activations = 3 * 7 * config.intermediate_size
        relu = f"+{activations:,} ReLU"
        assert changes == [
            f"-{3 * 2 * 7} LayerNorm rows",
            f"-{activations:,} GELU",
            relu,
            relu.replace("ReLU", "comparisons"),
        ]


def test_stock_gpt2_has_the_counts_of_the_baseline():
    ids = {"bos_token_id": None, "eos_token_id": None}
    theirs = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99, n_positions=64, **ids)
    named = {"length": 13, "batch_size": 2, "new_tokens": 3}
    for activation in ("gelu_new", "gelu_pytorch_tanh"):  # by operations of torch, and by one
        theirs.activation_function = activation
        found = count_operations(GPT2LMHeadModel, theirs, **named)
        ours = count_operations(LNFreeForCausalLM, tiny_config("SM+LN+G"), **named)
        assert "baseline" not in found and found["variant"] is None
        for phase in ("forward", "generation"):
            # its projections of queries, keys and values are one, which opens their input once
            for name in ours[phase]["total"].keys() - {"opening", "matmul", "truncation"}:
                assert found[phase]["total"][name] == ours[phase]["total"][name], name
            elements = [counts[phase]["total"]["truncation"]["elements"] for counts in (found, ours)]
            assert elements[0] == elements[1] and found[phase]["total"].keys() == ours[phase]["total"].keys()


def test_a_model_of_another_kind_is_counted_and_nothing_is_left_out():
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    total = count_operations(LlamaForCausalLM, config, length=6)["forward"]["total"]
    assert total["rms_norm"] == {"calls": 5, "elements": 5 * 6 * 32, "rows": {"32": 5 * 6}}
    assert total["silu"] == {"calls": 2, "elements": 2 * 6 * 48}
    # the gate is a product of two private tensors; the rotary angles are public
    opening = 2 * (4 * (6 * 32 + 32 * 32) + 2 * 4 * 6 * 8 + 4 * (36 + 48) + 3 * (6 * 32 + 32 * 48) - 6 * 32 + 6 * 48)
    assert total["opening"]["elements"] == opening + 2 * 2 * 6 * 48 + 6 * 32 + 32 * 99
    counted = {"rms_norm", "silu", "softmax", "matmul", "opening", "truncation", "comparison"}
    assert total.keys() == counted | {"embedding", "sampling"}


def test_tables_name_lengths_and_what_has_no_figure():
    counts = count_operations(LNFreeForCausalLM, tiny_config("SM+R"), length=5, new_tokens=3)
    table = tabulate([("SM+R", counts["forward"]["total"]), ("new", counts["generation"]["total"])], "x")
    assert [row[1] for row in table.rows] == ["60 x 5", "84 x 5 to 7"]
    text = to_markdown(compare_costs([("SM+R", counts["forward"])], counts["baseline"]["forward"]))
    assert "| 60 x 5 | 5 x 32 |" in text and " % | -30 LayerNorm rows, -1,920 GELU" in text
    assert "against" not in to_markdown(compare_costs([("x", counts["forward"])], None))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"length": 65}, "need 65 positions, the model has 64"),
        ({"length": 60, "new_tokens": 6}, "length=60 and new_tokens=6 need 65 positions, the model has 64"),
        ({"length": 0}, "at least 1 .* got length=0"),
        ({"length": 4, "batch_size": 0}, "batch_size=0"),
        ({"length": 4, "new_tokens": -1}, "new_tokens=-1"),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        count_operations(LNFreeForCausalLM, tiny_config(), **sizes)


def test_counting_needs_no_memory_and_changes_no_configuration():
    config = tiny_config("SM+LN+G", hidden_size=4096, vocab_size=50_000, max_position_embeddings=2**17)
    before = config._attn_implementation, config.to_dict()
    counts = count_operations(LNFreeForCausalLM, config, length=2**17)
    assert counts["forward"]["total"]["softmax"]["rows"] == {str(2**17): 3 * 4 * 2**17}
    assert before == (config._attn_implementation, config.to_dict())
