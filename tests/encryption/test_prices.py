"""Rounds, bytes and seconds against arithmetic by hand: every composition at two sizes, networks, tables."""

import math

import pytest

from modeling_lnfree import LNFreeForCausalLM
from training.encryption.counting import count_operations
from training.encryption.crypten import CRYPTEN
from training.encryption.prices import NETWORKS, Cost, Network, Shape, find_network, local_seconds
from training.encryption.semi2k import SEMI2K
from training.encryption.tables import cost_rows, operation_rows, place_rows, step_rows
from training.errors import UserError

from ..conftest import tiny_config


# rows and their length
ROWS = [(3, 16), (5, 23)]


def price(protocol, name, shape):
    return sum((step.cost for step in protocol.operations[name](shape)), Cost())


def check(protocol, name, shape, rounds, words):
    """Words of 64 bits are what each of two parties sends."""
    found = price(protocol, name, shape)
    assert (found.rounds, found.bytes) == (rounds, 2 * 8 * words), name


@pytest.mark.parametrize(("rows", "length"), ROWS)
def test_crypten_by_hand(rows, length):
    n = rows * length
    rowed, flat = Shape(n, row=length), Shape(n)
    # a comparison: an adder's 1 + 6 levels of 2 and 4 words (set and propagate), and a bit that is opened
    negative = (8, 2 + 6 * 4 + 1)
    check(CRYPTEN, "relu", flat, negative[0] + 1, n * (negative[1] + 2))
    check(CRYPTEN, "clamp", flat, 9, 2 * 29 * n)
    for bound in ("clamp_min", "clamp_max"):
        check(CRYPTEN, bound, flat, 9, 29 * n)
    # squares, 8 squarings and 3 steps of 1 + 2 + 2 words, two products
    inverse_root = (8 + 3 * 3, 8 + 3 * 5)
    layer_norm = n + inverse_root[1] * rows + (n + rows) + (n + length)
    check(CRYPTEN, "layer_norm", rowed, 1 + inverse_root[0] + 2, layer_norm)
    check(CRYPTEN, "rms_norm", rowed, 1 + inverse_root[0] + 2, layer_norm)
    # sign and its product, 8 squarings, 2 steps of 1 + 2 words, two products
    sigmoid = (9 + 8 + 4 + 2, 29 + 8 + 6 + 4)
    check(CRYPTEN, "sigmoid", flat, sigmoid[0], sigmoid[1] * n)
    check(CRYPTEN, "tanh", flat, sigmoid[0], sigmoid[1] * n)
    check(CRYPTEN, "silu", flat, sigmoid[0] + 1, (sigmoid[1] + 2) * n)
    check(CRYPTEN, "gelu", flat, 26, 52 * n)
    # the maximum: 2 or 3 halvings (log of 16 and of 23), all pairs of what is left, a random one of the largest twice
    halved = {16: [16, 8, 4], 23: [23, 12, 6, 3]}[length]
    words = sum((27 + 4) * (size // 2) * rows for size in halved[:-1])
    left = halved[-1]
    products = {4: [1, 1], 3: [1]}[left]  # of 3 comparisons with the others, and of 2
    words += 27 * left * (left - 1) * rows + sum(2 * each * left * rows for each in products)
    index = lambda size: 16 * rows + 2 * rows + 27 * size * rows  # noqa: E731
    words += index(left) + 2 * left * rows + 13 * n + index(length)
    rounds = 10 * (len(halved) - 1) + 8 + len(products) + 10 + 1 + 7 + 10
    # 8 squarings an element; 8 squarings and 10 steps of 1 + 2 words a row; the product
    check(CRYPTEN, "softmax", rowed, rounds + 8 + 28 + 1, words + 8 * n + 38 * rows + n + rows)
    assert (length, rounds + 37) in ((16, 95), (23, 104))


@pytest.mark.parametrize(("rows", "length"), ROWS)
def test_semi2k_by_hand(rows, length):
    n = rows * length
    rowed, flat = Shape(n, row=length), Shape(n)
    # most significant bit 7 and 5, to arithmetic 1 and 1, selection 1 and 2; a product 1 and 2, truncated 1 and 1
    check(SEMI2K, "relu", flat, 9, 8 * n)
    check(SEMI2K, "clamp", flat, 18, 16 * n)
    for bound in ("clamp_min", "clamp_max"):
        check(SEMI2K, bound, flat, 9, 8 * n)
    check(SEMI2K, "truncation", flat, 1, n)
    check(SEMI2K, "gelu", flat, 9, (3 * 8 + 4 * 3 + 7) * n)
    # the highest bit: to binary 7 and 26, six levels of 1 and 2; its bits to arithmetic 1 and 1
    highest = (7 + 6 + 1, 26 + 12 + 1)
    # normalized; powers of degree 2, 3, 4 and a truncation; the other root's bits twice and a product; the product
    inverse_root = (highest[0] + 2 + 7 + 3 + 2, highest[1] + 3 + 10 + 4 + 3)
    check(
        SEMI2K,
        "layer_norm",
        rowed,
        1 + 3 + 2 + inverse_root[0] + 4,
        3 * n + (1 + 1 + 3 + inverse_root[1]) * rows + 6 * n,
    )
    check(SEMI2K, "rms_norm", rowed, 3 + inverse_root[0] + 4, 3 * n + (1 + inverse_root[1]) * rows + 6 * n)
    # sign; highest bit; normalized, guess; two steps, of which one has two products; scaled back, sign
    reciprocal = (9 + highest[0] + 4 + 4 + 3, 8 + highest[1] + 6 + 9 + 5)
    exponential = (1 + 8 * 2, 1 + 8 * 3)
    sigmoid = (exponential[0] + reciprocal[0], exponential[1] + reciprocal[1])
    check(SEMI2K, "sigmoid", flat, sigmoid[0], sigmoid[1] * n)
    check(SEMI2K, "silu", flat, sigmoid[0] + 2, (sigmoid[1] + 3) * n)
    check(SEMI2K, "tanh", flat, 18 + 6 + reciprocal[0] + 2, (16 + 9 + reciprocal[1] + 3) * n)
    levels = math.ceil(math.log2(length))
    check(
        SEMI2K,
        "softmax",
        rowed,
        9 * levels + exponential[0] + 9 + reciprocal[0] + 2,
        8 * rows * (length - 1) + (exponential[1] + 8 + 3) * n + reciprocal[1] * rows,
    )


@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(4, 99, 32), (7, 131, 48)])
def test_embedding_and_sampling_by_hand(tokens, vocabulary, width):
    one_hot = Shape(tokens * vocabulary, vocabulary, tokens * width, tokens * vocabulary * width)
    opened = tokens * vocabulary + vocabulary * width
    check(CRYPTEN, "embedding", one_hot, 1, opened)
    check(SEMI2K, "embedding", one_hot, 2, tokens * vocabulary + opened)
    inside, looked_up = (
        sum((step.cost for step in SEMI2K.instead[f"embedding, {how}"](one_hot)), Cost())
        for how in ("one-hot rows made of shared tokens by the parties", "looked up by the client in a public table")
    )
    assert (inside.rounds, inside.bytes) == (7 + 1 + 1, 16 * (14 * tokens * vocabulary + opened))
    assert (looked_up.rounds, looked_up.bytes) == (1, 16 * tokens * width)
    # the server alone sends the logits
    logits = Shape(tokens * vocabulary, vocabulary)
    assert price(CRYPTEN, "sampling", logits) == Cost(1, 8 * tokens * vocabulary)
    check(SEMI2K, "sampling", logits, 1, tokens * vocabulary)
    (largest,) = SEMI2K.instead["sampling, the largest logit found by the parties"](logits)
    assert largest.cost.rounds == 9 * math.ceil(math.log2(vocabulary))
    assert largest.cost.bytes == 16 * 10 * tokens * (vocabulary - 1)
    counts = count_operations(LNFreeForCausalLM, tiny_config(vocab_size=vocabulary, hidden_size=width), length=tokens)
    cost = counts["forward"]["estimates"]["CrypTen"]["by_operation"]["embedding"]
    assert (cost["bytes_per_party"], cost["multiply_adds"]) == (8 * opened, tokens * vocabulary * width)


