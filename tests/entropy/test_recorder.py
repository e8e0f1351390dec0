"""The recorder against eager attention maps of the same models in float64."""

import math
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    T5EncoderModel,
)
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.metrics.attention_entropy import entropy as entropy_module
from modeling_lnfree.metrics.attention_entropy import linear as linear_module
from modeling_lnfree.metrics.attention_entropy.naive import naive_attention_entropy
from modeling_lnfree.modeling_lnfree import CACHE_NAME

from ..conftest import ROOT, checkpoint_activations
from .models import (
    EAGER_ONLY,
    FAMILIES,
    VOCAB_SIZE,
    float64_maps,
    make_batch,
    make_model,
    mean_of_queries,
    random_mask,
    random_states,
    supports_sdpa,
)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_record_matches_eager_maps_in_float64(model_type, implementation, padding):
    if implementation == "sdpa" and model_type in EAGER_ONLY and not supports_sdpa(model_type):
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            make_model(model_type, implementation)
        return
    model, batch = make_model(model_type, implementation), make_batch(padding)
    with torch.no_grad():
        before = model(**batch)[0]
        with record_attention_entropy(model) as record:
            inside = model(**batch)[0]
        after = model(**batch)[0]
    assert torch.equal(before, inside) and torch.equal(before, after)

    maps = float64_maps(model, batch)
    expected = mean_of_queries(torch.special.entr(maps).sum(-1), batch["attention_mask"])
    largest = mean_of_queries((maps > 0).sum(-1).log(), batch["attention_mask"])
    # float32 models, eager softmax in float32
    torch.testing.assert_close(record.entropy.double(), expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(record.max_entropy.double(), largest.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(record.normalized_entropy.double(), expected / largest, atol=2e-5, rtol=0)
    assert record.entropy.shape == (2, 4) and record.entropy.device.type == "cpu"
    assert record.num_queries == batch["attention_mask"].sum()
    assert not record.nan_count.any() and not record.inf_count.any()
    assert record.head_distribution.sum() == 1


def test_max_entropy_is_the_mean_log_of_the_visible_keys():
    model = make_model("gpt2")
    with record_attention_entropy(model) as record, torch.no_grad():
        model(torch.ones(2, 64, dtype=torch.long))
    torch.testing.assert_close(record.max_entropy, torch.full((2, 4), math.lgamma(65) / 64), atol=1e-6, rtol=0)


def test_head_distribution_counts_heads_by_quarters_of_their_maximum():
    model = make_model("gpt2")
    with record_attention_entropy(model) as record:
        pass
    one = torch.ones(4)
    # normalized 0, 0.3, 0.5, 1 and 0.24, NaN, 0.76, 0.75
    entropy = torch.tensor([[0.0, 0.6, 1.0, 2.0], [0.48, torch.nan, 1.52, 1.5]]).double()
    for layer, row in enumerate(entropy):
        record.add((layer, 0), str(layer), torch.stack([row, 2 * one, 0 * one, 0 * one, one], -1))
    assert record.head_distribution.tolist() == [2 / 8, 1 / 8, 1 / 8, 3 / 8]


def test_means_run_over_the_queries_of_all_forward_passes():
    model = make_model("llama")
    long, short = make_batch("none", batch=2, length=13), make_batch("left", batch=3, length=11)
    separate = []
    with torch.no_grad():
        for batch in (long, short):
            with record_attention_entropy(model) as record:
                model(**batch)
            separate.append(record.num_queries * record.entropy)
        with record_attention_entropy(model) as record:
            model(**long)
            model(**short)
    assert record.num_queries == 26 + 20
    torch.testing.assert_close(record.entropy, sum(separate) / 46, atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_nan_in_one_head_breaks_that_head_only(implementation):
    model, batch = make_model("gpt2", implementation), make_batch("left")
    with torch.no_grad():
        # bias of the queries of head 2 in the last layer; heads have 8 channels
        model.transformer.h[1].attn.c_attn.bias[2 * 8 + 3] = torch.nan
        with record_attention_entropy(model) as record:
            model(**batch)
    broken = torch.zeros(2, 4, dtype=torch.bool)
    broken[1, 2] = True
    assert torch.equal(record.entropy.isnan(), broken)
    assert torch.equal(record.normalized_entropy.isnan(), broken)
    # all the keys that the 22 queries see, in sequences of 9, 4 and 13 tokens
    assert record.nan_count[1, 2] == 9 * 10 / 2 + 4 * 5 / 2 + 13 * 14 / 2
    assert record.nan_count.sum() == record.nan_count[1, 2] and not record.inf_count.any()
    assert record.head_distribution.sum() == 7 / 8


def test_infinite_scores_are_counted():
    model = make_model("gpt2")
    with torch.no_grad():
        # keys come after the 32 channels of the queries
        model.transformer.h[1].attn.c_attn.bias[32 + 3 * 8] = torch.inf
        with record_attention_entropy(model) as record:
            model(**make_batch("none", batch=2, length=7))
    assert record.inf_count[1].tolist() == [0, 0, 0, 2 * 28]
    assert record.entropy[1].isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_training_step_is_unchanged_and_measured_before_dropout(implementation):
    model, batch = make_model("gpt2", implementation, embd_pdrop=0.0, resid_pdrop=0.0).train(), make_batch("right")

    def step():
        torch.manual_seed(3)
        model.zero_grad()
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        return output.loss, model.transformer.h[0].attn.c_attn.weight.grad.clone(), torch.get_rng_state()

    plain = step()
    with record_attention_entropy(model) as record:
        measured = step()
    assert all(torch.equal(*pair) for pair in zip(plain, measured, strict=True))
    maps = float64_maps(model, batch)
    expected = mean_of_queries(torch.special.entr(maps).sum(-1), batch["attention_mask"])
    # the first layer's inputs have seen no dropout
    torch.testing.assert_close(record.entropy[0].double(), expected[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_queries_once(use_reentrant):
    model, batch = make_model("llama").train(), make_batch("left")
    with record_attention_entropy(model) as plain:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    checkpoint_activations(model, use_reentrant=use_reentrant)
    with record_attention_entropy(model) as record:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert record.num_queries == plain.num_queries == batch["attention_mask"].sum()
    assert torch.equal(record.entropy, plain.entropy)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight.grad, expected)


@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_measures_every_query_once(model_type, cache, padding):
    model = make_model(model_type, "eager" if model_type in EAGER_ONLY else "sdpa")
    batch = make_batch(padding, length=11)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    plain = model.generate(**batch, **options)
    with record_attention_entropy(model) as record:
        tokens = model.generate(**batch, **options)
    assert torch.equal(tokens, plain)
    # the last token is never a query
    whole = {
        "input_ids": tokens[:, :-1],
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1),
    }
    whole["position_ids"] = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with record_attention_entropy(model) as expected, torch.no_grad():
        model(**whole)
    assert record.num_queries == expected.num_queries == whole["attention_mask"].sum()
    torch.testing.assert_close(record.entropy, expected.entropy, atol=2e-5, rtol=0)
    torch.testing.assert_close(record.max_entropy, expected.max_entropy, atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config, max_cache_len=32)])
def test_blocks_of_queries_against_a_cache(implementation, make_cache):
    model, batch = make_model("qwen3", implementation), make_batch("none")
    with record_attention_entropy(model) as record, torch.no_grad():
        cache = {CACHE_NAME: make_cache(config=model.config)}
        for start, stop in ((0, 7), (7, 12), (12, 13)):
            model(batch["input_ids"][:, start:stop], **cache)
    with record_attention_entropy(model) as expected, torch.no_grad():
        model(**batch)
    assert record.num_queries == expected.num_queries
    torch.testing.assert_close(record.entropy, expected.entropy, atol=2e-5, rtol=0)
    torch.testing.assert_close(record.max_entropy, expected.max_entropy, atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_sequences_match_separate_ones(implementation):
    model, input_ids = make_model("llama", implementation), make_batch("none", batch=1)["input_ids"]
    with torch.no_grad():
        with record_attention_entropy(model) as packed:
            # with a cache, transformers does not look for packed sequences
            model(input_ids, position_ids=torch.cat([torch.arange(5), torch.arange(8)])[None], use_cache=False)
        with record_attention_entropy(model) as separate:
            model(input_ids[:, :5])
            model(input_ids[:, 5:])
    assert packed.num_queries == separate.num_queries == 13
    torch.testing.assert_close(packed.entropy, separate.entropy, atol=2e-5, rtol=0)
    torch.testing.assert_close(packed.max_entropy, separate.max_entropy, atol=1e-6, rtol=0)


@pytest.mark.parametrize("floating", [False, True])
def test_masks_of_the_user(floating):
    model, batch = make_model("llama"), make_batch("none")
    mask = random_mask((3, 1, 13, 13)).tril()
    if floating:
        mask = torch.randn(3, 1, 13, 13, generator=torch.Generator().manual_seed(0)).masked_fill(~mask, -torch.inf)
    batch["attention_mask"] = mask
    with record_attention_entropy(model) as record, torch.no_grad():
        model(**batch)
    eager = {**batch, "attention_mask": mask if floating else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)}
    expected = torch.special.entr(float64_maps(model, eager)).sum(-1).mean((1, 3))
    torch.testing.assert_close(record.entropy.double(), expected, atol=2e-5, rtol=0)
    assert record.num_queries == 3 * 13


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_position_bias_is_part_of_the_scores(implementation, padding):
    torch.manual_seed(0)
    config = AutoConfig.for_model("t5", vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = T5EncoderModel._from_config(config, attn_implementation=implementation).eval()
    batch = make_batch(padding)
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
        with record_attention_entropy(model) as record:
            model(**batch)
    expected = mean_of_queries(torch.special.entr(float64_maps(model, batch)).sum(-1), batch["attention_mask"])
    torch.testing.assert_close(record.entropy.double(), expected, atol=2e-5, rtol=0)


@pytest.fixture
def flash_on_cpu():
    """An attention implementation with the arguments of flash attention, read here by other means."""

    def attention(
        module, query, key, value, attention_mask, scaling, sliding_window=None, position_ids=None, **kwargs
    ):
        positions = torch.arange(query.shape[2])
        seen = positions <= positions[:, None]
        if sliding_window is not None:
            seen = seen & (positions > positions[:, None] - sliding_window)
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None].bool()
        elif position_ids is not None:
            first = (positions - position_ids)[0]
            seen = seen & (first[:, None] == first)
        arguments = {"attn_mask": seen, "scale": scaling, "enable_gqa": True}
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, **arguments)
        return output.nan_to_num().transpose(1, 2).contiguous(), None

    AttentionInterface.register("flash_on_cpu", attention)
    AttentionMaskInterface.register("flash_on_cpu", flash_attention_mask)
    yield "flash_on_cpu"
    del AttentionInterface._global_mapping["flash_on_cpu"]
    del AttentionMaskInterface._global_mapping["flash_on_cpu"]


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "packed"])
def test_arguments_of_flash_attention(model_type, padding, flash_on_cpu):
    model, batch = make_model(model_type), make_batch(padding)
    if padding == "packed":
        position_ids = torch.cat([torch.arange(5), torch.arange(8)])[None]
        batch = {"input_ids": batch["input_ids"][:1], "position_ids": position_ids, "use_cache": False}
    with torch.no_grad():
        with record_attention_entropy(model) as expected:
            model(**batch)
        model.config._attn_implementation = flash_on_cpu
        with record_attention_entropy(model) as record:
            model(**batch)
    assert record.num_queries == expected.num_queries
    torch.testing.assert_close(record.entropy, expected.entropy, atol=2e-5, rtol=0)
    torch.testing.assert_close(record.max_entropy, expected.max_entropy, atol=1e-6, rtol=0)


