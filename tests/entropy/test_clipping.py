"""Entropies of clipped softmax: of the weights divided by their sum, and NaN and counted where none is left."""

import pytest
import torch
from transformers import DynamicCache

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.modeling_lnfree import CACHE_NAME

from ..conftest import tiny_model


ROWS = [torch.arange(2, 15), torch.arange(3, 45, 5), torch.tensor([7, 7, 7, 50])]
LENGTH = max(map(len, ROWS))
# one below which no query is left without a weight, and the preset's, by which most are
ALPHAS = [0.5, 12.0]


def clipped(alpha: float, **fields):
    torch.manual_seed(1)
    model = tiny_model("SM+LN+R", softmax_clipping=alpha, initializer_range=0.3, **fields)
    assert model.config._attn_implementation == "eager"
    return model


def softmax_by_row(model, row):
    """Of one sequence, in float64 and before clipping, `(layers, heads, T, T)`: each layer from its inputs."""
    model, maps = model.double(), []

    def look(module, args, kwargs, output):
        states = args[0][0]
        query, key = (
            projection(states).unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
            for projection in (module.q_proj, module.k_proj)
        )
        scores = query @ key.mT * module.head_dim**-0.5
        maps.append(scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(-1))

    hooks = [layer.self_attn.register_forward_hook(look, with_kwargs=True) for layer in model.model.layers]
    with torch.no_grad():
        model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    model.float()
    return torch.stack(maps)


def by_definition(model, row, alpha):
    """Entropies `(layers, heads, T)`, NaN for a query without a weight, and the clipped weights."""
    number = torch.arange(1, len(row) + 1)[:, None]
    weights = ((1 + alpha / number) * softmax_by_row(model, row) - alpha / number).clamp(0, 1)
    shares = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1), weights


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_entropy_is_that_of_the_weights_divided_by_their_sum(alpha, padding):
    model, measured = clipped(alpha), []
    input_ids, mask = torch.zeros(2, 3, LENGTH, dtype=torch.long)
    for index, row in enumerate(ROWS):
        place = slice(LENGTH - len(row), None) if padding == "left" else slice(0, len(row))
        input_ids[index, place], mask[index, place] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), record_attention_entropy(model, logits=True, on_layer=measured.append) as record:
        model(input_ids, attention_mask=mask, position_ids=positions)
    found = torch.stack([layer.entropy for layer in measured]).transpose(1, 2)  # (layers, heads, batch, T)
    entropies, weights = zip(*(by_definition(model, row, alpha) for row in ROWS), strict=True)
    expected = torch.cat(entropies, -1)  # (layers, heads, queries)
    torch.testing.assert_close(found[..., mask.bool()].double(), expected, atol=5e-5, rtol=0, equal_nan=True)
    assert found[..., ~mask.bool()].isnan().all()

    empty = expected.isnan()
    assert empty.any() == (alpha > 1) and not empty.all(-1).any()
    number = torch.cat([torch.arange(1, len(row) + 1) for row in ROWS])
    assert record.empty_count.equal(empty.sum(-1)) and record.nan_count.equal((empty * number).sum(-1))
    assert record.num_queries == len(number) and record.unmeasured == [] and not record.inf_count.any()
    torch.testing.assert_close(record.entropy.double(), expected.nanmean(-1), atol=5e-5, rtol=0)
    largest = torch.full_like(record.entropy, number.log().mean().item())
    torch.testing.assert_close(record.max_entropy, largest, atol=1e-5, rtol=0)
    torch.testing.assert_close(record.normalized_entropy, (record.entropy / largest).clamp(max=1), atol=1e-6, rtol=0)
    # of the weights as they are
    sink = torch.cat([row[..., 0] for row in weights], -1).mean(-1)
    torch.testing.assert_close(record.sink_share.double(), sink, atol=5e-5, rtol=0)


def test_cached_steps_and_packed_sequences_are_measured_as_they_stand_alone():
    model, (first, second, _) = clipped(2.0), ROWS
    expected = torch.cat([by_definition(model, row, 2.0)[0] for row in (first, second)], -1)
    with torch.no_grad(), record_attention_entropy(model) as packed:
        positions = torch.cat([torch.arange(len(row)) for row in (first, second)])
        model(torch.cat([first, second])[None], position_ids=positions[None], use_cache=False)
    with torch.no_grad(), record_attention_entropy(model) as cached:
        for row in (first, second):
            cache = DynamicCache(config=model.config)
            for part in row.split([5, *[1] * (len(row) - 5)]):
                model(part[None], **{CACHE_NAME: cache})
    for record in (packed, cached):
        torch.testing.assert_close(record.entropy.double(), expected.nanmean(-1), atol=5e-5, rtol=0)
        assert record.empty_count.equal(expected.isnan().sum(-1))


