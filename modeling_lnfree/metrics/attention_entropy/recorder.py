"""The attention entropy of any model of transformers while it runs: what each attention call read, and its record."""

import functools
import inspect
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface

from .entropy import Measurement, largest_entropy, measure_attention
from .record import AttentionEntropyRecord
from .visibility import MaskOrigin, describe_mask, read_visibility


# in the names that attention modules give to the states of another sequence
_SECOND_SEQUENCE = ("encoder", "key_value", "cross", "context", "memory")


class _Unmeasured(Exception):
    """Why an attention call cannot be measured."""


class LayerEntropy(NamedTuple):
    """One measurement of one layer, as `on_layer` of `record_attention_entropy` gets it."""

    layer: str  # name of the attention module, as in `AttentionEntropyRecord.layer_names`
    entropy: Tensor  # (batch, heads, T), in nats; NaN where the query is padding, sees no key or is broken
    max_entropy: Tensor  # log of the number of keys that each query sees, (batch | 1, heads | 1, T)


class _Call(NamedTuple):
    """One call of an attention function: what it was given, and what it returned."""

    implementation: str
    function: Callable
    module: nn.Module
    query: Tensor
    key: Tensor
    attention_mask: Tensor | BlockMask | None
    args: tuple  # those behind the mask
    kwargs: dict[str, Any]
    output: Any

    @property
    def weights(self) -> Tensor | None:
        """The attention weights, of functions that return them."""
        return self.output[1] if isinstance(self.output, tuple) and len(self.output) > 1 else None

    def named_arguments(self) -> dict[str, Any]:
        if not self.args:
            return self.kwargs
        names = list(inspect.signature(self.function).parameters)[5:]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}


class _Pass(threading.local):
    """The forward pass that a thread is in: from the outermost call of a module with recorded layers to its end."""

    def __init__(self):
        self.begin(None)

    def begin(self, root: nn.Module | None) -> None:
        self.root = root
        # of the modules around the first attention layer
        self.inputs: list[tuple[nn.Module, tuple, dict[str, Any]]] = []
        # of each layer that was called: the number of its run, whether that reads a second sequence, and the mask of a
        # mask function that it was given
        self.runs: dict[nn.Module, int] = {}
        self.crosses: dict[nn.Module, bool] = {}
        self.origins: dict[nn.Module, MaskOrigin | None] = {}
        # of each layer that is running: the queries and keys of its attention calls so far
        self.running: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}


