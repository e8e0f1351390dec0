"""`use_fused_loss`: head and loss by blocks of tokens, against the plain head and torch's cross-entropy in float64."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from modeling_lnfree import LNFreeForSequenceClassification, use_fused_loss
from modeling_lnfree.fused_loss import _wide_product, has_fused_loss, head_and_loss, token_losses

from ..conftest import LargestTensor, every_backbone, gradients, greedy, random_ids, tiny_config, tiny_model


def make(batch=3, length=13, width=8, vocab_size=37, dtype=torch.float32):
    states = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, width, dtype=dtype, requires_grad=True)
    return states, weight, torch.randint(vocab_size, (batch, length))


def naive(states, weight, labels, multiplier=1.0, label_smoothing=0.0, num_items_in_batch=None):
    """All logits in float64; the loss and the gradients of states and weight."""
    states, weight = (tensor.detach().double().requires_grad_() for tensor in (states, weight))
    logits = (multiplier * states @ weight.T)[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    loss = total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)
    return loss, *torch.autograd.grad(loss, (states, weight))


def check(states, weight, labels, block_elements, atol=2e-6, **options):
    loss = head_and_loss(states, weight, labels, block_elements=block_elements, **options)
    found = loss, *torch.autograd.grad(loss, (states, weight))
    for ours, theirs in zip(found, naive(states, weight, labels, **options), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=atol, rtol=atol)
    return found


# of 37: less than one row, one, four (39 rows end in a part of a block), all at once
@pytest.mark.parametrize("block_elements", [1, 37, 4 * 37, 2**20])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_loss_and_gradients_of_any_blocks_equal_float64(block_elements, label_smoothing):
    states, weight, labels = make()
    labels[0, :5] = labels[2] = -100
    for multiplier in (1.0, 0.25):
        for number in (None, 7, torch.tensor(123.0)):
            options = {"multiplier": multiplier, "num_items_in_batch": number, "label_smoothing": label_smoothing}
            found = check(states, weight, labels, block_elements, **options)
            assert [tensor.dtype for tensor in found] == [torch.float32] * 3


def test_float64_stays_float64():
    states, weight, labels = make(dtype=torch.float64)
    assert check(states, weight, labels, 100, atol=1e-12)[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["autocast", "model"])
def test_half_precision_rounds_products_alone(dtype, way):
    """No worse than the plain head, whose logits are rounded likewise, and whose loss is in float32."""
    # more tokens of one label than float16 can count: their gradients are added up in float32
    states, weight, labels = make(batch=4, length=600, vocab_size=211)
    labels[:] = 3
    with torch.no_grad():
        states.mul_(0.3).add_(300.0 / 4)
        weight.mul_(0.05)
    if way == "model":
        states, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (states, weight))
    with torch.autocast("cpu", dtype, enabled=way == "autocast"):
        loss = head_and_loss(states, weight, labels, num_items_in_batch=1, block_elements=2**18)
    found = loss, *torch.autograd.grad(loss, (states, weight))
    assert loss.dtype == torch.float32 and found[1].dtype == states.dtype and found[2].dtype == weight.dtype
    rounded = (tensor.detach().to(dtype) for tensor in (states, weight))
    expected = naive(*rounded, labels, num_items_in_batch=1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected[0], rtol=4 * eps, atol=0)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        if ours.isinf().any():  # a weight of the model's own dtype cannot hold it
            assert way == "model" and dtype == torch.float16 and (theirs[ours.isinf()].abs() > 6e4).all()
            ours, theirs = (tensor.where(ours.isfinite(), 0) for tensor in (ours, theirs))
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=8 * eps * theirs.abs().max().item())


def test_labels_that_are_all_ignored_give_torchs_nan_and_no_gradient():
    states, weight, labels = make()
    labels[:] = -100
    for number, expected in ((None, torch.nan), (torch.tensor(0), torch.nan), (5, 0.0), (torch.tensor(5), 0.0)):
        loss = head_and_loss(states, weight, labels, num_items_in_batch=number)
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        assert all(grad.eq(0).all() for grad in torch.autograd.grad(loss, (states, weight)))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_gradients_are_made_of_what_needs_one(wanted):
    states, weight, labels = make()
    expected = naive(states, weight, labels)
    states, weight = (t.detach().requires_grad_(w) for t, w in zip((states, weight), wanted, strict=True))
    loss = head_and_loss(states, weight, labels)
    torch.testing.assert_close(loss.double(), expected[0], atol=1e-6, rtol=1e-6)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for tensor, grad in zip((states, weight), expected[1:], strict=True):
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), grad, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        assert not head_and_loss(states, weight, labels).requires_grad


def test_wrong_arguments_and_second_derivatives_are_refused():
    states, weight, labels = make()
    with pytest.raises(ValueError, match="each of the 39 tokens, got 26"):
        head_and_loss(states, weight, labels[:2])
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        head_and_loss(states, weight, labels, label_smoothing=1.5)
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        torch.autograd.grad(head_and_loss(states, weight, labels), states, create_graph=True)


def test_no_tensor_is_larger_than_a_block_of_logits():
    states, weight, labels = make(batch=8, length=128, width=4, vocab_size=500)
    with LargestTensor() as made:
        head_and_loss(states, weight, labels, block_elements=16 * 500).backward()
    # the block's logits; the states have 4,096 and the weight 2,000
    assert made.most == 16 * 500


@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_of_every_token_are_those_of_the_logits(backbone, dtype, monkeypatch):
    model = tiny_model("SM+R", backbone, logits_multiplier=0.5, intermediate_size=32)
    input_ids = random_ids(3, 13)
    labels = input_ids.where(torch.rand(3, 13) < 0.8, -100)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids).logits[:, :-1].double()
        fused = use_fused_loss(model)
        monkeypatch.setattr("modeling_lnfree.fused_loss.BLOCK_ELEMENTS", 500)
        with LargestTensor() as made:
            output = fused(input_ids=input_ids, labels=labels, reduction="none")
        hook = fused.lm_head.register_forward_hook(lambda *args: None)  # needs the head by itself
        whole = fused(input_ids=input_ids, labels=labels, reduction="none")
        hook.remove()
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(3, 12)
    assert output.logits is None and output.loss.dtype == torch.float32 and not output.loss.requires_grad
    # all logits are more than anything else that is made, the weight in another dtype included
    assert made.most < 3 * 12 * 99
    for each in (output, whole):
        torch.testing.assert_close(
            each.loss.double(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
        )


def test_losses_of_every_token_hold_no_more_than_a_block_of_logits():
    states, weight, labels = make(batch=8, length=128, width=4, vocab_size=500)
    with LargestTensor() as made:
        token_losses(states, weight, labels, block_elements=16 * 500)
    assert made.most == 16 * 500


@every_backbone
@pytest.mark.parametrize("variant", ["SM+R", "SM+LN+G"])
def test_models_train_the_same(backbone, variant, monkeypatch):
    fields = {"embedding_dropout": 0.0, "logits_multiplier": 0.5 if variant == "SM+R" else 1.0}
    plain = tiny_model(variant, backbone, **fields).train()
    fused, input_ids = use_fused_loss(copy.deepcopy(plain)), random_ids(3, 13)
    monkeypatch.setattr("modeling_lnfree.fused_loss.BLOCK_ELEMENTS", 500)
    labels = input_ids.where(torch.rand(3, 13) < 0.8, -100)
    for options in ({}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(9)}):
        losses = []
        for model in (plain, fused):
            model.zero_grad()
            output = model(input_ids=input_ids, labels=labels, **options)
            assert (output.logits is None) == (model is fused)
            output.loss.backward()
            losses.append(output.loss)
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradients(fused), gradients(plain), atol=1e-6, rtol=1e-5)
    # as the Trainer smooths
    smoothed = LabelSmoother(0.1)(plain(input_ids=input_ids), labels, shift_labels=True)
    found = fused(input_ids=input_ids, labels=labels, label_smoothing=0.1).loss
    torch.testing.assert_close(found, smoothed, atol=1e-6, rtol=1e-6)
    # and what is not a training step with a loss
    fused.eval(), plain.eval()
    for call in ({"labels": labels}, {}):
        ours, theirs = fused(input_ids=input_ids, **call), plain(input_ids=input_ids, **call)
        assert ours.logits.equal(theirs.logits) and (not call or ours.loss.equal(theirs.loss))
    assert greedy(fused, input_ids).equal(greedy(plain, input_ids))


def test_another_index_is_ignored():
    model, input_ids = tiny_model("SM+R", embedding_dropout=0.0).train(), random_ids(2, 9)
    labels = input_ids.where(torch.arange(9) % 3 > 0, -1)
    expected = model(input_ids=input_ids, labels=labels, ignore_index=-1).loss
    torch.testing.assert_close(
        use_fused_loss(model)(input_ids=input_ids, labels=labels, ignore_index=-1).loss, expected
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_rounded_logits_is_in_float32(dtype):
    states, weight = (torch.randn(*shape).to(dtype) for shape in ((1, 2, 8), (211, 8)))
    logits = (states[0, :1] @ weight.T).double()
    loss = head_and_loss(states, weight, torch.tensor([[3, 7]]))
    torch.testing.assert_close(loss.double(), -logits.log_softmax(-1)[0, 7], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stock_models_train_the_same(kind):
    sizes = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, loss_type="ForCausalLM", **dropouts, **sizes
        )
        model = GPT2LMHeadModel(config).train()
    else:
        config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        model = LlamaForCausalLM(LlamaConfig(**config, **sizes)).train()
    fused, input_ids, found = use_fused_loss(copy.deepcopy(model)), random_ids(2, 9), []
    for each in (model, fused):
        loss = each(input_ids, labels=input_ids, num_items_in_batch=3, use_cache=False).loss
        loss.backward()
        found.append((loss, gradients(each)))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend):
    model, input_ids = tiny_model("SM+LN+G", embedding_dropout=0.0, num_hidden_layers=1).train(), random_ids(2, 9)
    fused, found = use_fused_loss(copy.deepcopy(model)), []
    # no graph break: the head and its loss are a part of the graph
    for each in (model, torch.compile(fused, fullgraph=True, backend=backend)):
        output = each(input_ids=input_ids, labels=input_ids, num_items_in_batch=torch.tensor(7), use_cache=False)
        output.loss.backward()
        found.append((output.loss, gradients(each)))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


def test_copies_pickles_and_signatures_are_the_models_own():
    model = use_fused_loss(use_fused_loss(tiny_model("SM+R")))
    twin, input_ids = copy.deepcopy(model).train(), random_ids(2, 5)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (
        twin(input_ids=input_ids, labels=input_ids).loss != model.train()(input_ids=input_ids, labels=input_ids).loss
    )
    assert twin.forward.__self__ is twin and has_fused_loss(twin)
    assert inspect.signature(model.forward) == inspect.signature(tiny_model().forward)
    read = pickle.loads(pickle.dumps(twin))
    assert type(read) is type(model)
    assert isinstance(twin(input_ids=input_ids, labels=input_ids, return_dict=False), tuple)


def test_what_needs_the_head_by_itself_gets_logits():
    model, input_ids = use_fused_loss(tiny_model()).train(), random_ids(2, 5)
    assert model(input_ids=input_ids, labels=input_ids).logits is None
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    assert model(input_ids=input_ids, labels=input_ids).logits is not None and len(seen) == 1
    with pytest.raises(ValueError, match="label_smoothing=0.1 needs the fused loss"):
        model(input_ids=input_ids, labels=input_ids, label_smoothing=0.1)
    hook.remove()
    assert model(input_ids).logits is not None
    head = model.lm_head
    model.lm_head = torch.nn.Linear(32, 99)
    assert model(input_ids=input_ids, labels=input_ids).logits is not None
    model.lm_head = head
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach())
    assert model(input_ids=input_ids, labels=input_ids).logits is None
    kept = model(input_ids=input_ids, shift_labels=input_ids[:, -1:], labels=input_ids[:, -1:], logits_to_keep=1)
    assert kept.logits.shape[1] == 1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_on_the_head_is_not_passed_over():
    peft = pytest.importorskip("peft", reason="adapters are those of peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    model, input_ids = (
        peft.get_peft_model(tiny_model(backbone="pythia", embedding_dropout=0.0), config),
        random_ids(2, 5),
    )
    expected = model.train()(input_ids=input_ids, labels=input_ids).loss
    use_fused_loss(model.base_model.model)
    torch.testing.assert_close(model(input_ids=input_ids, labels=input_ids).loss, expected)


def test_models_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="head and the loss of LNFreeForSequenceClassification are not known"):
        use_fused_loss(LNFreeForSequenceClassification(tiny_config()))
    model = tiny_model()
    model.loss_function = lambda **kwargs: 0
    with pytest.raises(ValueError, match="has a loss function of its own"):
        use_fused_loss(model)
    model = tiny_model()
    model.forward = model.model.forward
    with pytest.raises(ValueError, match="has a forward pass of another tool"):
        use_fused_loss(model)


def test_a_gpus_product_of_half_precision_is_added_up_in_float32():
    """By tensors without numbers, of which torch says what an operation makes."""
    with FakeTensorMode():
        left, right = (torch.empty(shape, device="cuda", dtype=torch.float16) for shape in ((64, 39), (39, 16)))
        product = _wide_product(left, right, torch.float32)
    assert product.device.type == "cuda" and product.dtype == torch.float32
