"""`use_fast_cpu`: products by oneDNN and the lean loss, against torch and transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Conv1D, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_lnfree import LNFreeForSequenceClassification, cpu, use_fast_cpu
from modeling_lnfree.cpu import CrossEntropySum, causal_lm_loss, mkl_leaves_half_unused

from ..conftest import (
    every_backbone,
    every_variant,
    gradients,
    greedy,
    random_ids,
    tiny_config,
    tiny_model,
)


def fast_linear(in_features: int, out_features: int, bias: bool = False) -> torch.nn.Linear:
    return use_fast_cpu(torch.nn.Linear(in_features, out_features, bias=bias))


def operations_of(run) -> dict[str, int]:
    """FLOP of the run by operation."""
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}


def layouts(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Matrices of that shape: dense, transposed, one row or one number for all, with gaps, and off the alignment."""
    return {
        "dense": torch.randn(rows, columns),
        "transposed": torch.randn(columns, rows).t(),
        "one row": torch.randn(1, columns).expand(rows, columns),
        "one number": torch.randn(1, 1).expand(rows, columns),
        "gaps": torch.randn(2 * rows, 3 * columns)[::2, ::3],
        "unaligned": torch.randn(rows * columns + 1)[1:].view(rows, columns),
    }


def assert_equals_float64(states, weight, bias, grad):
    """Output and gradients of what needs one, by oneDNN."""
    layer = fast_linear(*weight.t().shape, bias is not None)
    layer.weight = torch.nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.detach(), bias.requires_grad)
    given = [tensor for tensor in (states, layer.weight, layer.bias) if tensor is not None]
    in_float64 = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in given]
    output, expected = layer(states), F.linear(*in_float64)
    tolerance = {"atol": 1e-6 * max(states.numel(), weight.numel()) ** 0.5, "rtol": 1e-5}
    torch.testing.assert_close(output.double(), expected, **tolerance)
    needed = [tensor for tensor in given if tensor.requires_grad]
    if needed:
        assert "lnfree.linear" in operations_of(lambda: layer(states))
        expected = torch.autograd.grad(expected, [t for t in in_float64 if t.requires_grad], grad.double())
        for ours, theirs in zip(torch.autograd.grad(output, needed, grad), expected, strict=True):
            assert ours.is_contiguous()
            torch.testing.assert_close(ours.double(), theirs, **tolerance)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.data())
def test_products_by_onednn_and_their_gradients_equal_float64(onednn, rows, inputs, outputs, has_bias, data):
    drawn = {"states": (rows, inputs), "weight": (outputs, inputs), "grad": (rows, outputs)}
    states, weight, grad = (
        layouts(*shape)[data.draw(st.sampled_from(list(layouts(1, 1))), label=name)] for name, shape in drawn.items()
    )
    bias = torch.randn(outputs) if has_bias else None
    for tensor in (states, weight, *([bias] if has_bias else [])):
        tensor.requires_grad_(data.draw(st.booleans(), label="needs a gradient"))
    batch = data.draw(st.sampled_from([(), (1,), (1, 1)]), label="further dimensions")
    assert_equals_float64(states.expand(*batch, -1, -1), weight, bias, grad.expand(*batch, -1, -1))


@pytest.mark.parametrize("shape", [(1024,), (700, 1024), (4, 33, 1024)], ids=str)
@pytest.mark.parametrize("outputs", [256, 5000])
def test_large_products_by_onednn_equal_float64(onednn, shape, outputs):
    states, weight = torch.randn(shape, requires_grad=True), torch.randn(outputs, 1024, requires_grad=True)
    assert_equals_float64(states, weight, torch.randn(outputs, requires_grad=True), torch.randn(*shape[:-1], outputs))


def test_operation_is_one_of_torchs(onednn):
    weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(4, requires_grad=True)
    for states in (torch.randn(3, 6, requires_grad=True), torch.randn(1, 6)):
        for added in (bias, None):
            # schema, autograd, shapes without values, and the same when compiled for sizes that change
            torch.library.opcheck(torch.ops.lnfree.linear.default, (states, weight, added))


