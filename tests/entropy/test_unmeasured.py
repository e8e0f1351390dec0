"""What the recorder does not see, is told; and nothing that it cannot read disturbs the model or the other layers."""

import copy
import gc
import math
import pickle

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.modeling_lnfree import CACHE_NAME

from ..conftest import checkpoint_activations
from .models import SIZES, VOCAB_SIZE, make_batch, make_model, random_states


class OwnAttention(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def test_a_layer_with_attention_of_its_own_is_named():
    model, batch = make_model("llama", num_hidden_layers=3), make_batch("left")
    model.model.layers[1].self_attn = OwnAttention()
    with pytest.warns(UserWarning, match=r"model.layers.1.self_attn \(1 call\): not seen"), torch.no_grad():
        with record_attention_entropy(model) as record:
            model(**batch)
    assert record.layer_names == ["model.layers.0.self_attn", "model.layers.2.self_attn"]
    assert record.entropy.shape == (2, 4) and len(record.unmeasured) == 1


def test_a_layer_that_leaves_the_interface_aside_is_named():
    model, batch = make_model("gpt2", "eager", reorder_and_upcast_attn=True), make_batch("left")
    with pytest.warns(
        UserWarning, match="transformer.h.0.attn, transformer.h.1.attn .2 calls.: its calls were not seen"
    ):
        with record_attention_entropy(model) as record, torch.no_grad():
            model(**batch)
    assert record.num_queries == 0 and record.layer_names == []


# raised inside torch.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_passes_of_a_graph_that_was_compiled_before_are_counted():
    model = make_model("llama")
    compiled = torch.compile(model, backend="eager")
    long, short = make_batch("none"), make_batch("none", batch=2, length=5)
    with torch.no_grad():
        compiled(**long)
        with pytest.warns(UserWarning, match="1 of 2 forward passes called no attention layer that could be seen"):
            with record_attention_entropy(model) as record:
                compiled(**long)
                compiled(**short)
    assert record.num_queries == 10
    torch._dynamo.reset()


def test_layers_that_are_not_called_are_absent():
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    config = AutoConfig.for_model("bart", **sizes, is_encoder_decoder=False, is_decoder=True)
    model, batch = AutoModelForCausalLM.from_config(config).eval(), make_batch("right")
    with record_attention_entropy(model) as record, torch.no_grad():
        model(**batch)
    assert record.layer_names == [f"model.decoder.layers.{layer}.self_attn" for layer in (0, 1)]
    assert record.entropy.shape == (2, 4) and not record.entropy.isnan().any() and record.unmeasured == []
    assert 0 < record.mean_entropy < record.max_entropy[0, 0]


class _Attention(nn.Module):
    is_causal = True

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def forward(self, hidden_states):
        query = hidden_states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)(self, query, query, query, None)
        return hidden_states


def test_layers_with_different_numbers_of_heads():
    model = nn.Sequential(_Attention(4), _Attention(2))
    hidden_states = random_states(2, 1, 1, 9, 9, 32)[0][:, 0]
    with record_attention_entropy(model) as record:
        model(hidden_states)
    with record_attention_entropy(model[1]) as second:
        model(hidden_states)
    assert record.num_heads == [4, 2] and record.entropy[1].isnan().tolist() == [False, False, True, True]
    torch.testing.assert_close(record.layer_entropy, torch.stack([record.entropy[0].mean(), second.entropy[0].mean()]))
    six = torch.cat([record.entropy[0], second.entropy[0]])
    assert record.mean_entropy == pytest.approx(six.mean().item(), abs=1e-6)
    assert record.head_distribution.sum() == 1


def test_a_layer_whose_heads_change():
    module = _Attention(4)
    with pytest.warns(UserWarning, match="it had 4 heads before, and has 2 now"):
        with record_attention_entropy(module) as record:
            module(torch.randn(2, 9, 32))
            module.heads = 2
            module(torch.randn(2, 9, 32))
    assert record.num_queries == 2 * 9


def test_a_module_that_runs_several_times_has_a_row_a_run():
    torch.manual_seed(0)
    config = AutoConfig.for_model("albert", **{**SIZES, "num_hidden_layers": 3}, embedding_size=16)
    model, batch = AutoModel.from_config(config, attn_implementation="eager").eval(), make_batch("right")
    names = []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
        with record_attention_entropy(model, on_layer=lambda measured: names.append(measured.layer)) as record:
            model(**batch)
            model(**batch)
        maps = torch.stack(model(**batch, output_attentions=True).attentions).double()
    real = batch["attention_mask"].bool()[None, :, None].expand(3, -1, 4, -1)
    expected = torch.special.entr(maps).sum(-1)[real].view(3, -1).mean(1)
    assert record.num_queries == 2 * batch["attention_mask"].sum()
    torch.testing.assert_close(record.layer_entropy.double(), expected, atol=2e-5, rtol=0)
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert record.layer_names == [name, f"{name}[1]", f"{name}[2]"] and names == 2 * record.layer_names


def test_values_in_halves_are_one_measurement():
    config = AutoConfig.for_model("diffllama", **SIZES, num_key_value_heads=2, attention_dropout=0.0)
    model, batch = AutoModelForCausalLM.from_config(config).eval(), make_batch("left")
    with record_attention_entropy(model) as record, torch.no_grad():
        model(**batch)
    assert record.num_queries == batch["attention_mask"].sum()


