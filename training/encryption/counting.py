"""
What a model costs under encryption: its operations on private data, counted by running it.

The model runs on torch's meta device, which computes shapes and no numbers, with eager attention, so that every
operation passes by a dispatch mode as the model asks for it; hooks on the blocks say whose it is. Any causal language
model of transformers is counted, at any size, from its configuration alone.

What is counted is what touches private data, everything that follows from the looked-up embeddings: positions, rotary
angles and causal masks are public, and so are the constants of a configuration. Weights are the server's, learned
gains, temperatures, gates and alphas among them: what the server computes of them alone is free, their product with
private data is one of two private tensors. A product with zeros is known to all to be 0, so the uniform weights of
shaped attention are public too.

- `softmax`, `layer_norm`, `rms_norm`: rows by their length. Hidden keys are part of a row, since eager attention
  computes them; a protocol may leave them out, since the causal mask is public.
- `gelu`, `relu`, `leaky_relu` and whatever else is not linear, under its name in torch: elements; `reciprocal`: those
  of private data that something is divided by, beside the product with it.
- `comparison`: one for every element of a ReLU or leaky ReLU, and for every element and bound of a clipping; n - 1 for
  the maximum of a softmax row of n.
- `matmul`: elements of the products; `opening`: elements of both factors of a product of two private tensors, which a
  protocol with multiplication triples opens under a mask.
- `truncation`: elements of products, which have twice the fractional bits: matrix products, products by element and
  with constants, and the leaky ReLU's slope. Those inside a softmax, a norm or a GELU depend on how a protocol
  approximates them, and are not counted.
- `embedding`: elements of the one-hot rows, tokens by vocabulary, whose product with the table looks tokens up;
  `sampling`: logits from which the next token is chosen.

`calls` is how many operations follow one another, with a maximum of n as ceil(log2(n)) comparisons.
"""

import copy
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_lnfree.modeling_lnfree import CACHE_NAME
from modeling_lnfree.residual_stream import find_layers
from modeling_lnfree.variants import BASELINE, as_variant

from .crypten import CRYPTEN
from .prices import Shape, estimate
from .semi2k import SEMI2K


PROTOCOLS = (SEMI2K, CRYPTEN)
PHASES = ("forward", "token", "generation")
OUTSIDE = "outside"  # of the blocks: embeddings, final norm, head