def test_gradients_match_the_definition():
    model, row, measured = clipped(12.0).double(), ROWS[0], []
    with record_attention_entropy(model, differentiable=True, on_layer=measured.append):
        model(row[None], use_cache=False)
    entropy = measured[0].entropy[0]
    parameters = [model.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.k_proj.weight]
    found = torch.autograd.grad(entropy.nansum(), parameters)

    attention, number = model.model.layers[0].self_attn, torch.arange(1, len(row) + 1)[:, None]
    states = model.model.embed_tokens(row) + model.model.embed_positions(torch.arange(len(row)))
    states = model.model.layers[0].input_layernorm(states)
    query, key = (
        (states @ each.weight.T + each.bias).unflatten(-1, (4, 8)) for each in (attention.q_proj, attention.k_proj)
    )
    scores = torch.einsum("thd,shd->hts", query, key) / 8**0.5
    p = scores.masked_fill(torch.ones(len(row), len(row)).triu(1).bool(), -torch.inf).softmax(-1)
    weights = ((1 + 12 / number) * p - 12 / number).clamp(min=0)
    kept = weights.sum(-1) > 0
    assert entropy.isnan().equal(~kept) and 0 < kept.sum() < kept.numel()
    shares = weights[kept] / weights[kept].sum(-1, keepdim=True)
    expected = -(shares * shares.where(shares > 0, 1).log()).sum()
    torch.testing.assert_close(entropy.nansum(), expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters))


def records_of_parts():
    """Of all rows, of the first two and of the last."""
    model, records = clipped(12.0), []
    for rows in (ROWS, ROWS[:2], ROWS[2:]):
        with torch.no_grad(), record_attention_entropy(model) as record:
            for row in rows:
                model(row[None])
        records.append(record)
    return records


def test_measurements_are_put_together_by_the_queries_that_attend(metric):
    records = records_of_parts()
    assert (records[0].empty_count != records[0].empty_count[0, 0]).any()
    whole, parts = metric.compute(predictions=records[:1]), metric.compute(predictions=records[1:])
    for name in ("entropy", "max_entropy", "normalized_entropy"):
        torch.testing.assert_close(torch.tensor(parts[name]), torch.tensor(whole[name]), atol=1e-6, rtol=0)
    for name in ("nan_count", "empty_count", "num_queries"):
        assert parts[name] == whole[name]
    # of a measurement without the count, as an earlier version made it
    earlier = {name: value for name, value in whole.items() if name != "empty_count"}
    assert metric.compute(predictions=[earlier])["entropy"] == whole["entropy"]


def test_torchmetrics_puts_them_together_alike(metric):
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install 'lnfree[torchmetrics]'")
    from modeling_lnfree.metrics.attention_entropy import torchmetric

    records = records_of_parts()
    expected = metric.compute(predictions=records[:1])
    batchwise = torchmetric.AttentionEntropy(3, 4)
    for record in records[1:]:
        batchwise.update(record)
    found = batchwise.compute()
    for name in ("entropy", "max_entropy"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), atol=1e-6, rtol=0)
    assert found["empty_count"] == expected["empty_count"]


def test_a_head_that_attends_to_nothing_at_all_is_nan_and_a_broken_one_is_not_empty():
    model = clipped(12.0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]), **{CACHE_NAME: cache})
    # a query of zeros, to which all nine keys are alike
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.q_proj.bias)
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(torch.tensor([[13]]), **{CACHE_NAME: cache})
    assert record.entropy.isnan().all() and record.empty_count.eq(1).all() and record.nan_count.eq(9).all()
    with torch.no_grad(), record_attention_entropy(model) as record:
        model.model.layers[1].self_attn.q_proj.bias[3] = torch.nan
        model(torch.tensor([[13, 14]]))
    assert record.entropy[1, 0].isnan() and record.empty_count[1].tolist() == [0, 1, 1, 1]
    assert not record.entropy[0].isnan().any()
