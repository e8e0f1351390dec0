"""Every design on every way through a model: cache, padding, packing, saving, implementations, compiling."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

from modeling_lnfree import LNFreeForCausalLM, record_attention_entropy
from modeling_lnfree.configuration_lnfree import EXACT_ATTENTION
from modeling_lnfree.modeling_lnfree import CACHE_NAME

from ..conftest import checkpoint_activations, gradients, greedy, random_ids
from .designs import (
    design,
    design_model,
    every_design,
    every_design_and_backbone,
    every_path,
    every_preset_and_backbone,
)


CLOSE = {"atol": 1e-6, "rtol": 1e-6}
# each of the kinds of attention, in one model each
ATTENTION = ["all at once", "SAS", "Gated", "OP", "AERO", "SoftCap", "Clipped", "Shaped"]


def ids(*shape: int) -> torch.Tensor:
    return random_ids(*shape, vocab_size=61)


@every_design_and_backbone
def test_cached_equals_full(name, backbone):
    model, input_ids = design_model(name, backbone), ids(2, 11)
    expected = model(input_ids, use_cache=False).logits
    cache, found = DynamicCache(config=model.config), []
    for part in input_ids.split([5, 1, 3, 1, 1], dim=1):
        found.append(model(part, **{CACHE_NAME: cache}).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, **CLOSE)


@every_design
def test_every_parameter_has_a_part_in_every_step(name):
    """So that DDP need not look in every step for those that have none."""
    model, input_ids = LNFreeForCausalLM(design(name)).train(), ids(2, 5)
    model(input_ids, labels=input_ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_preset_and_backbone
def test_generation_with_a_static_cache_equals_that_without(name, backbone):
    model, input_ids = design_model(name, backbone), ids(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids, use_cache=False, **options)
    for kind in ("dynamic", "static"):
        assert model.generate(input_ids, cache_implementation=kind, **options).equal(expected)


@every_path
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, backbone, side):
    model, short, long = design_model(name, backbone), ids(1, 5), ids(1, 9)
    pads = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat([torch.cat([pads, short] if side == "left" else [short, pads], 1), long])
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0][mask[0].bool()], model(short).logits[0], **CLOSE)
    torch.testing.assert_close(logits[1:], model(long).logits, **CLOSE)
    if side == "left":
        # and one more token, from the cache
        cache = DynamicCache(config=model.config)
        model(padded, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
        more, mask = ids(2, 1), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        step = model(more, attention_mask=mask, position_ids=positions[:, -1:] + 1, **{CACHE_NAME: cache}).logits
        for row, text in enumerate((short, long)):
            whole = model(torch.cat([text, more[row : row + 1]], 1)).logits[:, -1]
            torch.testing.assert_close(step[row], whole, **CLOSE)


@every_path
def test_packed_sequences_do_not_see_each_other(name, backbone):
    model, first, second = design_model(name, backbone), ids(1, 4), ids(1, 7)
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :4], model(first).logits, **CLOSE)
    torch.testing.assert_close(packed[:, 4:], model(second).logits, **CLOSE)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_implementations_agree_or_are_refused(name, padding, tmp_path):
    model, input_ids = design_model(name).float(), ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 1 - padding
    dropped = [field for field in EXACT_ATTENTION if getattr(model.config, field) is not None]
    assert model.config._attn_implementation == ("eager" if dropped else "sdpa")
    model.set_attn_implementation("eager")
    expected = model(input_ids, attention_mask=mask).logits
    model.save_pretrained(tmp_path)
    for implementation in ("sdpa", "flex_attention"):
        if any(implementation not in EXACT_ATTENTION[field] for field in dropped):
            message = f"would be dropped by attn_implementation='{implementation}': take 'eager'"
            with pytest.raises(ValueError, match=message):
                model.set_attn_implementation(implementation)
            with pytest.raises(StrictDataclassError, match=message):
                LNFreeForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
            assert model.config._attn_implementation == "eager"
            continue
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits = model(input_ids, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
        model.set_attn_implementation("eager")


@every_design
def test_saved_and_loaded_are_equal(name, tmp_path):
    model, input_ids = design_model(name).float(), ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded, info = LNFreeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.config.variant == model.config.variant
    for (key, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other and ours.equal(theirs), key
    trained = [[key for key, p in each.named_parameters() if p.requires_grad] for each in (model, loaded)]
    assert trained[0] == trained[1]
    learns_gains = model.config.residual_gains_trainable and "residual_gains" in "".join(model.state_dict())
    assert any(key.endswith("residual_gains") for key in trained[1]) == learns_gains
    assert loaded(input_ids).logits.equal(model(input_ids).logits)


def test_names_in_the_state_dict():
    shapes = {
        **{f"self_attn.{p}_norm.weight": (4,) for p in "qk"},
        **{f"self_attn.{p}_proj.weight": (16, 16) for p in "qkvo"},
        **{f"self_attn.{p}_proj.bias": (16,) for p in "qk"},
        **{"self_attn.attention_gains": (3, 4), "self_attn.temperature": (4,), "residual_gains": (4,)},
        **{"self_attn.head_gate.weight": (4, 4), "self_attn.head_gate.bias": (4,)},
        **{f"mlp.{p}_proj.weight": (24, 16) for p in ("gate", "up")},
        "mlp.down_proj.weight": (16, 24),
        **{f"{norm}_layernorm.weight": (16,) for norm in ("input", "post_attention")},
        **{f"{branch}_output_norm.weight": (16,) for branch in ("attention", "mlp")},
    }
    state, prefix = LNFreeForCausalLM(design("all at once")).state_dict(), "model.layers.1."
    assert {k.removeprefix(prefix): tuple(v.shape) for k, v in state.items() if k.startswith(prefix)} == shapes
    derf = LNFreeForCausalLM(design("derf")).state_dict()
    for name in ("model.norm", "model.layers.0.input_layernorm"):
        assert {key.rpartition(".")[2]: derf[key].numel() for key in derf if key.startswith(f"{name}.")} == {
            **{"weight": 16, "bias": 16, "alpha": 1, "shift": 1}
        }
    fused = LNFreeForCausalLM(design("ScFuFFN")).state_dict()
    assert [key for key in fused if ".mlp." in key] == [f"model.layers.{i}.mlp.fused_proj.weight" for i in range(2)]


@every_path
def test_gradient_checkpointing_gives_equal_losses_and_gradients(name, backbone):
    model, input_ids = design_model(name, backbone).train(), ids(2, 7)
    checkpointed = copy.deepcopy(model)
    checkpoint_activations(checkpointed)
    losses = [each(input_ids, labels=input_ids, use_cache=False).loss for each in (model, checkpointed)]
    for loss in losses:
        loss.backward()
    assert losses[0].equal(losses[1])
    torch.testing.assert_close(gradients(checkpointed), gradients(model))


@every_path
def test_bfloat16_is_near_float64(name, backbone):
    model, input_ids = design_model(name, backbone), ids(2, 9)
    expected = model(input_ids).logits
    logits = model.bfloat16()(input_ids).logits
    assert logits.dtype == torch.bfloat16
    # with temperatures near 0.01 weights are nearly 0 or 1, and a rounding decides which
    tolerance = 0.5 if name == "AERO" else 0.1
    assert (logits.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        *(("all at once", "llama"), ("SAS", "gpt2"), ("Clipped", "gpt2"), ("AERO", "gpt2"), ("HybridNorm", "llama")),
        *(("derf", "gpt2"), ("no MLP, peri", "pythia")),
    ],
)
def test_compiles_as_one_graph_and_exports(name, backbone):
    torch.compiler.reset()
    model, input_ids = design_model(name, backbone).float(), ids(2, 9)
    expected = model(input_ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
    exported = torch.export.export(model, (input_ids,), {"use_cache": False}).module()
    torch.testing.assert_close(exported(input_ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow  # seconds a design
@every_path
def test_every_design_trains_as_one_graph_and_exports_for_any_batch_and_length(name, backbone):
    model, input_ids = design_model(name, backbone).float(), ids(2, 9)
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(
        input_ids, labels=input_ids, use_cache=False
    ).loss.backward()
    torch.testing.assert_close(gradients(model), expected, atol=1e-5, rtol=1e-3)
    length = model.config.max_position_embeddings
    shapes = {"input_ids": {0: torch.export.Dim("B"), 1: torch.export.Dim("T", max=length)}, "use_cache": None}
    exported = torch.export.export(model, (input_ids,), {"use_cache": False}, dynamic_shapes=shapes).module()
    for shape in ((1, 2), (3, 17), (2, length)):
        input_ids = ids(*shape)
        expected = model(input_ids, use_cache=False).logits
        torch.testing.assert_close(exported(input_ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_second_call_of_shaped_attention_is_not_measured(implementation):
    plain = LNFreeForCausalLM(design("linear", attn_implementation=implementation)).eval()
    model = LNFreeForCausalLM(design("linear", attn_implementation=implementation, attention_gains=[0, 1, 0])).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    input_ids, records = ids(2, 9), []
    for each in (plain, model):
        with record_attention_entropy(each) as record, torch.no_grad():
            each(input_ids)
        records.append(record)
    assert records[1].num_queries == records[0].num_queries == 18
    assert records[1].layer_names == records[0].layer_names
    torch.testing.assert_close(records[1].entropy, records[0].entropy, atol=1e-5, rtol=0)


def test_output_attentions_are_the_softmax_before_gains_and_gates():
    model = design_model("all at once")
    clipped = model(ids(1, 7), output_attentions=True).attentions
    assert all(weights.shape == (1, 4, 7, 7) and weights.min() >= 0 and weights.max() <= 1 for weights in clipped)
    model = design_model("SAS", attn_implementation="eager")
    for weights in model(ids(1, 7), output_attentions=True).attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 7, dtype=torch.float64))


def test_inputs_embeds_are_multiplied_too():
    model, input_ids = design_model("embedding_multiplier"), ids(2, 7)
    embeds = model.get_input_embeddings()(input_ids)
    assert model(inputs_embeds=embeds).logits.equal(model(input_ids).logits)
    assert greedy(model, None, inputs_embeds=embeds).equal(greedy(model, input_ids)[:, 7:])


@every_design
def test_missing_weights_start_anew_and_the_others_stay(name, tmp_path):
    model = design_model(name).float()
    state = model.state_dict()
    missing = [key for key in state if key.startswith("model.layers.1.") and "layernorm" not in key]
    model.save_pretrained(tmp_path, state_dict={key: state[key] for key in state if key not in missing})
    loaded, info = LNFreeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(missing) and not info["unexpected_keys"]
    fresh = LNFreeForCausalLM(model.config).state_dict()
    for key, tensor in loaded.state_dict().items():
        if key not in missing:
            assert tensor.equal(state[key]), key
        elif tensor.numel() > 1 and tensor.std() > 0 and "gains" not in key:
            assert tensor.std().item() == pytest.approx(fresh[key].std().item(), rel=0.5), key
        else:
            assert tensor.equal(fresh[key]), key


# every wiring, kind of attention and feed-forward layer, over the three backbones
DROPPED = [
    *(("residual_gains", "gpt2"), ("peri", "llama"), ("post", "gpt2"), ("hybrid", "llama"), ("SAS", "llama")),
    *(("residual_gains, peri", "pythia"), ("SAS-P", "pythia"), ("Gated", "gpt2"), ("Clipped", "gpt2")),
    *(("SoftCap", "llama"), ("fused", "llama"), ("gated", "llama"), ("no MLP", "gpt2"), ("OP", "pythia")),
]
SILENT = {"embeddings": ("self_attn", "mlp"), "weights": ("mlp",), "attention": ("mlp",), "MLP": ("self_attn",)}
DROPOUTS = {"embeddings": "embedding_dropout", "weights": "attention_dropout"}


@pytest.mark.parametrize(("name", "backbone"), DROPPED, ids="-".join)
@pytest.mark.parametrize("place", SILENT)
def test_dropout_acts_in_its_place_and_in_training_alone(name, backbone, place):
    """With what else could differ silenced: two passes differ in training, and none does in evaluation."""

    def silence(module, args, output):
        return torch.zeros_like(output) if isinstance(output, torch.Tensor) else (torch.zeros_like(output[0]), None)

    model, input_ids = design_model(name, backbone, **{DROPOUTS.get(place, "hidden_dropout"): 0.5}).train(), ids(2, 7)
    for layer in model.model.layers:
        for part in SILENT[place]:
            getattr(layer, part).register_forward_hook(silence)
    is_there = place != "MLP" or model.config.mlp_type != "none"
    assert model(input_ids).logits.equal(model(input_ids).logits) != is_there
    model.eval()
    assert model(input_ids).logits.equal(model(input_ids).logits)