def test_sequences_packed_by_their_lengths(flash_on_cpu):
    query, key = random_states(1, 4, 2, 13, 13, 16)
    ends = torch.tensor([0, 5, 13], dtype=torch.int32)
    attention = _Attention()
    AttentionInterface.register("flash_on_cpu", lambda *args, **kwargs: None)
    with record_attention_entropy(attention) as record:
        attention(query, key, flash_on_cpu, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    parts = [(query[:, :, :5], key[:, :, :5]), (query[:, :, 5:], key[:, :, 5:])]
    expected = torch.cat([naive_attention_entropy(*part, scaling=0.25) for part in parts], -1).mean((0, 2))
    torch.testing.assert_close(record.entropy[0].double(), expected, atol=2e-5, rtol=0)
    assert record.max_entropy[0, 0].item() == pytest.approx((5 * math.log(5) + 8 * math.log(8)) / 13)


def test_two_models_at_once_do_not_mix():
    first, second = make_model("gpt2"), make_model("llama", "eager")
    batch, other = make_batch("left"), make_batch("none", batch=1)
    with torch.no_grad():
        with record_attention_entropy(first) as alone:
            first(**batch)
        with record_attention_entropy(first) as outer, record_attention_entropy(second) as inner:
            first(**batch)
            second(**other)
        with record_attention_entropy(second) as again:
            first(**batch)
            second(**other)
    assert torch.equal(outer.entropy, alone.entropy) and torch.equal(inner.entropy, again.entropy)
    assert (outer.num_queries, inner.num_queries) == (batch["attention_mask"].sum(), 13)


class _Attention(torch.nn.Module):
    """Calls an attention function of its own with queries, keys and further arguments."""

    is_causal = False

    def forward(self, query, key, implementation="eager", **arguments):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, lambda *args, **kwargs: None)
        return attention(self, query, key, key, None, scaling=0.25, **arguments)


