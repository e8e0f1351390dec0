"""The way of a GPU, by its name: a stand-in for the kernel checks what it is given, and computes by definition."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.metrics.attention_entropy import entropy
from modeling_lnfree.metrics.attention_entropy.naive import naive_attention_entropy

from .models import make_batch, make_model


def stand_in(query, key, *, scaling, is_causal, mask, bias=None, softcap=None, sinks=None, padded=None, logits=False):
    """With the arguments of the kernel that the record's path has, and its sums."""
    assert mask is None or mask.dtype == torch.bool
    shape = (len(query), query.shape[1], query.shape[2], key.shape[2])
    shown = torch.zeros(shape) if bias is None else bias.expand(shape).double()
    shown = shown if mask is None else shown.masked_fill(~mask, -torch.inf)
    options = {"scaling": scaling, "is_causal": is_causal, "softcap": softcap, "sinks": sinks}
    entropies = naive_attention_entropy(query, key, attention_mask=shown, **options)
    seen = (shown > -1e4) & torch.ones(shape[2:], dtype=torch.bool).tril() if is_causal else shown > -1e4
    counted = seen.any(-1) if padded is None else seen.any(-1) & ~padded[:, None]
    largest = (seen.sum(-1) + (0 if sinks is None else 1)).log()
    columns = (entropies, largest, entropies.isnan() * seen.sum(-1), torch.zeros(shape[:3]), torch.ones(shape[:3]))
    total = torch.stack([column.double().masked_fill(~counted, 0).sum((0, 2)) for column in columns], -1)
    scored = torch.full((shape[1], 3), 7.0).double()
    own = torch.full(shape[:3], 0.5)
    return SimpleNamespace(
        entropy=entropies.float().masked_fill(~counted, torch.nan),
        total=total,
        logits=scored if logits else None,
        own_weight=own if logits else None,
    )


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "gemma2", "gpt_oss", "bert"])
def test_a_record_by_the_kernel_equals_that_of_a_cpu(model_type, padding, monkeypatch):
    model, batch, layers = make_model(model_type, "eager"), make_batch(padding), ([], [])
    with record_attention_entropy(model, on_layer=layers[0].append) as expected, torch.no_grad():
        model(**batch)
    monkeypatch.setattr(entropy, "_load_kernel", lambda: stand_in)
    monkeypatch.setattr(entropy, "_kernel_takes", lambda *args: True)
    with record_attention_entropy(model, logits=True, on_layer=layers[1].append) as found, torch.no_grad():
        model(**batch)
    assert not found.unmeasured and found.num_queries == expected.num_queries
    for name in ("entropy", "max_entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*layers, strict=True):
        assert ours.layer == theirs.layer
        torch.testing.assert_close(ours[1:], theirs[1:], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert found.max_logit.eq(7).all() and found.sink_share.mul(found.num_queries).sub(7).abs().max() < 1e-5
    assert found.spectral_gap.eq(0).all()


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"device": "cpu"}, False),
        ({"dtype": torch.float64}, False),
        ({"head_dim": 256}, True),
        ({"head_dim": 264}, False),
        ({"requires_grad": True}, False),
        ({"sinks": torch.zeros(1, 4, 1, 1)}, True),
        ({"sinks": torch.zeros(2, 4, 1, 1)}, False),
        ({"sinks": torch.zeros(1, 4, 5, 1)}, False),
    ],
    ids=str,
)
def test_what_the_kernel_takes(changes, taken, monkeypatch):
    """By tensors without numbers, which may say that they are on a GPU."""
    monkeypatch.setattr(entropy, "_load_kernel", lambda: stand_in)
    options = {"dtype": changes.get("dtype"), "device": changes.get("device", "cuda")}
    with FakeTensorMode():
        query, key = (torch.empty(2, 4, 5, changes.get("head_dim", 8), **options) for _ in range(2))
        query.requires_grad_(changes.get("requires_grad", False))
        assert entropy._kernel_takes(query, key, None, changes.get("sinks")) == taken
        if "requires_grad" in changes:
            with torch.no_grad():
                assert entropy._kernel_takes(query, key, None, None)
        monkeypatch.setattr(entropy, "_load_kernel", lambda: None)
        assert not entropy._kernel_takes(query, key, None, None)