@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_default_follows_the_processor_and_keeps_the_type_and_the_pickle(kind, onednn, monkeypatch, tmp_path):
    layer, states = use_fast_cpu(kind(4, 4)), torch.randn(3, 4)
    assert type(layer) is kind
    expected = layer(states)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert twin(states).equal(expected) and "lnfree.linear" in operations_of(lambda: twin(states))
    torch.save(twin, tmp_path / "layer.pt")
    read = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert read.forward.__func__ is kind.forward
    torch.testing.assert_close(read(states), expected)
    monkeypatch.undo()
    assert ("forward" in vars(use_fast_cpu(kind(4, 4)))) == cpu.USE_ONEDNN
    assert cpu.USE_ONEDNN == (mkl_leaves_half_unused() and not torch.accelerator.is_available())


@every_variant
@every_backbone
def test_model_by_onednn_equals_the_plain_one(onednn, monkeypatch, variant, backbone):
    model, input_ids = use_fast_cpu(tiny_model(variant, backbone, embedding_dropout=0.0)).train(), random_ids(2, 9)

    def train():
        model.zero_grad()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()

    by_onednn, found = operations_of(train), gradients(model)
    generated = greedy(model.eval(), input_ids)
    monkeypatch.setattr(cpu, "ONEDNN_SIZE", 2**62)
    by_torch, expected = operations_of(train), gradients(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert generated.equal(greedy(model, input_ids))
    assert "lnfree.linear" in by_onednn and not {"aten.mm", "aten.addmm"} & by_onednn.keys()
    assert "lnfree.linear" not in by_torch
    assert sum(by_onednn.values()) == sum(by_torch.values())


def stock_models() -> dict[str, torch.nn.Module]:
    sizes = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
    neox = GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **sizes)
    return {"gpt2": GPT2LMHeadModel(gpt2), "neox": GPTNeoXForCausalLM(neox)}


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_stock_models_by_onednn_equal_the_plain_ones(kind, onednn):
    model = stock_models()[kind].eval()
    fast, input_ids, found = use_fast_cpu(copy.deepcopy(model)), random_ids(2, 9), []
    for each in (model, fast):
        operations = operations_of(lambda each=each: each(input_ids, labels=input_ids).loss.backward())
        assert ("lnfree.linear" in operations) == (each is fast)
        assert ({"aten.mm", "aten.addmm"} & operations.keys() == set()) == (each is fast)
        found.append((each(input_ids).logits, gradients(each), greedy(each, input_ids, eos_token_id=None)))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert model.loss_function is ForCausalLMLoss and fast.loss_function is causal_lm_loss


def test_done_twice_is_done_once_and_what_others_put_in_place_stays(onednn):
    model = tiny_model("SM+R")
    assert use_fast_cpu(model) is model
    once = [dict(vars(module)).get("forward") for module in model.modules()]
    use_fast_cpu(model)
    assert [dict(vars(module)).get("forward") for module in model.modules()] == once
    assert sum(forward is not None for forward in once) == 3 * 6 + 1
    other = tiny_model("SM+R")
    other.lm_head.forward = forward = lambda states: states
    other.loss_function = loss = lambda **kwargs: 0.0
    use_fast_cpu(other)
    assert other.lm_head.forward is forward and other.loss_function is loss
    classifier = LNFreeForSequenceClassification(tiny_config(num_labels=3))
    assert use_fast_cpu(classifier).loss_function is not causal_lm_loss


def test_without_it_a_model_is_torchs_and_transformers_own():
    model, input_ids = tiny_model("SM+R"), random_ids(2, 9)
    assert model.loss_function is ForCausalLMLoss
    assert not any("forward" in vars(module) for module in model.modules())
    assert "lnfree.linear" not in operations_of(lambda: model(input_ids, labels=input_ids).loss.backward())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's forward mode uses torch.jit