def test_a_batch_of_one_is_broadcast():
    query, key = random_states(1, 4, 2, 7, 13, 16)[0], random_states(3, 4, 2, 7, 13, 16)[1]
    attention = _Attention()
    with record_attention_entropy(attention) as record:
        attention(query, key)
    expected = naive_attention_entropy(query.expand(3, -1, -1, -1), key, scaling=0.25).mean((0, 2))
    assert record.num_queries == 3 * 7
    torch.testing.assert_close(record.entropy[0].double(), expected, atol=2e-5, rtol=0)


def test_a_sink_for_every_query(monkeypatch):
    monkeypatch.setattr(entropy_module, "_BLOCK_ELEMENTS", 2000)
    monkeypatch.setattr(linear_module, "_CACHED_ELEMENTS", 2000)
    query, key = random_states(2, 4, 2, 23, 13, 16)
    sinks = torch.randn(2, 4, 23, 1)
    attention = _Attention()
    with record_attention_entropy(attention) as record:
        attention(query, key, sinks=sinks)
    expected = [
        naive_attention_entropy(query[:, :, [i]], key, scaling=0.25, sinks=sinks[b, :, i, 0])[b]
        for b in range(2)
        for i in range(23)
    ]
    torch.testing.assert_close(record.entropy[0].double(), torch.cat(expected, -1).mean(-1), atol=2e-5, rtol=0)