def test_a_dealer_sends_one_party_what_comes_out_of_each_product():
    width, inner, tokens = 32, 128, 6
    counts = count_operations(LNFreeForCausalLM, tiny_config("SM+R", num_hidden_layers=1), length=tokens)
    cost = counts["forward"]["estimates"]["CrypTen"]["by_operation"]
    scores, products = 4 * tokens * tokens, 5 * tokens * width + tokens * inner + tokens * width
    # 4 projections and the attention's output, its scores, both of the MLP, the logits
    assert cost["opening"]["offline_bytes"] == 8 * (products + scores + tokens * 99)
    assert cost["opening"]["multiply_adds"] == tokens * width * (4 * width + 2 * inner + 99) + 2 * scores * width // 4
    # an adder of 1 + 6 x 2 levels, the bit, the product with it
    assert cost["relu"]["offline_bytes"] == 8 * (1 + 6 * 2 + 1 + 1) * tokens * inner


def test_weights_may_be_opened_once():
    width, inner, tokens, heads = 32, 128, 6, 4
    counts = count_operations(LNFreeForCausalLM, tiny_config("SM+R", num_hidden_layers=1), length=tokens)
    # the states of every product alone: of q, k, v, o, up, down and the logits, then of scores and outputs
    states = 6 * tokens * width + tokens * inner + 3 * tokens * width + heads * tokens * tokens
    for cost in counts["forward"]["estimates"].values():
        once = cost["instead"]["opening, each weight opened under one mask before all passes"]
        assert once["bytes_per_party"] == 8 * states
        weights = 4 * width * width + 2 * width * inner + 99 * width
        assert cost["by_operation"]["opening"]["bytes_per_party"] == 8 * (states + weights)


