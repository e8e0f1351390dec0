"""The model against code that no one here wrote (GPT-2, GPT-NeoX), a naive float64 forward, and itself."""

import copy
import importlib.util
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from modeling_lnfree import (
    LNFreeConfig,
    LNFreeForCausalLM,
    LNFreeForSequenceClassification,
    LNFreeForTokenClassification,
    LNFreeModel,
    modeling_lnfree,
)
from modeling_lnfree.configuration_lnfree import PROJECTIONS
from modeling_lnfree.modeling_lnfree import CrossEntropySum, build_linear, causal_lm_loss, mkl_leaves_half_unused

from .conftest import every_backbone, every_variant, random_ids, tiny_config, tiny_model


def greedy(model, input_ids, **kwargs):
    return model.generate(input_ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs)


# ------------------------------------------------------------------------------------------ parity with other code


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def test_sm_ln_g_logits_and_generation_match_gpt2():
    theirs = randomised(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
        )
    )
    ours = tiny_model("SM+LN+G", biased_projections=list(PROJECTIONS))
    state = {}
    for name, tensor in theirs.transformer.state_dict().items():
        name = name.replace("wte.", "embed_tokens.").replace("wpe.", "embed_positions.").replace("ln_f.", "norm.")
        name = name.replace("h.", "layers.", 1) if name.startswith("h.") else name
        name = name.replace("ln_1", "input_layernorm").replace("ln_2", "post_attention_layernorm")
        name = (
            name.replace("attn.c_proj", "self_attn.o_proj")
            .replace("c_fc", "up_proj")
            .replace("mlp.c_proj", "mlp.down_proj")
        )
        tensor = tensor.T if "proj.weight" in name or "c_attn.weight" in name else tensor
        if "c_attn" in name:
            for part, projection in zip(tensor.chunk(3), ("q_proj", "k_proj", "v_proj"), strict=True):
                state["model." + name.replace("attn.c_attn", f"self_attn.{projection}")] = part.contiguous()
        else:
            state["model." + name] = tensor.contiguous()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    ours.load_state_dict(state)
    input_ids = random_ids(2, 37)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, atol=1e-5, rtol=1e-5)
    assert greedy(ours, input_ids).equal(greedy(theirs, input_ids, eos_token_id=None))


def test_sm_ln_g_logits_and_generation_match_gpt_neox():
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    theirs = randomised(
        GPTNeoXForCausalLM(
            GPTNeoXConfig(**sizes, max_position_embeddings=64, rope_parameters=rope, bos_token_id=0, eos_token_id=0)
        )
    )
    ours = tiny_model("SM+LN+G", "pythia", biased_projections=list(PROJECTIONS))
    state = {}
    for name, tensor in theirs.state_dict().items():
        name = (
            name.replace("gpt_neox.", "model.").replace("embed_out.", "lm_head.").replace("embed_in.", "embed_tokens.")
        )
        name = name.replace("final_layer_norm.", "norm.").replace("attention.dense", "self_attn.o_proj")
        name = name.replace("dense_h_to_4h", "up_proj").replace("dense_4h_to_h", "down_proj")
        if "query_key_value" in name:
            # (heads, q/k/v, head_dim, ...)
            for part, projection in zip(
                tensor.view(4, 3, 8, -1).unbind(1), ("q_proj", "k_proj", "v_proj"), strict=True
            ):
                part = part.reshape(32, -1) if name.endswith("weight") else part.flatten()
                state[name.replace("attention.query_key_value", f"self_attn.{projection}")] = part
        else:
            state[name] = tensor
    ours.load_state_dict(state)
    input_ids = random_ids(2, 37)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, atol=1e-5, rtol=1e-5)
    assert greedy(ours, input_ids).equal(greedy(theirs, input_ids, eos_token_id=None))


