"""CrypTen 0.4.1, two parties: its functions composed of its primitives, as scripts/private_inference.py calls them."""

import math

from .prices import Cost, Protocol, Shape, Step


_CRYPTEN = "github.com/facebookresearch/CrypTen at 0.4.1, crypten/"
SOURCES = {
    "products": f"{_CRYPTEN}mpc/primitives/beaver.py: both factors are opened under a mask; truncation is local",
    "comparison": f"{_CRYPTEN}mpc/primitives/circuit.py, converters.py: an adder of 1 + 6 levels, then one bit opened",
    "maximum": f"{_CRYPTEN}common/functions/maximum.py, sampling.py: log_reduction, with the one-hot argmax that "
    "CrypTen always computes beside it",
    "functions": f"{_CRYPTEN}common/functions/approximations.py with configs/default.yaml: 8 squarings, 10 Newton "
    "steps of a reciprocal, 3 of an inverse root",
    "script": "scripts/private_inference.py; GELU by tanh",
}
# a word of 64 bits, sent by both parties
_WORDS = 2 * 8


def _product(left: int, right: int) -> Cost:
    return Cost(1, _WORDS * (left + right), 8 * max(left, right))


def _square(elements: int) -> Cost:
    return Cost(1, _WORDS * elements, 8 * elements)


def _and(elements: int) -> Cost:
    return _product(elements, elements)


def _open_bit(elements: int) -> Cost:
    return Cost(1, _WORDS * elements, 8 * elements)


def _negative(elements: int) -> Cost:
    """Whether x < 0: the parties' shares are added bit by bit, set and propagate bits side by side."""
    return _and(elements) + _and(2 * elements) * 6 + _open_bit(elements)


def _zero(elements: int) -> Cost:
    return _and(elements) * 6 + _open_bit(elements)


def _exponential(elements: int) -> Cost:
    return _square(elements) * 8


def _newton_reciprocal(elements: int, steps: int) -> Cost:
    return (_square(elements) + _product(elements, elements)) * steps


def _reciprocal(elements: int) -> Cost:
    """Of what is known to be positive."""
    return _exponential(elements) + _newton_reciprocal(elements, 10)


def _inverse_root(elements: int) -> Cost:
    return _exponential(elements) + (_square(elements) + _product(elements, elements) * 2) * 3


def _random_index(rows: int, length: int) -> Cost:
    """One of the positions that are marked in a row: 16 random bits, scaled, and a comparison with every sum."""
    return _open_bit(16 * rows) + _product(rows, rows) + _negative(rows * length)