# modules that may compute by several operations of torch what counts as one here
_MODULES = {"GELU": "gelu", "RMSNorm": "rms_norm"}
_MATRIX_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # where the factors begin
# by a constant or by a private tensor
_PRODUCTS = {"mul", "div", "mean"}
_CONSTANTS = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
_LINEAR = {
    *("embedding", "add", "sub", "rsub", "neg", "sum", "cat", "stack", "clone", "alias", "detach", "copy", "_to_copy"),
    *("view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "expand", "repeat", "unsqueeze"),
    *("squeeze", "slice", "select", "split", "split_with_sizes", "where", "masked_fill", "index_select"),
}  # fmt: skip


@dataclass
class Tally:
    """How often an operation runs, and on how much: how many calls there are of each shape."""

    calls: int = 0
    shapes: Counter = field(default_factory=Counter)

    @property
    def elements(self) -> int:
        return sum(shape.elements * times for shape, times in self.shapes.items())

    def add(self, other: "Tally"):
        self.calls += other.calls
        self.shapes.update(other.shapes)

    def to_dict(self) -> dict[str, Any]:
        by_length: Counter = Counter()
        for shape, times in self.shapes.items():
            if shape.row is not None:
                by_length[shape.row] += shape.rows * times
        rows = {str(length): rows for length, rows in sorted(by_length.items())}
        return {"calls": self.calls, "elements": self.elements, **({"rows": rows} if rows else {})}


def count_operations(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    *,
    length: int,
    batch_size: int = 1,
    new_tokens: int = 0,
) -> dict[str, Any]:
    """
    Counts the operations on private data of one forward pass, of one more token with a cache and, with `new_tokens`,
    of generating so many.

    Args:
        model_class: of a causal language model, such as `LNFreeForCausalLM` or `GPT2LMHeadModel`.
        config: its configuration.
        length: tokens of the input.
        batch_size: inputs.
        new_tokens: tokens to generate after the input: a pass over the input that computes the last position's logits
            only, and `new_tokens - 1` passes over one token each.

    Returns:
        `forward`, `token` (a pass over the last token of the input with the others in the cache) and `generation` or
        None: each with `layers` (a dictionary by operation for every block), `outside`, `total`, and `estimates` by
        protocol (see `estimate`). An operation has `calls`, `elements`, and `rows` by their length.
        For an LNFree model other than SM+LN+G also `baseline`: the same of SM+LN+G with these sizes, totals only.

    Raises:
        ValueError: for a length past the model's positions, and for a model that cannot be run without its numbers.
    """
    if min(length, batch_size) < 1 or new_tokens < 0:
        raise ValueError(
            f"length and batch_size must be at least 1 and new_tokens at least 0, got length={length}, "
            f"batch_size={batch_size}, new_tokens={new_tokens}"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # the last new token is not an input
    if positions is not None and length + max(new_tokens - 1, 0) > positions:
        raise ValueError(
            f"length={length} and new_tokens={new_tokens} need {length + max(new_tokens - 1, 0)} positions, the model "
            f"has {positions}"
        )
    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    input_ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    counts = {
        "model_class": model_class.__name__,
        "variant": config.variant if config.model_type == "lnfree" else None,
        "batch_size": batch_size,
        "length": length,
        "new_tokens": new_tokens,
        "forward": _run(model, [input_ids]),
        "token": _run(model, [input_ids[:, :1]], cached=input_ids[:, 1:], logits_to_keep=1),
        "generation": None,
    }
    if new_tokens:
        inputs = [input_ids, *[input_ids[:, :1]] * (new_tokens - 1)]
        counts["generation"] = _run(model, inputs, logits_to_keep=1)
    if counts["variant"] not in (None, BASELINE):
        sizes = {"length": length, "batch_size": batch_size, "new_tokens": new_tokens}
        baseline = count_operations(model_class, as_variant(config, BASELINE), **sizes)
        counts["baseline"] = {
            "variant": BASELINE,
            **{phase: baseline[phase] and totals(baseline[phase]) for phase in PHASES},
        }
    return counts


@torch.no_grad()
def _run(
    model: PreTrainedModel, inputs: list[Tensor], cached: Tensor | None = None, logits_to_keep: int = 0
) -> dict[str, Any]:
    """Passes over the inputs, each with those before it in the cache, after an uncounted one over `cached`."""
    cache: dict[str, Any] = {}
    try:
        if cached is not None and cached.numel():
            cache = {CACHE_NAME: model(cached, use_cache=True, logits_to_keep=1)[CACHE_NAME]}
        with _OperationCounter(model) as counter:
            for input_ids in inputs:
                # a cache in any case: without one, transformers looks for packed sequences in the positions' numbers
                output = model(input_ids, use_cache=True, logits_to_keep=logits_to_keep, **cache)
                cache = {CACHE_NAME: output[CACHE_NAME]}
                counter.add("sampling", Shape(output.logits.numel(), row=output.logits.shape[-1]))
    except RuntimeError as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{type(model).__name__} cannot be run on the meta device: {message}") from error
    total: dict[str, Tally] = {}
    for tallies in counter.counts.values():
        for name, tally in tallies.items():
            total.setdefault(name, Tally()).add(tally)
    by_place = {
        place: {name: tally.to_dict() for name, tally in sorted(tallies.items())}
        for place, tallies in (*counter.counts.items(), ("total", total))
    }
    return {
        "layers": [by_place[str(index)] for index in range(counter.num_layers)],
        "outside": by_place[OUTSIDE],
        "total": by_place["total"],
        "estimates": {protocol.name: estimate(protocol, counter.counts) for protocol in PROTOCOLS},
    }


class PrivateDispatchMode(TorchDispatchMode):
    """Follows private data, from the looked-up embeddings, through every operation of torch."""

    def __init__(self):
        super().__init__()
        self.private, self.weights, self.zeros = (WeakIdKeyDictionary() for _ in range(3))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")  # in place or not
        inputs = _tensors((args, kwargs))
        private = [leaf for leaf in inputs if leaf in self.private]
        weights = [leaf for leaf in inputs if leaf in self.weights or isinstance(leaf, nn.Parameter)]
        if name in _CONSTANTS:
            found = self.zeros if name.endswith("zeros") or name == "zeros_like" else None
        elif any(leaf in self.zeros for leaf in inputs) and (
            len(inputs) == 1 or name in _PRODUCTS or name in _MATRIX_PRODUCTS
        ):
            found = self.zeros
        elif private or name == "embedding":
            outputs = self.on_private(func, args, outputs, [*private, *weights])
            found = self.private
        else:
            found = self.weights if weights else None
        if found is not None:
            found.update((leaf, True) for leaf in _tensors(outputs))
        return outputs

    def on_private(self, func, args: tuple, outputs, secret: list[Tensor]):
        """What an operation on private tensors returns, here `outputs`; `secret` are those and weights among them."""
        return outputs


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _OperationCounter(PrivateDispatchMode):
    """Counts by block, from the hooks, and by operation, from the dispatch, what touches private data."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        blocks = find_layers(model)
        self.num_layers = len(blocks)
        self.table = model.get_input_embeddings().weight
        self.counts: dict[str, dict[str, Tally]] = {OUTSIDE: {}, **{str(i): {} for i in range(self.num_layers)}}
        self.place = OUTSIDE
        self.composite: nn.Module | None = None
        self.handles = []
        for index, block in enumerate(blocks):
            self.handles.append(block.register_forward_pre_hook(lambda *_, place=str(index): self._enter(place)))
            self.handles.append(block.register_forward_hook(lambda *_: self._enter(OUTSIDE)))
        for module in model.modules():
            name = next((name for part, name in _MODULES.items() if part in type(module).__name__), None)
            if name is not None:
                self.handles.append(module.register_forward_pre_hook(lambda m, args, n=name: self._begin(n, m, args)))
                self.handles.append(module.register_forward_hook(lambda m, *_: self._end(m)))

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exception)

    def _enter(self, place: str):
        self.place = place

    def _begin(self, name: str, module: nn.Module, args: tuple[Tensor, ...]):
        if self.composite is None:
            self.composite = module
            self.add(name, Shape(args[0].numel(), row=args[0].shape[-1] if name == "rms_norm" else None))

    def _end(self, module: nn.Module):
        if self.composite is module:
            self.composite = None

    def on_private(self, func, args: tuple, outputs, secret: list[Tensor]):
        if self.composite is None:
            name = func.overloadpacket.__name__.rstrip("_")
            self._count(name, args, _tensors(outputs)[0], secret)
        return outputs

    def _count(self, name: str, args: tuple, output: Tensor, secret: list[Tensor]):
        size = output.numel()
        if name in _PRODUCTS or name in _MATRIX_PRODUCTS:
            first = _MATRIX_PRODUCTS.get(name, 0)
            factors = [leaf for leaf in args[first : first + 2] if any(leaf is one for one in secret)]
            multiply_adds = 0
            if name in _MATRIX_PRODUCTS:
                self.add("matmul", Shape(size))
                multiply_adds = size * args[first].shape[-1]
            if len(factors) == 2:
                elements = sum(factor.numel() for factor in factors)
                weights = sum(factor.numel() for factor in factors if factor not in self.private)
                self.add("opening", Shape(elements, None, size, multiply_adds, weights))
            self.add("truncation", Shape(size))
            if name == "div" and isinstance(args[1], Tensor) and args[1] in self.private:
                self.add("reciprocal", Shape(args[1].numel()))
        elif name == "_softmax":
            length = output.shape[args[1]]
            self.add("softmax", Shape(size, row=length))
            if length > 1:
                self.add("comparison", Shape(size - size // length), calls=math.ceil(math.log2(length)))
        elif name == "native_layer_norm":
            self.add("layer_norm", Shape(size, row=math.prod(args[1])))
        elif name in ("relu", "leaky_relu", "_prelu_kernel"):
            self.add("relu" if name == "relu" else "leaky_relu", Shape(size))
            self.add("comparison", Shape(size))
            if name != "relu":
                self.add("truncation", Shape(size))
        elif name == "clamp":
            bounds = sum(bound is not None for bound in args[1:])
            self.add("clamp" if bounds == 2 else "clamp_min", Shape(size))
            self.add("comparison", Shape(bounds * size), calls=bounds)
        elif name == "embedding" and args[0] is self.table:
            tokens, (vocabulary, width) = args[1].numel(), self.table.shape
            one_hot = Shape(tokens * vocabulary, vocabulary, tokens * width, tokens * vocabulary * width)
            self.add("embedding", one_hot)
        elif name not in _LINEAR:
            self.add(name, Shape(size))

    def add(self, name: str, shape: Shape, *, calls: int = 1):
        self.counts[self.place].setdefault(name, Tally()).add(Tally(calls, Counter({shape: 1})))


def totals(phase: dict[str, Any]) -> dict[str, Any]:
    """A phase without its blocks and steps."""
    estimates = {}
    for name, cost in phase["estimates"].items():
        operations = {
            operation: {key: value for key, value in part.items() if key != "steps"}
            for operation, part in cost["by_operation"].items()
        }
        estimates[name] = {
            **{key: value for key, value in cost.items() if key != "by_place"},
            "by_operation": operations,
        }
    return {"total": phase["total"], "estimates": estimates}
