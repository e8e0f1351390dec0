"""What operations cost under encryption: published figures of one protocol, and what has none."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Price:
    """What one element (`bits` that each of two parties sends) and one call (`rounds`) of an operation cost."""

    rounds: int
    bits: int
    composition: str


# Ring elements of K = 64 bits, N = 2 parties, log2(64) = 6. Online phase only.
PROTOCOL = "SEMI2K of SPU, 2 parties, 64-bit ring, online phase; rounds and bits, so of no particular network"


SOURCES = {
    "kernels": "the cost that SPU's source states for each kernel: github.com/secretflow/spu, "
    "libspu/mpc/semi2k/conversion.h at 086ec9bc62ed and arithmetic.h at 15b63f65f4a3",
    "gelu": "PUMA's piecewise polynomial (arXiv 2307.12533) as its benchmark computes it: "
    "github.com/AntCPLab/puma_benchmarks, bench_gpt2/bench_gpt2.py at b2e1cd4bb441",
}


PRICES = {
    "comparison": Price(
        rounds=(6 + 1) + 1 + 1,
        bits=(5 + 1 + 2) * 64,
        composition="msb_a2b (log K + 1 rounds, 5 K bits), b2a (1, K), and mul_aa (1, 2 K) to select by the bit",
    ),
    "gelu": Price(
        # the powers of x (7 rounds with their truncations) are ready before the comparisons
        rounds=(6 + 1) + 1 + 1,
        bits=(3 * (5 + 1 + 2) + 4 * (2 + 1) + 7 * 1) * 64,
        composition="3 comparisons with their selections, 4 products for the powers of x (mul_aa, trunc_a), "
        "7 products with coefficients (trunc_a)",
    ),
    "opening": Price(rounds=1, bits=64, composition="mmul_aa, mul_aa (1 round, K bits an element of either factor)"),
    "truncation": Price(rounds=1, bits=64, composition="trunc_a, probabilistic (1 round, K bits)"),
}


# What has no published figure that could be checked. The comparisons of a softmax are priced; this is what remains.
UNPRICED = {
    "softmax": "the exponentials and the reciprocal of its sums",
    "layer_norm": "all of it: squares, inverse root, products",
    "rms_norm": "all of it: squares, inverse root, products",
}


def estimate(total: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """
    From `PRICES`: what the operations with a published figure cost, one after the other.

    Returns:
        `rounds`, `bytes_per_party` (sent by each of two parties), `by_operation` with both, `without_figure` (what is
        left out, by operation), `protocol` and `sources`.
    """
    by_operation = {
        name: {
            "rounds": price.rounds * total[name]["calls"],
            "bytes_per_party": price.bits * total[name]["elements"] // 8,
            "composition": price.composition,
        }
        for name, price in PRICES.items()
        if name in total
    }
    priced = {*PRICES, "matmul", "relu", "leaky_relu", "clamp"}
    return {
        "rounds": sum(cost["rounds"] for cost in by_operation.values()),
        "bytes_per_party": sum(cost["bytes_per_party"] for cost in by_operation.values()),
        "by_operation": by_operation,
        "without_figure": {
            name: {**count, "what": UNPRICED.get(name, "all of it")}
            for name, count in total.items()
            if name not in priced
        },
        "protocol": PROTOCOL,
        "sources": SOURCES,
    }