def test_part_of_a_model():
    model, batch = make_model("llama"), make_batch("none")
    with torch.no_grad(), record_attention_entropy(model) as whole:
        model(**batch)
    with torch.no_grad(), record_attention_entropy(model.model.layers[1]) as record:
        model(**batch)
    assert whole.layer_names == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert record.layer_names == ["self_attn"]
    assert torch.equal(record.entropy, whole.entropy[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, batch = make_model("llama").to(dtype), make_batch("left")
    with torch.inference_mode(), record_attention_entropy(model) as record:
        model(**batch)
        model(**batch)
    maps = float64_maps(model, batch)
    expected = mean_of_queries(torch.special.entr(maps).sum(-1), batch["attention_mask"])
    # queries and keys are rounded to the model's dtype
    torch.testing.assert_close(record.entropy.double(), expected, atol=5e-2, rtol=0)
    with record_attention_entropy(model) as once, torch.autocast("cpu", dtype=dtype), torch.no_grad():
        model(**batch)
    assert record.num_queries == 2 * once.num_queries
    torch.testing.assert_close(once.entropy, record.entropy, atol=5e-2, rtol=0)


def test_a_single_token_has_no_normalized_entropy():
    model = make_model("llama")
    with record_attention_entropy(model) as record, torch.no_grad():
        model(torch.ones(1, 1, dtype=torch.long))
    assert record.num_queries == 1
    assert torch.equal(record.entropy, torch.zeros(2, 4)) and torch.equal(record.max_entropy, torch.zeros(2, 4))
    assert record.normalized_entropy.isnan().all()


def test_nothing_measured_is_nan():
    with record_attention_entropy(make_model("llama")) as record:
        pass
    assert record.num_queries == 0 and record.entropy.isnan().all()


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "falcon"])
def test_models_beside_the_interface_are_refused_by_name(model_type):
    config = AutoConfig.for_model(model_type, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    reason = f"{type(model).__name__} computes its attention itself and not by the attention interface"
    with pytest.raises(ValueError, match=reason), record_attention_entropy(model):
        pass


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_encoder_of_an_encoder_decoder(implementation):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4}
    config = AutoConfig.for_model("bart", **sizes, decoder_layers=1, decoder_attention_heads=4)
    model, batch = AutoModel.from_config(config, attn_implementation="eager").eval(), make_batch("right")
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.q_proj.weight.normal_(std=0.5)
        maps = torch.stack(model.encoder(**batch, output_attentions=True).attentions).double()
        model.set_attn_implementation(implementation)
        with record_attention_entropy(model.encoder) as record:
            model.encoder(**batch)
    expected = mean_of_queries(torch.special.entr(maps).sum(-1), batch["attention_mask"])
    torch.testing.assert_close(record.entropy.double(), expected, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="BartDecoder is an encoder-decoder, or a part of one"):
        record_attention_entropy(model.decoder).__enter__()


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_decoders_with_cross_attention_are_refused(model_type):
    model = make_model(model_type, is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="with cross attention"), record_attention_entropy(model):
        pass


