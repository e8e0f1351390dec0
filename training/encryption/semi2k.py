"""SEMI2K of SPU, two parties: what each of its kernels costs, and how operations are composed of them."""

import math

from .prices import Cost, Protocol, Shape, Step


_SPU = "github.com/secretflow/spu, libspu/"
SOURCES = {
    "kernels": f"the cost that SPU's source states for each kernel: {_SPU}mpc/semi2k/conversion.h at 086ec9bc62ed, "
    "arithmetic.h at 15b63f65f4a3 and boolean.h at 074a387fbd15",
    "functions": f"exponential, reciprocal, inverse root, tanh: {_SPU}kernel/hal/fxp_approx.cc at 0967b9fc214f and "
    "fxp_base.cc at 064b97999bca, with 8 squarings and 2 Goldschmidt steps as by default; highest bit: ring.cc at "
    "023b1e6b6680",
    "softmax and GELU": "PUMA's (arXiv 2307.12533), as its benchmark computes them: "
    "github.com/AntCPLab/puma_benchmarks, bench_gpt2/bench_gpt2.py at b2e1cd4bb441",
    "LayerNorm": "Flax's, which that benchmark runs: means of x and of its square, inverse root, product with the "
    "gain, product with the centered x",
}

# Rounds, words of 64 bits that each party sends an element, and words that a dealer sends an element offline: K = 64,
# N = 2, log2(K) = 6. A dealer sends one party the correction of what the parties draw from seeds.
KERNELS = {
    "mul_aa": (1, 2, 1.0),
    "trunc_a": (1, 1, 2.0),  # probabilistic
    "msb_a2b": (6 + 1, 5, 2.5),
    "b2a": (1, 1, 1.0),  # of one bit
    "a2b": (6 + 1, (2 * 6 + 1) * 2, 13.0),
    "and_bb": (1, 2, 1.0),
    "equal_ap": (6 + 1, 2 * 6 + 1, 6.5),
    "v2a": (1, 1, 0.0),
    "a2v": (1, 1, 0.0),
}
_FRACTION_BITS = 18


def _run(kernels: str, elements: int, rounds: int | None = None) -> Cost:
    """Kernels one after the other on so many elements; in `rounds` where some run side by side."""
    found = [KERNELS[name] for name in kernels.split()]
    words = sum(kernel[1] for kernel in found) * elements
    dealt = math.ceil(8 * sum(kernel[2] for kernel in found) * elements)
    return Cost(sum(kernel[0] for kernel in found) if rounds is None else rounds, 2 * 8 * words, dealt)


_PRODUCT = "mul_aa trunc_a"  # in fixed point
_COMPARISON = "msb_a2b b2a mul_aa"  # and selection by its bit
_HIGHEST_BIT = "a2b" + 6 * " and_bb"


def _exponential(elements: int) -> list[Step]:
    return [
        Step(
            "exponential: (1 + x / 256)^256 by 8 squarings",
            "functions",
            _run(f"trunc_a {8 * f'{_PRODUCT} '}", elements),
        )
    ]


def _reciprocal(elements: int) -> list[Step]:
    factor = Cost(1, 16 * elements, 8 * 2 * _FRACTION_BITS * elements)  # b2a of 36 bits
    return [
        Step("reciprocal: sign", "functions", _run("msb_a2b b2a mul_aa", elements)),
        Step("reciprocal: highest bit", "functions", _run(_HIGHEST_BIT, elements) + factor),
        Step("reciprocal: normalized, first guess", "functions", _run(2 * f"{_PRODUCT} ", elements)),
        Step("reciprocal: 2 Goldschmidt steps", "functions", _run(3 * f"{_PRODUCT} ", elements, rounds=4)),
        Step("reciprocal: scaled back, sign", "functions", _run(f"{_PRODUCT} mul_aa", elements)),
    ]


def _inverse_root(elements: int) -> list[Step]:
    bits = Cost(1, 16 * elements, 8 * 2 * _FRACTION_BITS * elements)
    return [
        Step("inverse root: highest bit", "functions", _run(_HIGHEST_BIT, elements) + bits),
        Step("inverse root: normalized", "functions", _run(_PRODUCT, elements)),
        Step("inverse root: polynomial of degree 4", "functions", _run(f"{3 * f'{_PRODUCT} '} trunc_a", elements)),
        Step("inverse root: root of the power of 2", "functions", _run("b2a mul_aa", elements) + bits),
        Step("inverse root: product of both", "functions", _run(_PRODUCT, elements)),
    ]


def _opening(shape: Shape) -> list[Step]:
    cost = Cost(1, 2 * 8 * shape.elements, 8 * shape.output, shape.multiply_adds)
    return [Step("mmul_aa, mul_aa: both factors opened under a mask", "kernels", cost)]


def _weights_opened(shape: Shape) -> list[Step]:
    return _opening(shape._replace(elements=shape.elements - shape.weights))


def _truncation(shape: Shape) -> list[Step]:
    return [Step("trunc_a, probabilistic", "kernels", _run("trunc_a", shape.elements))]


def _relu(shape: Shape) -> list[Step]:
    return [Step("comparison with 0, selection", "kernels", _run(_COMPARISON, shape.elements))]


def _clamp(shape: Shape) -> list[Step]:
    return [
        Step("2 comparisons with their selections", "kernels", _run(f"{_COMPARISON} {_COMPARISON}", shape.elements))
    ]


def _bound(shape: Shape) -> list[Step]:
    return [Step("comparison with the bound, selection", "kernels", _run(_COMPARISON, shape.elements))]


