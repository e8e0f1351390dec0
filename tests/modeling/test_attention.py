"""Attention implementations, cache, generation, padding, packing; inputs and outputs."""

import warnings

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..conftest import every_backbone, every_variant, greedy, random_ids, tiny_model


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


def test_older_name_of_the_cache_warns_as_in_a_stock_model():
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    models = [tiny_model(), GPT2LMHeadModel(config), tiny_model().model, GPT2Model(config)]
    told = []
    for model in models:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(random_ids(1, 3), past_key_values=DynamicCache(config=model.config))
        told.append([str(warning.message).partition(" for ")[0] for warning in caught])
    assert told[0] == told[1] and told[2] == told[3]


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
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_packed_sequences_do_not_see_each_other(backbone, implementation):
    model = tiny_model("SM+R", backbone, attn_implementation=implementation)
    first, second = random_ids(1, 7), random_ids(1, 10)
    position_ids = torch.cat([torch.arange(7), torch.arange(10)])[None]
    with torch.no_grad():
        # by default a model keeps a cache
        for cached in ({}, {"use_cache": False}):
            packed = model(torch.cat([first, second], dim=1), position_ids=position_ids, **cached).logits
            torch.testing.assert_close(packed[:, :7], model(first).logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(packed[:, 7:], model(second).logits, atol=1e-5, rtol=1e-5)


def test_kwargs_reach_the_attention_function(monkeypatch):
    seen = []

    def attention(module, *args, **kwargs):
        seen.append((module.layer_idx, kwargs.pop("own_keyword"), kwargs["position_ids"].shape))
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "own_attention", attention)
    model = tiny_model("SM+R")
    model.set_attn_implementation("own_attention")
    model(random_ids(1, 5), own_keyword=7, use_cache=False)
    assert seen == [(layer, 7, (1, 5)) for layer in range(3)]


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
    assert model(random_ids(1, 64)).logits.shape == (1, 64, 99)
    with pytest.raises(ValueError, match="position_ids must not be negative, got -1"):
        model(random_ids(1, 3), position_ids=torch.tensor([[0, 1, -1]]))
    assert tiny_model("SM+R", "pythia")(random_ids(1, 65)).logits.shape == (1, 65, 99)