def naive_logits(model: LNFreeForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """A plain float64 forward, token by token and head by head, written from the paper's description."""
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x, name):
        if f"{name}.weight" not in weights:
            return x
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def activation(x, layer):
        if config.hidden_act == "gelu":
            return 0.5 * x * (1 + torch.erf(x / 2**0.5))
        if config.hidden_act == "gelu_pytorch_tanh":
            return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        slope = config.negative_slope or 0.0
        if config.slope_sharing is not None:
            slopes = weights["model.learned_slope.negative_slope"]
            slope = slopes[layer if config.slope_sharing == "layer" else 0]
        return torch.where(x > 0, x, slope * x)

    def rotate(vector, position):
        half = config.rotary_dim // 2
        out = vector.clone()
        for i in range(half):
            angle = torch.tensor(position / config.rope_theta ** (2 * i / config.rotary_dim), dtype=torch.float64)
            a, b = vector[i], vector[i + half]
            out[i], out[i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    def attention(x, name):
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        q, k, v = (linear(x, f"{name}.{p}_proj").view(len(x), heads, width) for p in "qkv")
        if config.position_embedding_type == "rotary":
            q, k = (torch.stack([torch.stack([rotate(h, t) for h in row]) for t, row in enumerate(s)]) for s in (q, k))
        out = torch.zeros_like(q)
        for t in range(len(x)):
            for h in range(heads):
                scores = (k[: t + 1, h] @ q[t, h]) / width**0.5
                out[t, h] = (scores.exp() / scores.exp().sum()) @ v[: t + 1, h]
        return linear(out.flatten(1), f"{name}.o_proj")

    logits = []
    for row in input_ids:
        x = weights["model.embed_tokens.weight"][row]
        if config.position_embedding_type == "learned":
            x = x + weights["model.embed_positions.weight"][: len(row)]
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}"
            attended = x + attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
            source = norm(x if config.parallel_residual else attended, f"{name}.post_attention_layernorm")
            hidden = activation(linear(source, f"{name}.mlp.up_proj"), layer)
            x = attended + linear(hidden, f"{name}.mlp.down_proj")
        logits.append(norm(x, "model.norm") @ weights["lm_head.weight"].T)
    return torch.stack(logits)


@every_variant
@every_backbone
def test_logits_match_a_naive_float64_forward(variant, backbone):
    slope = {"negative_slope": 0.3} if "LR-" in variant else {}
    model = tiny_model(variant, backbone, initializer_range=0.1, **slope)
    if model.config.slope_sharing == "layer":
        model.model.learned_slope.negative_slope.data = torch.tensor([0.3, -0.2, 0.7])
    input_ids = random_ids(2, 13)
    torch.testing.assert_close(model(input_ids).logits.double(), naive_logits(model, input_ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.double()(input_ids).logits, naive_logits(model, input_ids), atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------------------ what LN-free means


@pytest.mark.parametrize("variant", ["SM+G", "SM+R", "SM+LR-layer", "SM+LR-global", "SM+R-noLNf"])
@every_backbone
def test_ln_free_graph_has_no_norm_but_the_final_one(variant, backbone):
    model = tiny_model(variant, backbone)
    graph = torch.export.export(model, (random_ids(1, 8),), {"use_cache": False}).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    norms = [t for t in targets if any(word in t for word in ("norm", "rsqrt", "var", "std", "mean"))]
    assert len(norms) == (0 if variant.endswith("-noLNf") else 1), norms
    names = [name for name, _ in model.named_parameters() if "norm" in name]
    assert names == ([] if variant.endswith("-noLNf") else ["model.norm.weight", "model.norm.bias"])
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.model.layers.modules())


def test_ln_graph_has_two_norms_a_block_and_the_final_one():
    graph = torch.export.export(tiny_model("SM+LN+R"), (random_ids(1, 8),), {"use_cache": False}).graph
    assert sum("layer_norm" in str(node.target) for node in graph.nodes) == 2 * 3 + 1


@pytest.mark.parametrize("biased", [[], ["q_proj", "k_proj"], ["v_proj", "down_proj"], list(PROJECTIONS)], ids=len)
def test_what_has_no_bias_has_no_bias_parameter(biased):
    model = tiny_model("SM+R-noLNf", biased_projections=biased)
    found = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")}
    assert found == set(biased)


def test_global_slope_is_one_parameter_that_every_layer_moves():
    model = tiny_model("SM+LR-global")
    assert model.model.learned_slope.negative_slope.shape == (1,)
    input_ids = random_ids(2, 9)
    model(input_ids, labels=input_ids).loss.backward()
    together = model.model.learned_slope.negative_slope.grad.clone()
    layered = tiny_model("SM+LR-layer")
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name != "model.learned_slope.negative_slope"
    }
    layered.load_state_dict(
        {**state, "model.learned_slope.negative_slope": model.model.learned_slope.negative_slope.detach().repeat(3)}
    )
    layered(input_ids, labels=input_ids).loss.backward()
    assert layered.model.learned_slope.negative_slope.grad.abs().min() > 0
    torch.testing.assert_close(together, layered.model.learned_slope.negative_slope.grad.sum()[None])


