"""
What a GPU computes, against float64 on the CPU. scripts/test_gpu.sh runs it, and `--tiny` of that on a CPU, by
`LNFREE_GPU_DEVICE=cpu`.
"""

import copy
import json
import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from modeling_lnfree import (
    EntropyRegularizer,
    compute_attention_entropy,
    record_attention_entropy,
    use_fast_cpu,
    use_fused_loss,
)
from modeling_lnfree.metrics.attention_entropy.entropy import _load_kernel
from modeling_lnfree.metrics.attention_entropy.naive import naive_attention_entropy
from training import files
from training.recipe import build_recipe
from training.train import loop

from ..conftest import gradients, greedy, interrupting, one_more_callback, random_ids, tiny_model
from ..entropy.models import (
    EAGER_ONLY,
    FAMILIES,
    float64_maps,
    make_batch,
    make_model,
    mean_of_queries,
    random_mask,
    random_states,
)


DEVICE = os.environ.get("LNFREE_GPU_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="not of a CPU, or too slow there")
# of a model's own rounding: the same weights in float64 are what is measured against
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
HALF = (torch.bfloat16, torch.float16)
EIGHT = sorted(FAMILIES.keys() - {"gpt_oss", "bert"})
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def wide_model(model_type, implementation):
    """With heads of 16, the least that flex attention takes on a GPU."""
    heads = {"head_dim": 16} if "head_dim" in FAMILIES[model_type] else {}
    embeddings = {"word_embed_proj_dim": 64} if model_type == "opt" else {}
    return make_model(model_type, implementation, hidden_size=64, **heads, **embeddings)


def check_entropies(model_type, implementation, dtype, padding="left", forward=nullcontext):
    model, batch = wide_model(model_type, implementation).to(dtype), make_batch(padding)
    maps = float64_maps(model.double(), batch)
    expected = mean_of_queries(torch.special.entr(maps).sum(-1), batch["attention_mask"])
    model, batch = model.to(DEVICE, dtype), {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    with torch.no_grad(), forward():
        plain = model(**batch).logits
        with record_attention_entropy(model) as record:
            measured = model(**batch).logits
    assert measured.equal(plain) and not record.unmeasured
    torch.testing.assert_close(record.entropy.double().cpu(), expected, atol=TOLERANCES[dtype], rtol=0)


@every_dtype
@pytest.mark.parametrize("model_type", EIGHT)
def test_entropies_equal_float64_and_outputs_stay(model_type, dtype):
    check_entropies(model_type, "eager" if model_type in EAGER_ONLY else "sdpa", dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)  # the kernel has no float32
@pytest.mark.parametrize("model_type", [name for name in EIGHT if name not in EAGER_ONLY | {"mistral"}])
def test_entropies_by_the_flash_kernel(model_type, dtype):
    """sdpa's, which takes no masks: no padding, and no window."""
    check_entropies(model_type, "sdpa", dtype, "none", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION))


# OPT has none in transformers; a CPU compiles each for half a minute
FLEX = [(name, dtype) for name in EIGHT if name != "opt" for dtype in TOLERANCES]


@pytest.mark.parametrize(("model_type", "dtype"), FLEX if DEVICE == "cuda" else [("llama", torch.bfloat16)], ids=str)
@pytest.mark.filterwarnings("ignore")  # what torch.compile says of itself
def test_entropies_with_flex_attention(model_type, dtype):
    check_entropies(model_type, "flex_attention", dtype)


# each is compiled by itself: all kinds in one precision, and all precisions of one kind
KERNELS = [("causal", head_dim, dtype) for head_dim in (64, 128) for dtype in TOLERANCES]
KERNELS += [("causal", head_dim, torch.bfloat16) for head_dim in (16, 80, 256)]
KERNELS += [(kind, 64, torch.bfloat16) for kind in ("window", "masked", "capped", "sinks", "long")]


@pytest.mark.parametrize(("kind", "head_dim", "dtype"), KERNELS, ids=str)
def test_the_kernel_of_this_device_equals_float64(kind, head_dim, dtype):
    """Grouped heads, an odd number of queries, scores of some hundreds."""
    T, S = (200, 333) if kind == "masked" else (1025, 1025) if kind == "long" else (201, 201)
    query, key = random_states(1 if kind == "long" else 2, 4, 2, T, S, head_dim, dtype=dtype, scale=4.0)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    given = {
        "causal": {"is_causal": True},
        "long": {"is_causal": True},
        "window": {"attention_mask": ((distance >= 0) & (distance < 77))[None, None]},
        "masked": {"attention_mask": random_mask((2, 1, T, S))},
        "capped": {"is_causal": True, "softcap": 20.0},
        "sinks": {"is_causal": True, "sinks": torch.tensor([0.5, -torch.inf, 3.0, 20.0])},
    }[kind]
    expected = naive_attention_entropy(query, key, scaling=0.5, **given)
    given = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    found = compute_attention_entropy(query.to(DEVICE), key.to(DEVICE), scaling=0.5, **given)
    torch.testing.assert_close(found.double().cpu(), expected, atol=1e-4, rtol=0)


@on_a_gpu
def test_the_kernel_is_there():
    assert _load_kernel() is not None


def test_scores_of_a_record_equal_those_of_a_cpu():
    model, batch, records = wide_model("mistral", "sdpa"), make_batch("left"), []
    for device in ("cpu", DEVICE):
        model.to(device)
        with record_attention_entropy(model, logits=True) as record, torch.no_grad():
            model(**{name: tensor.to(device) for name, tensor in batch.items()})
        records.append(record)
    for name in ("entropy", "max_entropy", "max_logit", "sink_share", "logsumexp", "spectral_gap"):
        torch.testing.assert_close(*(getattr(each, name).cpu() for each in records), atol=1e-4, rtol=1e-4)


def test_gradients_of_the_penalty_equal_those_of_a_cpu():
    model, input_ids, found = tiny_model("SM+R", embedding_dropout=0.0).train(), random_ids(3, 33), []
    for device in ("cpu", DEVICE):
        model.to(device).zero_grad(set_to_none=True)
        regularizer = EntropyRegularizer(model, weight=1.0, margin=0.0)
        with regularizer.measure():
            model(input_ids.to(device))
        regularizer.penalty().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu())
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