class _Recorder:
    """Measures the attention of the modules of one model into one record."""

    def __init__(
        self,
        model: nn.Module,
        padding_mask: Tensor | None,
        logits: bool,
        differentiable: bool,
        on_layer: Callable[[LayerEntropy], None] | None,
    ):
        modules = dict(model.named_modules())
        layers = {
            module: name
            for name, module in modules.items()
            if uses_attention_interface(type(module))  # type: ignore[arg-type]  # a class is hashable
        }
        if not layers:
            raise ValueError(
                f"{type(model).__name__} computes its attention itself and not by the attention interface of "
                "transformers (ALL_ATTENTION_FUNCTIONS), so its queries and keys cannot be seen"
            )
        configs = [vars(module).get("config") for module in modules.values()]
        # the configuration of an encoder-decoder is also that of its encoder alone
        decodes = any(getattr(layer, "is_decoder", True) for layer in layers)
        if any(getattr(config, "add_cross_attention", False) for config in configs) or (
            decodes and any(getattr(config, "is_encoder_decoder", False) for config in configs)
        ):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, or a part of one, with cross attention, which is not "
                "told which of its queries are padding"
            )
        if padding_mask is not None and padding_mask.ndim != 2:
            raise ValueError(f"padding_mask must be (batch, T), got shape {tuple(padding_mask.shape)}")
        self.record = AttentionEntropyRecord()
        self._names = layers
        self._positions = {layer: position for position, layer in enumerate(layers)}
        paths = {name.rpartition(".")[0] for name in layers.values() if name}
        while new := {path.rpartition(".")[0] for path in paths} - paths:
            paths |= new
        # not those in a list: a pass is one of the model, or of a part that is compiled by itself
        self._around = {
            modules[path]: set(modules[path].modules())
            for path in sorted(paths)
            if _is_compiled(modules[path]) or not any(part.isdigit() for part in path.split("."))
        }
        self._beside = _attention_beside(modules, layers, {modules[path] for path in paths})
        self._padding_mask, self._logits = padding_mask, logits
        self._differentiable, self._on_layer = differentiable, on_layer
        self._masks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._pass = _Pass()
        # what was not measured: reason -> name of the layer -> number of its calls
        self._missed: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._passes = self._unseen_passes = 0
        self._calls: dict[nn.Module, int] = defaultdict(int)

    # ---- passes and runs

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With hooks that tell passes and runs apart, and what is called and not seen."""

        recorded = {*self._around, *self._names, *self._beside}

        # functions and not methods: a copy of the model that is made meanwhile shall not copy the recorder
        def hook(method: Callable, in_graphs: bool) -> Callable:
            def function(module, *args):
                # a copy of the model has these hooks too, and is not measured; a run leaves no break in a graph; nor
                # is the second computation of a checkpointed layer one
                if not torch.compiler.is_compiling() and not _in_backward() and module in recorded:
                    method(module, *args)

            return torch.compiler.disable(function) if in_graphs else function

        pass_begins, pass_ends = (hook(method, in_graphs=True) for method in (self._enter, self._leave))
        run_begins, run_ends, called_beside = (
            hook(method, in_graphs=False) for method in (self._begin_run, self._end_run, self._call_beside)
        )
        with ExitStack() as hooks:
            for module in self._around:
                hooks.enter_context(module.register_forward_pre_hook(pass_begins, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(pass_ends))
            for module in self._names:
                hooks.enter_context(module.register_forward_pre_hook(run_begins, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(run_ends))
            for module in self._beside:
                hooks.enter_context(module.register_forward_pre_hook(called_beside))
            yield

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        root = self._pass.root
        # the root itself comes again where an exception ended its last pass
        if root is None or module is root or module not in self._around[root]:
            self._pass.begin(module)
            self._passes += 1
        self._calls[module] += 1
        if not self._pass.runs:
            self._pass.inputs.append((module, args, kwargs))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if module is self._pass.root:
            self._unseen_passes += not self._pass.runs
            self._pass.begin(None)

    def _begin_run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self._pass
        if state.root is None:
            state.begin(None)
        self._calls[module] += 1
        state.runs[module] = state.runs.get(module, -1) + 1
        state.crosses[module] = _reads_second_sequence(module, args, kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | BlockMask)]
        state.origins[module] = next((self._masks[value] for value in given if value in self._masks), None)
        state.running[module] = []

    def _end_run(self, module: nn.Module, *_: Any) -> None:
        if self._pass.running.pop(module, None) == []:
            self._miss(module, "its calls were not seen, it computed its attention by itself in them")

    def _call_beside(self, module: nn.Module, *_: Any) -> None:
        self._missed["not seen, as it computes its attention by itself"][self._beside[module]] += 1

    def _see(self, call: _Call) -> bool:
        """Whether an attention call is not yet counted: a layer may attend by the same weights to parts of its values.
        In a call that no hook tells of, as in a graph, an attention call is a run."""
        state, module = self._pass, call.module
        if module not in state.running:
            self._calls[module] += 1
            state.runs[module] = 0 if state.root is None else state.runs.get(module, -1) + 1
            return True
        counted = any(query is call.query and key is call.key for query, key in state.running[module])
        state.running[module].append((call.query, call.key))
        return not counted

    def _miss(self, module: nn.Module, reason: str) -> None:
        self._missed[reason][self._name(module)] += 1

    def _name(self, module: nn.Module) -> str:
        run = self._pass.runs.get(module, 0)
        return self._names[module] + (f"[{run}]" if run else "")

    # ---- masks

    @torch.compiler.disable
    def remember_mask(self, mask: Any, arguments: dict[str, Any]) -> None:
        if mask is None or _in_backward():
            return
        try:
            self._masks[mask] = describe_mask(mask, **arguments)
        # an instrument does not stop the model; a mask of unknown origin is dealt with where it is used
        except Exception:
            pass

    def _origin(self, attention_mask: Tensor | BlockMask | None) -> MaskOrigin | None:
        """What the mask stands for, if a mask function made it, or one of the same content."""
        if attention_mask is None:
            return None
        if attention_mask in self._masks:
            return self._masks[attention_mask]
        for mask, origin in self._masks.items():
            if isinstance(mask, Tensor) and isinstance(attention_mask, Tensor) and mask.ndim == 4:
                same_kind = mask.dtype == attention_mask.dtype and mask.device == attention_mask.device
                if same_kind and torch.equal(mask, attention_mask):
                    return origin
        return None

    def _padded(
        self, module: nn.Module, attention_mask: Tensor | BlockMask | None, origin: MaskOrigin | None, query: Tensor
    ) -> Tensor | None:
        """Which queries are padding, bool, `(batch | 1, T)`; None where none is."""
        batch, _, num_queries, _ = query.shape
        if self._padding_mask is not None:
            if self._padding_mask.shape != (batch, num_queries):
                raise _Unmeasured(
                    f"padding_mask is {tuple(self._padding_mask.shape)}, its queries are {(batch, num_queries)}"
                )
            return ~self._padding_mask.to(query.device).bool()
        crosses = self._pass.crosses.get(module, False)
        if not crosses and attention_mask is None:
            return None
        origin = origin or self._pass.origins.get(module)
        if not crosses and origin is not None:
            if origin.told is None:
                return None
            if origin.padded is not None and origin.padded.shape[1] == num_queries:
                return origin.padded
        if any(bool((mask == 0).any()) for mask in self._padding_masks()):
            raise _Unmeasured("some inputs are padding, and which of its queries are is not known: pass padding_mask=")
        return None

    def _padding_masks(self) -> Iterator[Tensor]:
        """All that says which inputs are padding: what mask functions were told, and what the model was given."""
        for origin in self._masks.values():
            if origin.told is not None:
                yield origin.told
        for module, args, kwargs in self._pass.inputs:
            for name, value in named_arguments(module, args, kwargs):
                if name.endswith("mask") and isinstance(value, Tensor) and value.ndim in (2, 3):
                    yield value

    # ---- measurements

    # not traced: the numbers leave the graph of a compiled model
    @torch.compiler.disable
    def measure(self, call: _Call) -> None:
        """One call of an attention function; nothing that goes wrong here reaches the model."""
        module = call.module
        # in the backward pass, a checkpointed layer is computed a second time
        again = _in_backward()
        if module not in self._names or (again and not self._differentiable):
            return
        if not again and not self._see(call):
            return
        name = self._name(module)
        try:
            with torch.set_grad_enabled(self._differentiable and torch.is_grad_enabled()):
                measured, largest = self._measure(call, **call.named_arguments())
            if again:
                return
            row = (self._positions[module], self._pass.runs[module])
            self.record.add(row, name, measured.total, measured.logits)
        except Exception as error:  # an instrument does not stop the model: what it cannot read is told at the end
            if not again:
                reason = f"its call cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
                self._miss(module, str(error) if isinstance(error, _Unmeasured) else reason)
            return
        if self._on_layer is not None:
            self._on_layer(LayerEntropy(name, measured.entropy, largest()))

    def _measure(
        self,
        call: _Call,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        softmax_clipping: float | None = None,
        s_aux: Tensor | None = None,
        sinks: Tensor | None = None,
        **kwargs,
    ) -> tuple[Measurement, Callable[[], Tensor]]:
        if call.query.device.type == "meta":
            raise _Unmeasured("its tensors hold no numbers")
        if torch._C._functorch.is_functorch_wrapped_tensor(call.query):
            raise _Unmeasured("it ran inside a transformation of torch.func")
        origin = self._origin(call.attention_mask)
        # without the tangents of forward-mode differentiation
        query, key = unpack_dual(call.query).primal, unpack_dual(call.key).primal
        # attention broadcasts a batch of one, as of learned queries
        batch = max(len(query), len(key))
        query, key = (states.expand(batch, -1, -1, -1) for states in (query, key))
        padded = self._padded(call.module, call.attention_mask, origin, query)
        key, visibility, bias = read_visibility(
            call.implementation, call.module, query, key, call.attention_mask, origin, call.weights, **kwargs
        )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if call.implementation == "sdpa":
            # it leaves out both, where transformers does not refuse it: before 5.24, Gemma 2's softcap
            s_aux = softcap = None
        # one a head; `sinks`, as of Inkling 2, are one a query
        if s_aux is not None:
            sinks = s_aux.view(1, -1, 1, 1)
        scored: dict[str, Any] = {"bias": bias, "softcap": softcap, "sinks": sinks, "clipping": softmax_clipping}
        measured = measure_attention(query, key, scaling, visibility, **scored, padded=padded, logits=self._logits)
        # tensors without numbers have a class of their own, or make the others so
        if type(measured.total) is not Tensor:
            raise _Unmeasured("its tensors hold no numbers")
        return measured, functools.partial(largest_entropy, visibility, sinks)

    # ---- the end

    def close(self) -> None:
        """Say what was not measured, in the record and in one warning."""
        self._pass.begin(None)
        self._masks = WeakIdKeyDictionary()
        sentences = []
        if self._unseen_passes:
            sentences.append(
                f"{self._unseen_passes} of {self._passes} forward passes called no attention layer that could be "
                "seen, as graphs do that torch.compile made before"
            )
        for module in self._names:
            # a part of the model may be compiled by itself
            around = [part for part, inside in self._around.items() if _is_compiled(part) and module in inside]
            ran = max((self._calls[part] for part in around), default=0)
            if not self._unseen_passes and self._calls[module] < ran:
                self._missed["its calls in graphs that torch.compile made before cannot be seen"][
                    self._names[module]
                ] = ran - self._calls[module]
        for reason, calls in self._missed.items():
            names, number = list(calls), sum(calls.values())
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            sentences.append(f"{shown} ({number} call{'s' * (number > 1)}): {reason}")
        self.record.unmeasured = sentences
        if sentences:
            warnings.warn("attention entropy is not of all that ran: " + "; ".join(sentences), stacklevel=4)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    kind = type(module)
    names = [name for name in _signature(kind).parameters if name != "self"]  # type: ignore[arg-type]  # is hashable
    yield from zip(names, args, strict=False)
    yield from kwargs.items()


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _reads_second_sequence(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an attention module gets another sequence beside its hidden states, by the names that such have."""
    return any(
        isinstance(value, Tensor) and value.ndim == 3 and any(word in name for word in _SECOND_SEQUENCE)
        for name, value in named_arguments(module, args, kwargs)
    )