def test_seconds_by_hand():
    # 1,000 rounds and 30 MB: 0.8 s + 0.08 s; 80 s + 1.2 s
    assert NETWORKS["lan"].seconds(1000, 30_000_000) == pytest.approx(0.88)
    assert NETWORKS["wan"].seconds(1000, 30_000_000) == pytest.approx(81.2)
    assert find_network("20,1").seconds(100, 125_000_000) == pytest.approx(3.0)
    assert find_network("wan") == Network("WAN", 80.0, 0.2)


def test_seconds_of_computing_by_hand():
    # 1e9 multiply-adds, 5e8 bytes of both parties, 1,000 rounds
    cost = {"multiply_adds": 10**9, "bytes_per_party": 250_000_000, "rounds": 1000}
    assert local_seconds(CRYPTEN, cost) == pytest.approx(0.21 + 1.45 + 1.2)
    assert local_seconds(SEMI2K, cost) is None


@pytest.mark.parametrize("name", ["", "man", "20", "20,0", "-1,1", "nan,1", "1,inf", "1,2,3"])
def test_wrong_networks_are_refused(name):
    with pytest.raises(UserError, match="network must be lan, wan or MS,GBPS"):
        find_network(name)


@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+R", "SM+LN+S", "SM+DyT+LR0.1"])
def test_parts_add_up(variant):
    counts = count_operations(LNFreeForCausalLM, tiny_config(variant), length=9, new_tokens=2)
    for phase in ("forward", "token", "generation"):
        for cost in counts[phase]["estimates"].values():
            for key in ("rounds", "bytes_per_party", "offline_bytes", "multiply_adds"):
                assert sum(part[key] for part in cost["by_operation"].values()) == cost[key] > 0
                assert sum(part[key] for part in cost["by_place"].values()) == cost[key]
                for part in cost["by_operation"].values():
                    assert sum(step[key] for step in part["steps"]) == part[key]
            assert cost["without_figure"] == {}


def test_what_has_no_figure_is_named():
    counts = count_operations(LNFreeForCausalLM, tiny_config("SM+Derf+R", num_hidden_layers=1), length=5)
    for cost in counts["forward"]["estimates"].values():
        assert cost["without_figure"]["erf"]["elements"] == 3 * 5 * 32 and cost["without_figure"]["erf"]["what"]
    (row, _) = cost_rows([("x", counts["forward"])], [NETWORKS["lan"]])
    assert row["without a figure"] == "480 erf"


def test_tables_have_the_largest_first_and_show_what_is_in_the_counts():
    forward = count_operations(LNFreeForCausalLM, tiny_config("SM+LN+G"), length=9)["forward"]
    lan, slow = NETWORKS["lan"], Network("slow", 1000.0, 1.0)
    for rows in (operation_rows(forward, [slow, lan]), place_rows(forward, [slow, lan])):
        rows = [row for row in rows if not next(iter(row.values())).startswith("instead: ")]
        seconds = [row["SEMI2K: s on slow"] for row in rows]
        assert seconds == sorted(seconds, reverse=True)
        for row in rows:
            rounds, megabytes = row["SEMI2K: rounds"], row["SEMI2K: MB sent by each party"]
            assert row["SEMI2K: s on LAN"] == pytest.approx(rounds * 0.8e-3 + megabytes * 8e6 / 3e9)
        assert sum(row["SEMI2K: rounds"] for row in rows) == forward["estimates"]["SEMI2K"]["rounds"]
    named = [("a", forward), ("b", count_operations(LNFreeForCausalLM, tiny_config("SM+R"), length=9)["forward"])]
    first, second, *_ = cost_rows(named, [lan], forward)
    assert first["MB offline"] == forward["estimates"]["SEMI2K"]["offline_bytes"] / 1e6
    assert first["change on LAN"] == "0"
    expected = 100 * (second["s on LAN"] / first["s on LAN"] - 1)
    assert second["change on LAN"] == f"{expected:+.1f} %" and expected < 0
    steps = {(row["protocol"], row["operation"]) for row in step_rows(forward)}
    assert ("CrypTen", "LayerNorm rows") in steps and ("SEMI2K", "softmax rows") in steps
    for protocol in (SEMI2K, CRYPTEN):
        assert {row["source"] for row in step_rows(forward) if row["protocol"] == protocol.name} <= set(
            protocol.sources
        )
