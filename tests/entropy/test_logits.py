"""What the recorder says of the scores: the largest, their log-sum-exp, and the weight on the first key."""

import pytest
import torch

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.metrics.attention_entropy.entropy import logits_of_visible
from modeling_lnfree.metrics.attention_entropy.visibility import Visibility

from ..measurement.naive import watched_softmax
from .models import float64_maps, make_batch, make_model, mean_of_queries, random_mask, random_states


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_weight_on_the_first_key_matches_maps(model_type, padding):
    model, batch = make_model(model_type, "eager"), make_batch(padding)
    with record_attention_entropy(model, logits=True) as record, torch.no_grad():
        model(**batch)
    maps = float64_maps(model, batch)
    # the first key that a query may see, which a sliding window moves on; a hidden key has no weight at all
    first = (maps > 0).int().argmax(-1, keepdim=True)
    on_first = maps.gather(-1, first)[..., 0]
    expected = mean_of_queries(on_first, batch["attention_mask"])
    torch.testing.assert_close(record.sink_share.double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "gpt_oss", "bert"])
def test_spectral_gap_matches_the_eigenvalues_of_maps(model_type, padding):
    model, batch = make_model(model_type, "eager"), make_batch(padding)
    with record_attention_entropy(model, logits=True) as record, torch.no_grad():
        model(batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1])
        model(batch["input_ids"][1:], attention_mask=batch["attention_mask"][1:])
    if model_type == "bert":
        assert record.spectral_gap.isnan().all()  # its maps are not triangular
        return
    maps, gaps = float64_maps(model, batch)[..., :13], []  # without a sink's column
    for sequence, real in enumerate(batch["attention_mask"].bool()):
        sizes = torch.linalg.eigvals(maps[:, sequence][..., real, :][..., real]).abs().sort(-1).values
        gaps.append(sizes[..., -1] - sizes[..., -2])
    torch.testing.assert_close(record.spectral_gap.double(), torch.stack(gaps).mean(0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scores_match_their_definition(padding, softcap):
    model = make_model("gemma2", "eager", attn_logit_softcapping=softcap, sliding_window=64)
    batch, seen = make_batch(padding), []
    with record_attention_entropy(model, logits=True) as record, watched_softmax(seen), torch.no_grad():
        model(**batch)
    scores = torch.stack(seen)  # (layers, batch, heads, T, T), with the mask added
    real = batch["attention_mask"].bool()[None, :, None, :].expand(scores.shape[:-1])
    largest = scores.amax(-1).masked_fill(~real, -torch.inf).amax((1, 3))
    torch.testing.assert_close(record.max_logit.double(), largest, atol=1e-5, rtol=1e-6)
    expected = mean_of_queries(scores.logsumexp(-1), batch["attention_mask"])
    torch.testing.assert_close(record.logsumexp.double(), expected, atol=1e-5, rtol=1e-6)
    if softcap is not None:
        assert (record.max_logit <= softcap).all() and (record.max_logit > 0.5 * softcap).any()


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8, 1e12])
@pytest.mark.parametrize("options", ["causal", "mask", "sinks"])
def test_weights_of_large_scores_match_float64(scale, options):
    query, key = random_states(2, 4, 2, 24, 24, 16, scale=scale)
    # every key twice, so that no size of the scores decides between the two
    key[:, :, 1::2] = key[:, :, ::2]
    sinks = torch.tensor([-2.0, 0.0, 1.0, 3.0]).view(1, 4, 1, 1) if options == "sinks" else None
    mask = random_mask((2, 1, 24, 24)) if options == "mask" else None
    visibility = Visibility(mask, True, 24, 24, query.device)
    found = logits_of_visible(query, key, 0.25, visibility, sinks=sinks).double()
    scores = 0.25 * query.double() @ key.double().repeat_interleave(2, 1).mT
    seen = torch.ones(24, 24, dtype=torch.bool).tril() if mask is None else mask & torch.ones(24, 24).bool().tril()
    scores = scores.masked_fill(~seen, -torch.inf)
    all_scores = scores if sinks is None else torch.cat([scores, sinks.double().expand(2, 4, 24, 1)], -1)
    weights = all_scores.softmax(-1)
    first = seen.int().argmax(-1, keepdim=True).expand(2, 4, 24, 1)
    expected = torch.stack(
        [
            scores.amax(-1),
            weights.gather(-1, first)[..., 0],
            all_scores.logsumexp(-1),
            weights[..., :24].diagonal(0, -2, -1),
        ],
        -1,
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-6)


def test_scores_of_two_passes_and_a_broken_head():
    model, batch = make_model("gpt2"), make_batch("none")
    states = []
    with torch.no_grad():
        with record_attention_entropy(model, logits=True) as record:
            model(batch["input_ids"][:2])
            model(batch["input_ids"][2:])
        projection = model.transformer.h[0].attn.c_attn
        hook = projection.register_forward_hook(lambda module, args, output: states.append(output))
        model(batch["input_ids"])
        hook.remove()
        query, key, _ = states[0].double().unflatten(-1, (12, 8)).transpose(1, 2).chunk(3, 1)
        scores = (query @ key.mT / 8**0.5).masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(record.max_logit[0].double(), scores.amax((0, 2, 3)), atol=1e-5, rtol=0)
        expected = scores.logsumexp(-1).mean((0, 2))
        torch.testing.assert_close(record.logsumexp[0].double(), expected, atol=1e-5, rtol=0)
        model.transformer.h[1].attn.c_attn.bias[2 * 8 + 3] = torch.nan
        with record_attention_entropy(model, logits=True) as record:
            model(**batch)
    broken = torch.zeros(2, 4, dtype=torch.bool)
    broken[1, 2] = True
    for name in ("max_logit", "sink_share", "logsumexp"):
        assert torch.equal(getattr(record, name).isnan(), broken)


def test_scores_that_were_not_looked_at():
    model = make_model("llama")
    with record_attention_entropy(model) as record, torch.no_grad():
        model(**make_batch("none"))
    with pytest.raises(ValueError, match=r"scores were not looked at: .*logits=True"):
        record.max_logit  # noqa: B018