def _gelu(shape: Shape) -> list[Step]:
    kernels = f"{3 * f'{_COMPARISON} '} {4 * f'{_PRODUCT} '} {7 * 'trunc_a '}"
    # the powers of x (7 rounds with their truncations) are ready before the comparisons
    cost = _run(kernels, shape.elements, rounds=9)
    return [
        Step(
            "3 comparisons with their selections, 4 products for the powers, 7 with coefficients",
            "softmax and GELU",
            cost,
        )
    ]


def _softmax(shape: Shape) -> list[Step]:
    length, rows = shape.row or 1, shape.rows
    if length == 1:
        return []
    levels = math.ceil(math.log2(length))
    return [
        Step(
            "maximum: a tree of comparisons",
            "softmax and GELU",
            _run(_COMPARISON, rows * (length - 1), rounds=9 * levels),
        ),
        *_exponential(shape.elements),
        Step("clipped: 0 where x < -14", "softmax and GELU", _run(_COMPARISON, shape.elements)),
        *_reciprocal(rows),
        Step("product of exponentials and reciprocals", "softmax and GELU", _run(_PRODUCT, shape.elements)),
    ]


def _layer_norm(shape: Shape) -> list[Step]:
    return [
        Step("mean", "LayerNorm", _run("trunc_a", shape.rows)),
        Step("squares, their mean", "LayerNorm", _run(_PRODUCT, shape.elements) + _run("trunc_a", shape.rows)),
        Step("square of the mean", "LayerNorm", _run(_PRODUCT, shape.rows)),
        *_inverse_root(shape.rows),
        Step("products with the gain and with x", "LayerNorm", _run(f"{_PRODUCT} {_PRODUCT}", shape.elements)),
    ]


def _rms_norm(shape: Shape) -> list[Step]:
    return [
        Step("squares, their mean", "LayerNorm", _run(_PRODUCT, shape.elements) + _run("trunc_a", shape.rows)),
        *_inverse_root(shape.rows),
        Step("products with the gain and with x", "LayerNorm", _run(f"{_PRODUCT} {_PRODUCT}", shape.elements)),
    ]


def _sigmoid(shape: Shape) -> list[Step]:
    return [*_exponential(shape.elements), *_reciprocal(shape.elements)]


def _silu(shape: Shape) -> list[Step]:
    return [*_sigmoid(shape), Step("product with x", "kernels", _run(_PRODUCT, shape.elements))]


def _tanh(shape: Shape) -> list[Step]:
    elements = shape.elements
    return [
        Step("clamped to -3, 3", "functions", _run(f"{_COMPARISON} {_COMPARISON}", elements)),
        Step("both polynomials of its Pade form", "functions", _run(3 * f"{_PRODUCT} ", elements)),
        *_reciprocal(elements),
        Step("quotient", "functions", _run(_PRODUCT, elements)),
    ]


def _one_hot(shape: Shape) -> list[Step]:
    """`elements` of the one-hot rows of length `row`, the vocabulary; `output` of the embeddings."""
    width = shape.output // shape.rows
    product = Cost(1, 2 * 8 * (shape.elements + (shape.row or 1) * width), 8 * shape.output, shape.multiply_adds)
    return [
        # one party alone sends, the other waits for it
        Step("the client shares one-hot rows (v2a)", "kernels", _run("v2a", shape.elements)),
        Step("their product with the shared table (mmul_aa)", "kernels", product),
    ]


def _one_hot_inside(shape: Shape) -> list[Step]:
    return [
        Step("each token compared with the vocabulary", "kernels", _run("equal_ap b2a", shape.elements)),
        _one_hot(shape)[1],
    ]


def _looked_up(shape: Shape) -> list[Step]:
    return [Step("the client shares embeddings", "kernels", _run("v2a", shape.output))]


def _revealed(shape: Shape) -> list[Step]:
    return [Step("the logits are opened to the client (a2v)", "kernels", _run("a2v", shape.elements))]


def _largest(shape: Shape) -> list[Step]:
    length = shape.row or 1
    levels = math.ceil(math.log2(length))
    # the number of the token is selected beside the value
    cost = _run(f"{_COMPARISON} mul_aa", shape.rows * (length - 1), rounds=9 * levels)
    return [Step("a tree of comparisons, selecting value and number", "kernels", cost)]


SEMI2K = Protocol(
    name="SEMI2K",
    setting="SEMI2K of SPU, 2 parties, 64-bit ring",
    sources=SOURCES,
    offline="a dealer who shares seeds with the parties, and sends one of them the corrections: "
    f"{_SPU}mpc/semi2k/beaver/beaver_impl/beaver_ttp.cc at 0491ab6c5720",
    operations={
        **{"opening": _opening, "truncation": _truncation, "softmax": _softmax},
        **{"layer_norm": _layer_norm, "rms_norm": _rms_norm, "gelu": _gelu, "relu": _relu, "leaky_relu": _relu},
        **{"silu": _silu, "sigmoid": _sigmoid, "tanh": _tanh},
        "reciprocal": lambda shape: _reciprocal(shape.elements),
        **{"clamp": _clamp, "clamp_min": _bound, "clamp_max": _bound},
        **{"embedding": _one_hot, "sampling": _revealed},
    },
    instead={
        "opening, each weight opened under one mask before all passes": _weights_opened,
        "embedding, one-hot rows made of shared tokens by the parties": _one_hot_inside,
        "embedding, looked up by the client in a public table": _looked_up,
        "sampling, the largest logit found by the parties": _largest,
    },
    absent={
        "erf": "SPU has no kernel for it, and the coefficients of the form that its compiler expands it to are below "
        "2^-18"
    },
)