@every_variant
@every_backbone
def test_initial_weights_follow_the_paper(variant, backbone):
    model = LNFreeForCausalLM(tiny_config(variant, backbone, hidden_size=128, vocab_size=1000, initializer_range=0.02))
    for name, parameter in model.named_parameters():
        if name.endswith("negative_slope"):
            assert (parameter == 0.01).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            # down_proj and o_proj too: no scaling of residual projections with depth
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


# ------------------------------------------------------------------------------------------ saving and loading


@every_variant
@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_save_and_load_are_equal(tmp_path, variant, backbone, dtype):
    model = tiny_model(variant, backbone).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = LNFreeForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.dtype == dtype
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and ours.equal(theirs), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (backbone == "gpt2")
    input_ids = random_ids(2, 11)
    assert loaded(input_ids).logits.equal(model(input_ids).logits)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix not in (".json", ".py")) == [
        ".safetensors"
    ]


def test_partly_missing_weights_keep_what_was_loaded(tmp_path):
    model = tiny_model("SM+LR-layer")
    state = model.state_dict()
    del state["model.layers.1.self_attn.q_proj.weight"], state["lm_head.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = LNFreeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.self_attn.q_proj.weight"}
    for name, tensor in loaded.state_dict().items():
        if name not in info["missing_keys"]:
            assert tensor.equal(model.state_dict()[name]), name


def test_body_loads_from_the_head_and_the_head_from_the_body(tmp_path):
    model = tiny_model("SM+R", "pythia")
    model.save_pretrained(tmp_path / "head")
    body = LNFreeModel.from_pretrained(tmp_path / "head").eval()
    input_ids = random_ids(1, 7)
    assert body(input_ids).last_hidden_state.equal(model.model(input_ids).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    head = LNFreeForCausalLM.from_pretrained(tmp_path / "body")
    assert head.model.layers[2].mlp.up_proj.weight.equal(model.model.layers[2].mlp.up_proj.weight)


def test_resized_embeddings_stay_tied_and_work():
    model = tiny_model("SM+R")
    model.resize_token_embeddings(120)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(random_ids(1, 5, vocab_size=120)).logits.shape == (1, 5, 120)


# ------------------------------------------------------------------------------------------ attention, cache, generate


@every_backbone
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_attention_implementations_agree(backbone, padding):
    model = tiny_model("SM+R", backbone)
    input_ids, mask = random_ids(2, 17), torch.ones(2, 17, dtype=torch.long)
    if padding != "none":
        mask[0, slice(0, 5) if padding == "left" else slice(12, 17)] = 0
    outputs = {}
    for implementation in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs[implementation] = model(input_ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs["eager"], outputs["flex_attention"], atol=1e-5, rtol=1e-5)


@every_backbone
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_later_token_changes_nothing_before_it(backbone, implementation):
    model = tiny_model("SM+R", backbone, attn_implementation=implementation)
    input_ids = random_ids(1, 12)
    changed = input_ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 99
    before, after = model(input_ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=0, rtol=0)
    assert (before[:, 7:] != after[:, 7:]).any(-1).all()


@every_variant
@every_backbone
def test_cached_generation_equals_full_forwards(variant, backbone):
    model = tiny_model(variant, backbone)
    input_ids = random_ids(2, 9)
    expected = input_ids
    for _ in range(8):
        next_token = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, next_token], dim=1)
    assert greedy(model, input_ids).equal(expected)
    assert greedy(model, input_ids, use_cache=False).equal(expected)
    assert greedy(model, input_ids, cache_implementation="static").equal(expected)