def test_linear_has_the_derivatives_of_torchs_own(onednn):
    layer, plain = fast_linear(6, 4, bias=True), torch.nn.Linear(6, 4)
    plain.load_state_dict(layer.state_dict())
    states, tangent = torch.randn(3, 5, 6), torch.randn(3, 5, 6)

    def loss(module, states, parameters=None):
        return torch.func.functional_call(module, parameters or {}, states).tanh().sum()

    def second(module):
        leaf = states.clone().requires_grad_()
        first = torch.autograd.grad(loss(module, leaf), (leaf, *module.parameters()), create_graph=True)
        return torch.autograd.grad(sum(part.pow(2).sum() for part in first), (leaf, *module.parameters()))

    def each(module):
        parameters = dict(module.named_parameters())
        grads = torch.func.vmap(torch.func.grad(loss, argnums=2), (None, 0, None))(module, states, parameters)
        return tuple(grads.values())

    def forward(module):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(states, tangent)
            return torch.autograd.forward_ad.unpack_dual(module(dual)).tangent

    def batched(module):
        leaf = states.clone().requires_grad_()
        both = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)),)
        return torch.autograd.grad(module(leaf), (leaf, *module.parameters()), both, is_grads_batched=True)

    def changed_in_place(module):
        output = module(leaf := states.clone().requires_grad_())
        output[:, 2] = output[:, 1] * 2  # what interventions do in a hook
        return torch.autograd.grad(output.tanh().sum(), (leaf, *module.parameters()))

    def forward_of_the_bias(module):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(module.bias.detach(), tangent[0, 0, :4])
            output = torch.func.functional_call(module, {"bias": dual}, states)
            return torch.autograd.forward_ad.unpack_dual(output).tangent

    ways = {
        "forward of the bias": forward_of_the_bias,
        "changed in place": changed_in_place,
        "twice": second,
        "batched": batched,
        "of every example": each,
        "forward": forward,
        "jvp": lambda module: torch.func.jvp(module, (states,), (tangent,)),
        "hessian": lambda module: torch.func.hessian(lambda row: loss(module, row))(states[0, 0]),
        "vmap": lambda module: torch.func.vmap(module)(states),
    }
    for name, way in ways.items():
        torch.testing.assert_close(way(layer), way(plain), msg=name)
        with torch.no_grad():
            if name in ("forward", "forward of the bias", "jvp", "hessian", "vmap"):
                torch.testing.assert_close(way(layer), way(plain), msg=name)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:Sparse CSR tensor support", "ignore:TF32 acceleration"
)
def test_linear_leaves_other_tensors_to_torch(onednn):
    layer, states = fast_linear(6, 4, bias=True), torch.randn(3, 6)
    assert operations_of(lambda: layer(states)) == {"lnfree.linear": 2 * 3 * 6 * 4}
    assert layer(states[:0]).sum() == 0 and torch.autograd.grad(layer(states[:0]).sum(), layer.weight)[0].sum() == 0
    half = copy.deepcopy(layer).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(states).dtype == torch.bfloat16
    assert operations_of(lambda: half(states.bfloat16())) == {"aten.addmm": 2 * 3 * 6 * 4}
    assert torch.jit.trace(layer, states).graph.findNode("aten::linear") is not None
    exported = torch.export.export(layer, (states,))
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default
    ]
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(states)).shape == (3, 4)
    with torch.backends.mkldnn.flags(enabled=False):
        assert operations_of(lambda: layer(states)) == {"aten.addmm": 2 * 3 * 6 * 4}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(states[:, :5])
    expected, layer.weight = layer(states), torch.nn.Parameter(layer.weight.detach().to_sparse_csr())
    torch.testing.assert_close(layer(states), expected)


def test_parametrized_weight_is_computed_once(onednn):
    layer, states, seen = fast_linear(6, 4), torch.randn(3, 6), []

    class Halved(torch.nn.Module):
        def forward(self, weight):
            seen.append(weight)
            return weight / 2

    expected = layer(states) / 2
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    seen.clear()
    assert "lnfree.linear" in operations_of(lambda: torch.testing.assert_close(layer(states), expected))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "processor, slow",
    [
        ({"cpu_name": "AMD EPYC 9R45", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC 7B13", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Platinum 8581C CPU", "avx512_f": True}, False),
        ({"cpu_name": "Neoverse-V2", "architecture": "aarch64"}, False),
        (None, False),
    ],
    ids=["AMD", "AMD without AVX-512", "Intel", "ARM", "torch 2.9"],
)
def test_only_where_mkl_is_slow_products_go_by_onednn(monkeypatch, processor, slow):
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: True)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    if processor is None:
        monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    else:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: processor, raising=False)
    assert mkl_leaves_half_unused() == slow
    monkeypatch.setattr("torch.backends.mkl.is_available", lambda: False)
    assert not mkl_leaves_half_unused()