@every_dtype
def test_fused_loss_equals_the_plain_one(dtype):
    plain = tiny_model("SM+LN+G", embedding_dropout=0.0).train().to(DEVICE)
    fused, input_ids, found = use_fused_loss(copy.deepcopy(plain)), random_ids(3, 33).to(DEVICE), []
    for model in (plain, fused):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            output = model(input_ids=input_ids, labels=input_ids)
        output.loss.backward()
        found.append((output.loss, gradients(model)))
    assert output.logits is None
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)


def test_float16_trains_with_its_scaler():
    """The first steps overflow, as the scale is too large, and leave the weights as they are."""
    model, input_ids = use_fused_loss(tiny_model("SM+R")).train().to(DEVICE), random_ids(4, 33).to(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**24)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    before = model.lm_head.weight.detach().clone()
    for step in range(40):
        with torch.autocast(DEVICE, torch.float16):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 0:
            assert model.lm_head.weight.equal(before) and scaler.get_scale() < 2.0**24
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture
def values(recipe_values, own_cache):
    """A recipe, whose sizes the products of half precision take."""
    return {**recipe_values, "variant": "SM+R", "hidden_size": 32, "entropy_steps": 4}


def train(values, folder, **more):
    loop.train(build_recipe({**values, **more, "output_dir": str(folder)}))
    return json.loads((folder / "results.json").read_text()), load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    "more", [{"bf16": True}, pytest.param({"fp16": True}, marks=on_a_gpu), {"layer_optimizer": "muon", "bf16": True}]
)
def test_training_in_half_precision_ends_near_that_in_float32(values, tmp_path, more):
    plain, half = train(values, tmp_path / "plain"), train(values, tmp_path / "half", **more)
    if "layer_optimizer" not in more:
        assert half[0]["perplexity"] == pytest.approx(plain[0]["perplexity"], rel=0.05)
    assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in half[1].values())
    logged = json.loads((tmp_path / "half" / "log_history.json").read_text())
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert len(files.read_records(tmp_path / "half" / "attention_entropy.jsonl")) == 3


@pytest.mark.filterwarnings("ignore")  # what torch.compile says of itself
@pytest.mark.parametrize("option", ["compile_layers", pytest.param("torch_compile", marks=on_a_gpu)])
def test_compiled_training_equals_eager(values, tmp_path, option):
    values = {**values, "embedding_dropout": 0.0, "max_steps": 4, "save_strategy": "no"}
    plain, compiled = train(values, tmp_path / "plain"), train(values, tmp_path / "compiled", **{option: True})
    assert compiled[0]["perplexity"] == pytest.approx(plain[0]["perplexity"], rel=1e-3)


def test_training_goes_on_to_the_bit(values, tmp_path):
    # sdpa's own backward adds up in no order on some cards
    values = {**values, "attn_implementation": "eager"}
    whole = train(values, tmp_path / "whole")
    with one_more_callback(interrupting(6)), pytest.raises(KeyboardInterrupt):
        train(values, tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint-4").is_dir()
    parts = train(values, tmp_path / "parts")
    assert parts[1].keys() == whole[1].keys() and all(parts[1][name].equal(whole[1][name]) for name in whole[1])
    assert parts[0]["attention_entropy"] == whole[0]["attention_entropy"]


def test_generation_by_a_static_cache_and_fast_cpu_change_nothing():
    model, input_ids = tiny_model("SM+R").to(DEVICE), random_ids(2, 5).to(DEVICE)
    expected = greedy(model, input_ids)
    assert greedy(model, input_ids, cache_implementation="static", disable_compile=True).equal(expected)
    logits = model(input_ids).logits
    assert model(input_ids, use_cache=False).logits.equal(logits)
    assert greedy(use_fast_cpu(model), input_ids).equal(expected)
    if DEVICE == "cuda":
        assert model(input_ids).logits.equal(logits)
        assert not any("forward" in vars(module) for module in model.modules())


@every_dtype
def test_entropy_of_cached_decoding_is_that_of_the_whole(dtype):
    model, input_ids = tiny_model("SM+R").to(DEVICE, dtype), random_ids(2, 5).to(DEVICE)
    with record_attention_entropy(model) as decoded:
        text = greedy(model, input_ids)
    with record_attention_entropy(model) as whole, torch.no_grad():
        model(text[:, :-1])
    assert decoded.num_queries == whole.num_queries == 2 * 12
    torch.testing.assert_close(decoded.entropy.cpu(), whole.entropy.cpu(), atol=TOLERANCES[dtype], rtol=0)


def test_one_process_of_a_group_computes_the_same(tmp_path):
    model, input_ids = tiny_model("SM+R", embedding_dropout=0.0).train().to(DEVICE), random_ids(3, 9).to(DEVICE)
    with record_attention_entropy(model) as alone:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        parallel = DistributedDataParallel(model)
        with record_attention_entropy(model) as record:
            parallel(input_ids=input_ids, labels=input_ids).loss.backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(record.entropy, alone.entropy.cpu(), atol=1e-6, rtol=0)