@every_backbone
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_is_taken_under_both_its_names(backbone, name):
    model = tiny_model("SM+R", backbone)
    input_ids = random_ids(1, 10)
    cache = DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 deprecates the older name
        model(input_ids[:, :6], **{name: cache})
        assert cache.get_seq_length() == 6
        step = model(input_ids[:, 6:], **{name: cache}).logits
    torch.testing.assert_close(step, model(input_ids).logits[:, 6:], atol=1e-5, rtol=1e-5)


@every_backbone
def test_beams_and_sampling_equal_those_without_a_cache(backbone):
    model = tiny_model("SM+R", backbone)
    input_ids = random_ids(2, 9)
    kwargs = {"max_new_tokens": 6, "pad_token_id": 0}
    beams = [model.generate(input_ids, num_beams=3, do_sample=False, use_cache=c, **kwargs) for c in (True, False)]
    assert beams[0].equal(beams[1])
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        samples.append(model.generate(input_ids, do_sample=True, top_k=20, use_cache=use_cache, **kwargs))
    assert samples[0].equal(samples[1])


@pytest.mark.slow  # its server needs seconds to start
@every_backbone
def test_continuous_batching_equals_generation_one_by_one(backbone):
    model, prompts = tiny_model("SM+R", backbone), [[3, 4, 5], [6, 7, 8, 9]]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=0)
    # by default its cache takes most of the memory
    paged = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    batched = model.generate_batch(prompts, config, paged, progress_bar=False, warmup=False)
    assert [output.error for output in batched.values()] == [None, None]
    for prompt, output in zip(prompts, batched.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert output.generated_tokens == alone.tolist()


@every_backbone
def test_left_padded_generation_equals_unpadded(backbone):
    model = tiny_model("SM+R", backbone)
    short, long = random_ids(1, 5), random_ids(1, 9)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    generated = greedy(model, padded, attention_mask=mask)
    assert generated[:1, 4:].equal(greedy(model, short))
    assert generated[1:].equal(greedy(model, long))


@every_backbone
def test_right_padding_does_not_reach_the_tokens(backbone):
    model = tiny_model("SM+R", backbone)
    input_ids = random_ids(1, 6)
    padded = torch.cat([input_ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = (torch.arange(9) < 6).long()[None]
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, :6], model(input_ids).logits, atol=1e-5, rtol=1e-5
    )


@every_backbone
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_packed_sequences_do_not_see_each_other(backbone, implementation):
    model = tiny_model("SM+R", backbone, attn_implementation=implementation)
    first, second = random_ids(1, 7), random_ids(1, 10)
    position_ids = torch.cat([torch.arange(7), torch.arange(10)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], dim=1), position_ids=position_ids, use_cache=False).logits
        torch.testing.assert_close(packed[:, :7], model(first).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(packed[:, 7:], model(second).logits, atol=1e-5, rtol=1e-5)


def test_kwargs_reach_the_attention_function():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = []

    def attention(module, *args, **kwargs):
        seen.append((module.layer_idx, kwargs.pop("own_keyword"), kwargs["position_ids"].shape))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("own_attention", attention)
    model = tiny_model("SM+R")
    model.set_attn_implementation("own_attention")
    model(random_ids(1, 5), own_keyword=7, use_cache=False)
    assert seen == [(layer, 7, (1, 5)) for layer in range(3)]


# ------------------------------------------------------------------------------------------ products by oneDNN


@pytest.fixture
def onednn(monkeypatch):
    """New models are built as on an AMD processor, and take oneDNN at every size."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(modeling_lnfree, "USE_ONEDNN", True)
    monkeypatch.setattr(modeling_lnfree, "ONEDNN_SIZE", 0)


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
    layer = build_linear(*weight.t().shape, bias is not None)
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


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_copies_of_the_file_share_the_operation():
    operation = torch.ops.lnfree.linear.default
    spec = importlib.util.spec_from_file_location("modeling_lnfree.another_copy", modeling_lnfree.__file__)
    copy_of_file = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy_of_file)
    assert copy_of_file.build_linear is not build_linear
    assert torch.ops.lnfree.linear.default is operation


def test_default_follows_the_processor_and_keeps_the_type_and_the_pickle(onednn, monkeypatch, tmp_path):
    assert type(build_linear(6, 4)) is torch.nn.Linear
    layer, states = build_linear(6, 4, bias=True), torch.randn(3, 6)
    expected = layer(states)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert twin(states).equal(expected) and "lnfree.linear" in operations_of(lambda: twin(states))
    torch.save(twin, tmp_path / "layer.pt")
    read = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert read.forward.__func__ is torch.nn.Linear.forward
    torch.testing.assert_close(read(states), expected)
    monkeypatch.undo()
    assert ("forward" in vars(build_linear(6, 4))) == modeling_lnfree.USE_ONEDNN
    assert modeling_lnfree.USE_ONEDNN == (mkl_leaves_half_unused() and not torch.accelerator.is_available())


@every_variant
@every_backbone
def test_model_by_onednn_equals_the_plain_one(onednn, monkeypatch, variant, backbone):
    model, input_ids = tiny_model(variant, backbone, embedding_dropout=0.0).train(), random_ids(2, 9)

    def train():
        model.zero_grad()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()

    by_onednn, found = operations_of(train), gradients(model)
    generated = greedy(model.eval(), input_ids)
    monkeypatch.setattr(modeling_lnfree, "ONEDNN_SIZE", 2**62)
    by_torch, expected = operations_of(train), gradients(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert generated.equal(greedy(model, input_ids))
    assert "lnfree.linear" in by_onednn and not {"aten.mm", "aten.addmm"} & by_onednn.keys()
    assert "lnfree.linear" not in by_torch
    assert sum(by_onednn.values()) == sum(by_torch.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's forward mode uses torch.jit
def test_linear_has_the_derivatives_of_torchs_own(onednn):
    layer, plain = build_linear(6, 4, bias=True), torch.nn.Linear(6, 4)
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
    layer, states = build_linear(6, 4, bias=True), torch.randn(3, 6)
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
    layer, states, seen = build_linear(6, 4), torch.randn(3, 6), []

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


# ------------------------------------------------------------------------------------------ inputs and outputs


@every_backbone
def test_inputs_embeds_equal_input_ids(backbone):
    model = tiny_model("SM+R", backbone)
    input_ids = random_ids(2, 8)
    embeds = model.get_input_embeddings()(input_ids)
    assert model(inputs_embeds=embeds).logits.equal(model(input_ids).logits)
    assert greedy(model, None, inputs_embeds=embeds).equal(greedy(model, input_ids)[:, 8:])
    for kwargs in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**kwargs)


@every_backbone
def test_hidden_states_and_attentions(backbone):
    model = tiny_model("SM+R", backbone, attn_implementation="eager")
    input_ids = random_ids(2, 8)
    outputs = model(input_ids, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == [(2, 8, 32)] * 4
    assert model.lm_head(outputs.hidden_states[-1]).equal(outputs.logits)
    assert [attention.shape for attention in outputs.attentions] == [(2, 4, 8, 8)] * 3
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 8))
        assert attention.triu(1).abs().max() == 0
    as_tuple = model(input_ids, return_dict=False)
    assert as_tuple[0].equal(outputs.logits)


def test_logits_to_keep():
    model = tiny_model("SM+R")
    input_ids = random_ids(2, 8)
    every = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=3).logits, every[:, -3:])
    torch.testing.assert_close(model(input_ids, logits_to_keep=torch.tensor([1, 5])).logits, every[:, [1, 5]])


def test_sequence_past_the_learned_positions_is_a_clear_error():
    model = tiny_model("SM+R")
    with pytest.raises(ValueError, match="position 64 is past the learned positions.*max_position_embeddings=64"):
        model(random_ids(1, 65))
    assert tiny_model("SM+R", "pythia")(random_ids(1, 65)).logits.shape == (1, 65, 99)


# ------------------------------------------------------------------------------------------ training


@every_variant
@every_backbone
def test_gradient_checkpointing_gives_equal_gradients(variant, backbone):
    model = tiny_model(variant, backbone, embedding_dropout=0.0).train()
    checkpointed = copy.deepcopy(model)
    # renamed in transformers 5.24
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(checkpointed, new if hasattr(checkpointed, new) else old)()
    input_ids = random_ids(2, 9)
    for each in (model, checkpointed):
        each(input_ids, labels=input_ids, use_cache=False).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, msg=name)


@every_backbone
def test_accumulated_gradients_equal_one_large_batch(backbone):
    model = tiny_model("SM+R", backbone)
    input_ids = random_ids(8, 9)
    labels = input_ids.clone()
    labels[:3, 4:] = -100  # micro-batches with different token counts
    model(input_ids, labels=labels).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for ids, part in zip(input_ids.split(2), labels.split(2), strict=True):
        model(ids, labels=part, num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4, msg=name)


def gradients(model) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_variant
@every_backbone
def test_mixed_precision_gives_the_gradients_of_float32(variant, backbone, dtype):
    model = tiny_model(variant, backbone, embedding_dropout=0.0, initializer_range=0.05).train()
    input_ids = random_ids(2, 9)
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.06
    assert (gradients(model) - expected).norm() < tolerance * expected.norm()
    embedding = model.model.embed_tokens.weight.detach().clone()
    scaler.step(optimizer)  # leaves the step out if a gradient is not finite
    assert not torch.equal(model.model.embed_tokens.weight, embedding)


def test_loss_is_the_mean_nll_of_the_next_token():
    model = tiny_model("SM+R")
    input_ids = random_ids(2, 9)
    log_probs = model(input_ids).logits.double().log_softmax(-1)
    expected = -log_probs[:, :-1].gather(-1, input_ids[:, 1:, None]).mean()
    assert model(input_ids, labels=input_ids).loss.item() == pytest.approx(expected.item(), abs=1e-6)


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
    for options in ({}, {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(17)}):
        reduction = "sum" if options else "mean"
        expected = shifted_cross_entropy(logits, labels, reduction=reduction) / (17 if options else 1)
        loss = causal_lm_loss(logits, labels, vocab_size, **options)
        assert loss.dtype == wide
        torch.testing.assert_close(loss.double(), expected, **tolerance)
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
        **tolerance,
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
    model, input_ids, kept = tiny_model("SM+R", vocab_size=5000), random_ids(1, 64), {}

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


def test_loss_function_can_be_replaced():
    model, input_ids = tiny_model("SM+R"), random_ids(2, 9)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean() + vocab_size
    output = model(input_ids, labels=input_ids)
    assert output.loss == output.logits.mean() + model.config.vocab_size


@pytest.mark.parametrize("by_onednn", [False, True], ids=["torch", "oneDNN"])
@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+R", "SM+LR-global"])
@every_backbone
def test_compiles_as_one_graph_with_equal_results(variant, backbone, by_onednn, request):
    if by_onednn:
        request.getfixturevalue("onednn")
    torch.compiler.reset()
    model = tiny_model(variant, backbone)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((2, 9), (3, 12), (2, 15)):  # with sizes that change from the second on
        input_ids, found = random_ids(*shape), []
        for each in (compiled, model):
            model.zero_grad()
            each(input_ids, labels=input_ids, use_cache=False).loss.backward()
            found.append(gradients(model))
        torch.testing.assert_close(*found)


@every_backbone
def test_compiled_relu_keeps_no_mask_of_its_signs(backbone):
    model, input_ids, kept = tiny_model("SM+R", backbone, embedding_dropout=0.0), random_ids(2, 9), []
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        compiled(input_ids, labels=input_ids, use_cache=False).loss.backward()
    width = model.config.intermediate_size
    of_width = [tensor for tensor in kept if tensor.numel() == input_ids.numel() * width]
    assert {tensor.dtype for tensor in of_width} == {torch.float32}
    assert len(of_width) == model.config.num_hidden_layers


@every_backbone
def test_dropout_acts_where_the_config_says(backbone):
    input_ids = random_ids(1, 9)
    for name in ("embedding_dropout", "hidden_dropout", "attention_dropout"):
        rates = {"embedding_dropout": 0.0, name: 0.5}
        model = tiny_model("SM+R", backbone, **rates).train()
        assert not model(input_ids).logits.equal(model(input_ids).logits), name
        model.eval()
        assert model(input_ids).logits.equal(model(input_ids).logits), name


# ------------------------------------------------------------------------------------------ classification


@every_variant
@every_backbone
def test_classifies_by_the_last_token_that_is_not_padding(variant, backbone):
    model = LNFreeForSequenceClassification(tiny_config(variant, backbone, num_labels=3, pad_token_id=0)).eval()
    short, long = random_ids(1, 5), random_ids(1, 9)
    expected = torch.cat([model(short).logits, model(long).logits])
    pads = torch.zeros(1, 4, dtype=torch.long)
    for side in ("left", "right"):
        padded = torch.cat([torch.cat([pads, short] if side == "left" else [short, pads], dim=1), long])
        mask = (padded != 0).long()
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=position_ids).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        if side == "right":
            torch.testing.assert_close(model(padded).logits, expected, atol=1e-5, rtol=1e-5)


def test_classification_losses_match_torch():
    input_ids = random_ids(4, 6)
    mask = torch.ones_like(input_ids)
    classes, values = torch.tensor([0, 1, 2, 1]), torch.randn(4, 1)
    model = LNFreeForSequenceClassification(tiny_config(num_labels=3)).eval()
    output = model(input_ids, attention_mask=mask, labels=classes)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, classes))
    model = LNFreeForSequenceClassification(tiny_config(num_labels=1, problem_type="regression")).eval()
    output = model(input_ids, attention_mask=mask, labels=values)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits.squeeze(), values.squeeze()))


def test_batch_without_any_sign_of_padding_is_refused():
    model = LNFreeForSequenceClassification(tiny_config(num_labels=3))
    with pytest.raises(
        ValueError, match="2 sequences need an attention_mask.*got neither .input_ids given, pad_token_id=None"
    ):
        model(random_ids(2, 6))


@every_variant
@every_backbone
def test_token_classes_are_a_linear_map_of_the_final_states(variant, backbone):
    model = LNFreeForTokenClassification(tiny_config(variant, backbone, num_labels=5)).eval()
    model.score.bias.data.normal_()
    input_ids, labels = random_ids(2, 9), torch.randint(5, (2, 9))
    labels[0, 4:] = -100
    states = model.model(input_ids).last_hidden_state
    output = model(input_ids, labels=labels)
    torch.testing.assert_close(output.logits, states @ model.score.weight.T + model.score.bias)
    # the class of each token itself, not of the next
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
    pads = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([input_ids, pads], 1), torch.cat([torch.ones_like(input_ids), pads], 1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :9], output.logits, atol=1e-5, rtol=1e-5)


def _train_head(head, num_labels, folder, batch_size, accumulation):
    torch.manual_seed(0)
    model = head(tiny_config(num_labels=num_labels, embedding_dropout=0.0, pad_token_id=0))
    rows = []
    for length in (9, 3, 7, 2, 8, 4, 6, 5):  # micro-batches with different token counts
        ids = random_ids(length).tolist() + [0] * (9 - length)
        labels = [i % num_labels if i else -100 for i in ids] if head is LNFreeForTokenClassification else length % 3
        rows.append({"input_ids": ids, "attention_mask": [int(i > 0) for i in ids], "labels": labels})
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        learning_rate=0.1,
        max_grad_norm=0,
        optim="sgd",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer.state.log_history[0]["loss"], dict(model.named_parameters())


@pytest.mark.parametrize("head", [LNFreeForSequenceClassification, LNFreeForTokenClassification])
def test_trainer_accumulates_a_heads_gradients_exactly(head, tmp_path):
    whole_loss, whole = _train_head(head, 3, tmp_path, batch_size=8, accumulation=1)
    loss, parameters = _train_head(head, 3, tmp_path, batch_size=2, accumulation=4)
    assert loss == pytest.approx(whole_loss, abs=1e-4)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, whole[name], atol=1e-6, rtol=1e-4, msg=name)


def test_installed_package_registers_the_type(tmp_path):
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    tiny_model("SM+R").save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LNFreeForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is LNFreeModel
    assert type(AutoModelForCausalLM.from_config(LNFreeConfig(vocab_size=9, num_hidden_layers=1))) is LNFreeForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the score head is new
        assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is LNFreeForSequenceClassification
        assert type(AutoModelForTokenClassification.from_pretrained(tmp_path)) is LNFreeForTokenClassification


# ------------------------------------------------------------------------------------------------- tensor parallelism


def _tensor_parallel(rank, input_ids, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        plan = DistributedConfig(tp_plan="auto")
        parallel = LNFreeForCausalLM.from_pretrained(folder / "model", distributed_config=plan).eval()
        logits = parallel(input_ids).logits
        generated = greedy(parallel, input_ids)
        parallel(input_ids, labels=input_ids).loss.backward()
        whole = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in ((name, p.grad) for name, p in parallel.named_parameters())
        }
        shard = parallel.model.layers[0].self_attn.q_proj.weight
        shape = tuple(getattr(shard, "_local_tensor", shard).shape)
        if rank == 0:
            torch.save({"logits": logits, "generated": generated, "grads": whole, "shape": shape}, folder / "out.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # each process imports transformers
@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+R", "SM+LR-layer", "SM+LR-global"])
@pytest.mark.parametrize("backbone", ["gpt2", "pythia"])
def test_two_tensor_parallel_processes_equal_one(variant, backbone, tmp_path):
    model = randomised(tiny_model(variant, backbone, biased_projections=list(PROJECTIONS)))
    model.save_pretrained(tmp_path / "model")
    input_ids = random_ids(2, 9)
    torch.multiprocessing.spawn(_tensor_parallel, args=(input_ids, tmp_path), nprocs=2)
    parallel = torch.load(tmp_path / "out.pt")
    output = model(input_ids, labels=input_ids)
    output.loss.backward()
    query = model.model.layers[0].self_attn.q_proj.weight
    assert parallel["shape"] == (query.shape[0] // 2, query.shape[1])
    torch.testing.assert_close(parallel["logits"], output.logits, atol=1e-5, rtol=1e-5)
    assert parallel["generated"].equal(greedy(model, input_ids))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parallel["grads"][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