@pytest.mark.parametrize("ones", [True, False])
def test_a_cache_with_a_mask_of_the_new_tokens_only(ones):
    model, batch = make_model("llama"), make_batch("none")
    new = torch.ones(3, 4, dtype=torch.long)
    new[0, 0] = ones

    def read():
        with torch.no_grad():
            cache = model(batch["input_ids"][:, :9], use_cache=True)[CACHE_NAME]
            return model(batch["input_ids"][:, 9:], attention_mask=new, **{CACHE_NAME: cache}).logits

    plain = read()
    if ones:
        with record_attention_entropy(model) as record:
            assert torch.equal(read(), plain)
        assert record.num_queries == 3 * 13
    else:
        # it stands for the first keys then, and tells nothing of these queries
        with pytest.warns(UserWarning, match="is not known: pass padding_mask="):
            with record_attention_entropy(model) as record:
                assert torch.equal(read(), plain)
        assert record.num_queries == 3 * 9


def _vmap(model):
    return torch.func.vmap(lambda states: model(inputs_embeds=states, use_cache=False).logits)(torch.ones(2, 1, 5, 32))


def _fake(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model(torch.ones(1, 5, dtype=torch.long)).logits


@pytest.mark.parametrize("read", [_vmap, _fake])
# of vmap, about a kernel that is computed one by one
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_passes_that_cannot_be_read_go_on(read):
    model = make_model("llama")
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="2 calls.: (it ran inside|its call cannot be read|its tensors)"),
    ):
        with record_attention_entropy(model) as record:
            assert read(model).shape[-1] == VOCAB_SIZE
    assert record.num_queries == 0


def test_tensors_without_numbers():
    model = make_model("llama").to("meta")
    with torch.no_grad(), pytest.warns(UserWarning, match="its tensors hold no numbers"):
        with record_attention_entropy(model):
            model(torch.ones(1, 5, dtype=torch.long, device="meta"))


# torch scripts the derivative of a normalization
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_differentiation_is_measured():
    model = make_model("llama", "eager")
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), record_attention_entropy(model) as expected:
        model(inputs_embeds=states, use_cache=False)
    with torch.no_grad(), forward_ad.dual_level(), record_attention_entropy(model) as record:
        logits = model(inputs_embeds=forward_ad.make_dual(states, torch.ones_like(states)), use_cache=False).logits
        assert forward_ad.unpack_dual(logits).tangent.any()
    assert torch.equal(record.entropy, expected.entropy)


def test_an_attention_function_with_positional_arguments():
    query, key = random_states(2, 4, 2, 9, 9, 16)

    class Positional(nn.Module):
        is_causal = False

        def forward(self):
            function = ALL_ATTENTION_FUNCTIONS.get_interface("positional", None)
            return function(self, query, key, key, None, 0.7, 0.0)

    AttentionInterface.register("positional", lambda module, q, k, v, mask, scaling, dropout=0.0: (q, None))
    module = Positional()
    try:
        with record_attention_entropy(module) as record:
            module()
    finally:
        del AttentionInterface._global_mapping["positional"]
    weights = (0.7 * query.double() @ key.double().repeat_interleave(2, 1).mT).softmax(-1)
    expected = torch.special.entr(weights).sum(-1).mean((0, 2))
    torch.testing.assert_close(record.entropy[0].double(), expected, atol=2e-5, rtol=0)


def test_a_pass_that_fails_and_is_caught_leaves_the_next_as_it_is():
    model, batch = make_model("llama"), make_batch("left")
    with torch.no_grad():
        with record_attention_entropy(model) as expected:
            model(**batch)
        with record_attention_entropy(model) as record:
            with pytest.raises(RuntimeError):
                model(batch["input_ids"], attention_mask=torch.ones(3, 1, 13, 14).bool())
            model(**batch)
    assert record.layer_names == expected.layer_names and torch.equal(record.entropy, expected.entropy)


def test_a_record_is_kept_by_pickle_and_holds_nothing_of_the_model():
    model, batch = make_model("llama"), make_batch("left")
    with record_attention_entropy(model, on_layer=lambda measured: None) as record, torch.no_grad():
        model(**batch)
        # a copy made meanwhile does not hold the recorder, runs, and is not measured
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**batch).logits, model(**batch).logits)
    assert record.num_queries == 2 * batch["attention_mask"].sum()
    copied(**batch)
    again = pickle.loads(pickle.dumps(record))
    assert torch.equal(again.entropy, record.entropy) and again.layer_names == record.layer_names
    assert not any(isinstance(found, nn.Module) for found in gc.get_referents(*gc.get_referents(record)))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_entropies_with_gradients_match_maps(model_type, checkpointing):
    implementation = "eager" if model_type == "gemma2" else "sdpa"
    model, batch = make_model(model_type, implementation).train(), make_batch("left")
    real = batch["attention_mask"].bool()[:, None].expand(-1, 4, -1)
    if checkpointing:
        checkpoint_activations(model, use_reentrant=False)
    layers = {}
    with record_attention_entropy(
        model, differentiable=True, on_layer=lambda measured: layers.update({measured.layer: measured})
    ) as record:
        model(**batch)
        share = [layer.entropy / layer.max_entropy.clamp(min=math.log(2)) for layer in layers.values()]
        sum(layer[real].square().sum() for layer in share).backward()
    assert record.num_queries == batch["attention_mask"].sum()

    reference = make_model(model_type, "eager").train()
    loss = 0.0
    for weights, layer in zip(reference(**batch, output_attentions=True).attentions, layers.values(), strict=True):
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
        loss = loss + (entropy / layer.max_entropy.clamp(min=math.log(2)))[real].square().sum()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)
            assert parameter.grad.abs().max() > 1e-3