def _pairwise_maximum(rows: int, length: int) -> Cost:
    others = max(length, 2) - 1
    cost = _negative(rows * length * others)
    if others < 128:
        left = others
        while left > 1:
            cost += _product(left // 2 * rows * length, left // 2 * rows * length)
            left = left // 2 + left % 2
    else:
        cost += _negative(rows * length)
    return cost + _random_index(rows, length) + _product(rows * length, rows * length)


def _maximum(rows: int, length: int) -> Cost:
    cost, left = Cost(), length
    for _ in range(int(math.log(length))):
        pairs = rows * (left // 2)
        cost += _negative(pairs) + _product(pairs, pairs) * 2
        left = left // 2 + left % 2
    return cost + _pairwise_maximum(rows, left) + _zero(rows * length) + _random_index(rows, length)


def _opening(shape: Shape) -> list[Step]:
    cost = Cost(1, _WORDS * shape.elements, 8 * shape.output, shape.multiply_adds)
    return [Step("both factors opened under a mask", "products", cost)]


def _weights_opened(shape: Shape) -> list[Step]:
    return _opening(shape._replace(elements=shape.elements - shape.weights))


def _local(shape: Shape) -> list[Step]:
    return []


def _relu_cost(elements: int) -> Cost:
    return _negative(elements) + _product(elements, elements)


def _relu(shape: Shape) -> list[Step]:
    return [Step("comparison with 0, product with its bit", "comparison", _relu_cost(shape.elements))]


def _clamp(shape: Shape) -> list[Step]:
    return [Step("hardtanh: 2 ReLUs side by side", "comparison", _relu_cost(2 * shape.elements))]


def _softmax(shape: Shape) -> list[Step]:
    length, rows = shape.row or 1, shape.rows
    return [
        Step("maximum", "maximum", _maximum(rows, length)),
        Step("exponential: (1 + x / 256)^256 by 8 squarings", "functions", _exponential(shape.elements)),
        Step("reciprocal: exponential, 10 Newton steps", "functions", _reciprocal(rows)),
        Step("product of exponentials and reciprocals", "functions", _product(shape.elements, rows)),
    ]


def _layer_norm(shape: Shape) -> list[Step]:
    return [
        Step("squares", "script", _square(shape.elements)),
        Step("inverse root: exponential, 3 Newton steps", "functions", _inverse_root(shape.rows)),
        Step("product with the inverse root", "script", _product(shape.elements, shape.rows)),
        Step("product with the gain", "script", _product(shape.elements, shape.row or 1)),
    ]


def _sigmoid(shape: Shape) -> list[Step]:
    elements = shape.elements
    return [
        Step("sign, absolute value", "functions", _relu_cost(elements)),
        Step("exponential: (1 + x / 256)^256 by 8 squarings", "functions", _exponential(elements)),
        # the first of three is of a public start
        Step("reciprocal: 2 Newton steps", "functions", _newton_reciprocal(elements, 2)),
        Step("selection by the sign", "functions", _product(elements, elements) * 2),
    ]


def _divisor(shape: Shape) -> list[Step]:
    """The reciprocal of what may have any sign."""
    elements = shape.elements
    return [
        Step("sign, absolute value", "functions", _relu_cost(elements)),
        Step("reciprocal: exponential, 10 Newton steps", "functions", _reciprocal(elements)),
        Step("product with the sign", "functions", _product(elements, elements)),
    ]


def _silu(shape: Shape) -> list[Step]:
    return [*_sigmoid(shape), Step("product with x", "products", _product(shape.elements, shape.elements))]


def _gelu(shape: Shape) -> list[Step]:
    elements = shape.elements
    return [
        Step("cube of x", "script", _square(elements) + _product(elements, elements)),
        *_sigmoid(shape),
        Step("product with x", "products", _product(elements, elements)),
    ]


def _one_hot(shape: Shape) -> list[Step]:
    """`elements` of the one-hot rows of length `row`, the vocabulary; `output` of the embeddings."""
    width = shape.output // shape.rows
    cost = Cost(1, _WORDS * (shape.elements + (shape.row or 1) * width), 8 * shape.output, shape.multiply_adds)
    # sharing them needs no message, since one party's share comes from a common seed
    return [Step("product of the client's one-hot rows and the shared table", "products", cost)]


def _one_hot_inside(shape: Shape) -> list[Step]:
    return [Step("each token compared with the vocabulary", "comparison", _zero(shape.elements)), *_one_hot(shape)]


def _revealed(shape: Shape) -> list[Step]:
    # the server alone sends
    return [Step("the logits are opened to the client", "products", Cost(1, 8 * shape.elements))]


def _largest(shape: Shape) -> list[Step]:
    return [Step("maximum", "maximum", _maximum(shape.rows, shape.row or 1))]


CRYPTEN = Protocol(
    name="CrypTen",
    setting="CrypTen 0.4.1, 2 parties, 64-bit ring, 16 fractional bits",
    sources=SOURCES,
    offline="a dealer who shares seeds with the parties, and sends one of them what follows from both: "
    f"{_CRYPTEN}mpc/provider/ttp_provider.py",
    operations={
        **{"opening": _opening, "truncation": _local, "softmax": _softmax},
        **{"layer_norm": _layer_norm, "rms_norm": _layer_norm, "gelu": _gelu, "relu": _relu, "leaky_relu": _relu},
        **{"silu": _silu, "sigmoid": _sigmoid, "tanh": _sigmoid, "reciprocal": _divisor},
        **{"clamp": _clamp, "clamp_min": _relu, "clamp_max": _relu},
        **{"embedding": _one_hot, "sampling": _revealed},
    },
    instead={
        "opening, each weight opened under one mask before all passes": _weights_opened,
        "embedding, one-hot rows made of shared tokens by the parties": _one_hot_inside,
        "embedding, looked up by the client in a public table": _local,
        "sampling, the largest logit found by the parties": _largest,
    },
    # as `bash scripts/private_inference.sh` fits them: the models of docs/encryption.md, and at 128 tokens three of
    # one or two blocks of width 256 to 1,024 (relative error 8 %)
    rates=(
        2.1e-10,
        2.9e-9,
        1.2e-3,
        "measured with CrypTen, one thread of an AMD EPYC for each party, dealing included",
    ),
    absent={"erf": "CrypTen computes odd powers from the fifth on as others, and its series diverges beside that"},
)