def shifted_cross_entropy(logits, labels, **kwargs):
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [7, 6000, CrossEntropySum.CHUNK + 1], ids=["small", "chunks", "a row a chunk"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_causal_lm_loss_and_its_gradient_match_torch(dtype, vocab_size, scale):
    logits = (scale * torch.randn(2, 100 if vocab_size < 10000 else 3, vocab_size)).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, logits.shape[:2])
    labels[0, 1:-1:3] = -100
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 2e-6}
    # over a million of the few values that bfloat16 has, torch's float32 softmax errs by 4e-6 with AVX2
    of_loss = {"atol": 1e-6, "rtol": 5e-6} if dtype == torch.bfloat16 and vocab_size > 10000 else tolerance
    for options in ({}, {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(17)}):
        reduction = "sum" if options else "mean"
        expected = shifted_cross_entropy(logits, labels, reduction=reduction) / (17 if options else 1)
        loss = causal_lm_loss(logits, labels, vocab_size, **options)
        assert loss.dtype == wide
        torch.testing.assert_close(loss.double(), expected, **of_loss)
        (grad,), (expected_grad,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
        assert grad.dtype == dtype
        # in half precision both are rounded once, from float32 and from float64
        rounding = {"atol": 1e-6, "rtol": 2 * torch.finfo(dtype).eps} if dtype.itemsize == 2 else tolerance
        torch.testing.assert_close(grad, expected_grad, **rounding)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    assert causal_lm_loss(logits, None, vocab_size, shift_labels=shifted) == causal_lm_loss(logits, labels, vocab_size)
    other = labels.masked_fill(labels == -100, 3)
    torch.testing.assert_close(
        causal_lm_loss(logits, other, vocab_size, ignore_index=3).double(),
        F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), other[:, 1:].flatten(), ignore_index=3),
        **of_loss,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's forward mode uses torch.jit
def test_causal_lm_loss_has_higher_and_forward_derivatives(monkeypatch):
    monkeypatch.setattr(CrossEntropySum, "CHUNK", 16)  # several chunks at this size
    logits, labels = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), torch.randint(5, (2, 4))
    labels[0, 1] = -100

    def loss(logits, labels=labels):
        return causal_lm_loss(logits, labels, 5)

    def reference(logits, labels=labels):
        return shifted_cross_entropy(logits, labels)

    assert torch.autograd.gradcheck(loss, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, logits)
    each = torch.func.vmap(torch.func.grad(lambda logits, labels: loss(logits[None], labels[None])))(logits, labels)
    for index in range(2):
        one = logits[index : index + 1]
        (expected,) = torch.autograd.grad(reference(one, labels[index : index + 1]), one)
        torch.testing.assert_close(each[index], expected[0])
    torch.testing.assert_close(torch.func.hessian(loss)(logits), torch.func.hessian(reference)(logits))


def test_loss_keeps_the_logits_themselves_and_no_copy():
    model, input_ids, kept = use_fast_cpu(tiny_model("SM+R", vocab_size=5000)), random_ids(1, 64), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids, labels=input_ids, use_cache=False)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    large = {pointer for pointer, size in kept.items() if size > 64 * 5000} - weights
    assert large == {output.logits.data_ptr()}


def test_causal_lm_loss_without_a_label_and_with_a_wrong_one():
    logits, labels = torch.randn(1, 4, 5), torch.full((1, 4), -100)
    logits[0, 2] = torch.nan
    assert causal_lm_loss(logits, labels, 5).isnan()  # a mean over nothing, as in torch
    labels[0, 1] = 2
    assert causal_lm_loss(logits, labels, 5).isfinite()  # what is ignored may be anything
    for wrong in (-1, 5):
        labels[0, 1] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            causal_lm_loss(logits, labels, 5)
    with pytest.raises(ValueError, match="labels must have one entry for each of the 4 tokens, got 3"):
        causal_lm_loss(logits, labels[:, 1:], 5)


@pytest.mark.parametrize("reason", ["traced", "of another kind"])
def test_loss_elsewhere_is_transformers_own(reason, monkeypatch):
    class Other(torch.Tensor):
        pass

    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, 2] = 3
    if reason == "traced":
        monkeypatch.setattr(cpu, "is_tracing", lambda tensor: True)
    else:
        logits = logits.as_subclass(Other)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    for options in ({}, {"num_items_in_batch": 17}, {"ignore_index": 3}, {"shift_labels": shifted}):
        expected = ForCausalLMLoss(logits, labels, 7, **options)
        assert causal_lm_loss(logits, labels, 7, **options).equal(expected)
    assert not expected.equal(ForCausalLMLoss(logits, labels, 7, num_items_in_batch=17))