def test_encoder_decoders_are_refused_by_name():
    config = AutoConfig.for_model("bart", vocab_size=VOCAB_SIZE, d_model=32, encoder_layers=1, decoder_layers=1)
    model = AutoModel.from_config(config)
    with (
        pytest.raises(ValueError, match="BartModel is an encoder-decoder"),
        record_attention_entropy(model),
    ):
        pass


@pytest.mark.slow  # flex attention is compiled
# raised inside torch.compile, and by the way transformers calls it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_flex_attention(padding):
    model, batch = make_model("llama"), make_batch(padding)
    with torch.no_grad():
        with record_attention_entropy(model) as expected:
            model(**batch)
        model.set_attn_implementation("flex_attention")
        before = model(**batch).logits
        with record_attention_entropy(model) as record:
            inside = model(**batch).logits
    assert torch.equal(before, inside)
    assert record.num_queries == expected.num_queries
    torch.testing.assert_close(record.entropy, expected.entropy, atol=2e-5, rtol=0)


def _measure_half_a_batch(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, batch = make_model("llama"), make_batch("left", batch=4)
    half = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()}
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    with record_attention_entropy(parallel) as record:
        parallel(**half)
    with record_attention_entropy(parallel, reduce=False) as alone:
        parallel(**half)
    torch.save((record.entropy, record.num_queries, alone.num_queries), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # each process imports transformers
def test_two_processes_see_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_measure_half_a_batch, args=(tmp_path / "store", tmp_path), nprocs=2)
    model, batch = make_model("llama"), make_batch("left", batch=4)
    with record_attention_entropy(model) as expected, torch.no_grad():
        model(**batch)
    for rank, num_queries in enumerate((9 + 4, 13 + 13)):
        entropy, reduced, alone = torch.load(tmp_path / f"{rank}.pt")
        assert (reduced, alone) == (expected.num_queries, num_queries)
        torch.testing.assert_close(entropy, expected.entropy, atol=1e-6, rtol=0)


LONG_CONTEXT = """
import resource
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from modeling_lnfree import record_attention_entropy

torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama", vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=2**15, bos_token_id=None, eos_token_id=None,
)
model = AutoModelForCausalLM.from_config(config).eval()
input_ids = torch.randint(61, (1, 2**15))
with torch.no_grad():
    model(input_ids)
    plain = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with record_attention_entropy(model) as record:
        model(input_ids)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - plain
print(added, *record.normalized_entropy.flatten().tolist())
"""


@pytest.mark.slow
def test_context_of_32k_adds_no_map():
    run = subprocess.run(
        [sys.executable, "-c", LONG_CONTEXT], cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
    )
    added, *normalized = map(float, run.stdout.split())
    # KiB; the two maps alone would take 8 GiB
    assert added < 256 * 1024
    assert all(0.5 < value <= 1 for value in normalized)