def _attention_beside(
    modules: dict[str, nn.Module], layers: dict[nn.Module, str], around: set[nn.Module]
) -> dict[nn.Module, str]:
    """Modules that are named attention, and neither are in nor have recorded layers; the outermost of them."""
    found: dict[nn.Module, str] = {}
    known = set().union(*(layer.modules() for layer in layers))
    for name, module in modules.items():
        kind = type(module).__name__.lower()
        if ("attention" in kind or "attn" in kind) and module not in known and module not in around:
            found[module] = name
            known.update(module.modules())
    return found


@functools.cache
def uses_attention_interface(kind: type[nn.Module]) -> bool:
    """Whether a kind of module looks its attention function up in the interface of transformers."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


# the recorders of all open blocks, of whatever thread
_open: list[_Recorder] = []
_lock = threading.Lock()


@contextmanager
def _opened(recorder: _Recorder) -> Iterator[None]:
    with _lock:
        _read_interfaces()
        _open.append(recorder)
    try:
        yield
    finally:
        with _lock:
            _open.remove(recorder)


# no guard: a graph that was compiled outside of a block stays as it is
@torch.compiler.assume_constant_result
def _is_read() -> bool:
    return bool(_open)


@functools.cache
def _read_interfaces() -> None:
    """Has the interfaces hand out functions whose calls the open recorders read, and their own while none is open.
    For good: Python 3.13 counts the changes of a class, and after some hundred it calls methods that were replaced."""
    get_interface, get_attention = AttentionInterface.get_interface, AttentionInterface.__getitem__
    get_mask = AttentionMaskInterface.__getitem__

    def measured(function: Callable, implementation: str) -> Callable:
        @functools.wraps(function)
        def attention(module, query, key, value, attention_mask, *args, **kwargs):
            output = function(module, query, key, value, attention_mask, *args, **kwargs)
            call = _Call(implementation, function, module, query, key, attention_mask, args, kwargs, output)
            for recorder in tuple(_open):
                recorder.measure(call)
            return output

        return attention

    @functools.wraps(get_interface)
    def measured_interface(self, attn_implementation, default):
        # what is registered comes from `measured_attention`; the model's own eager function is not
        if _is_read() and attn_implementation not in self:
            default = measured(default, "eager")
        return get_interface(self, attn_implementation, default)

    @functools.wraps(get_attention)
    def measured_attention(self, implementation):
        function = get_attention(self, implementation)
        return measured(function, implementation) if _is_read() else function

    @functools.wraps(get_mask)
    def remembered_mask(self, implementation):
        function = get_mask(self, implementation)
        if not _is_read():
            return function

        @functools.wraps(function)
        def mask_function(*args, **kwargs):
            mask = function(*args, **kwargs)
            for recorder in tuple(_open):
                recorder.remember_mask(mask, kwargs)
            return mask

        return mask_function

    AttentionInterface.get_interface = measured_interface  # type: ignore[method-assign]
    AttentionInterface.__getitem__ = measured_attention  # type: ignore[method-assign]
    AttentionMaskInterface.__getitem__ = remembered_mask  # type: ignore[method-assign]


@contextmanager
def record_attention_entropy(
    model: nn.Module,
    *,
    padding_mask: Tensor | None = None,
    reduce: bool = True,
    logits: bool = False,
    differentiable: bool = False,
    on_layer: Callable[[LayerEntropy], None] | None = None,
) -> Iterator[AttentionEntropyRecord]:
    """Measure the attention entropy of every head of `model` in all its forward passes inside the `with` block.

    ```python
    with record_attention_entropy(model) as record:
        model(**batch)
    record.entropy  # (layers, heads), in nats
    ```

    It stands in the interfaces by which transformers looks up attention and mask functions, calls what the model would
    have called with the same arguments, and reads them: the outputs of the model do not change by one bit, whatever
    its implementation (eager, sdpa, flex, flash). It draws no random numbers and stops no forward pass, and outside of
    the block, also after an exception, the interfaces hand out what is theirs. Several may be open at once, of the
    same or of other models, also in other threads.

    What is measured: the distribution before dropout, in float32 at least, also under autocast; each query once,
    also where gradient checkpointing computes it again; cached decoding as it happens, one query a step. A module that
    runs several times in a forward pass has a row a run. Queries that are padding are left out, and those that see no
    key. Of an LNFree model it is the softmax, before attention gains and gates; where that is clipped, the clipped
    weights divided by their sum, and a query that has none left is NaN, counted, and not in the mean. Padding is
    what the mask function of the attention was told, or `padding_mask`; where a batch is padded and neither says which
    queries are, as for masks that a model makes by itself, the layer is not measured. With a 4-D mask of your own all
    queries count that see a key. An attention sink is one more key that every query sees.

    What the model ran and the record does not hold is said in one warning when the block is left, and stands in
    `record.unmeasured`: layers that compute their attention by themselves, graphs that `torch.compile` made before the
    block, and calls that cannot be read.

    The numbers are added up on the device of each layer, which nothing waits for until a result is read, but where a
    mask is not known.

    Args:
        model (`torch.nn.Module`): a model of transformers, or a module that holds one; only its modules are measured.
        padding_mask (`torch.Tensor` of shape `(batch, T)`, *optional*): 0 where a query is padding, for all forward
            passes in the block, instead of what the model is told. Calls with other queries are not measured.
        reduce (`bool`, defaults to `True`): where `torch.distributed` is initialized, add up the measurements of all
            processes when the block is left without an exception, so that all see the results of the whole batch.
            This is a collective: all processes must enter the block. Pass False to measure in one of them only, or
            when the processes hold parts of the heads (tensor parallelism).
        logits (`bool`, defaults to `False`): look at the scores too, for `record.max_logit`, `sink_share`,
            `logsumexp` and `spectral_gap`; about twice the time of the entropy, and from the same pass on a GPU.
        differentiable (`bool`, defaults to `False`): hand entropies that are attached to the graph to `on_layer`,
            where gradients are enabled. No attention map is kept for them. A function of them belongs behind the
            forward pass, not into `on_layer`; checkpointing must not be reentrant.
        on_layer (`Callable`, *optional*): called with a `LayerEntropy` at each attention call that is measured: the
            name of the layer, the entropy of every query, and the largest that it can reach.

    Raises:
        ValueError: if the model does not use the attention interface (BLOOM, MPT and Falcon do not), or has cross
            attention, as encoder-decoders have; their encoder by itself is measured.
    """
    recorder = _Recorder(model, padding_mask, logits, differentiable, on_layer)
    with recorder.hooked(), _opened(recorder):
        yield recorder.record
    if reduce and torch.distributed.is_available() and torch.distributed.is_initialized():
        recorder.record.all_reduce()
    recorder.close()
