"""The way of a GPU, by its name: a stand-in for the kernel checks what it is given, and computes by definition."""

from types import SimpleNamespace

import pytest
import torch

from modeling_lnfree import compute_attention_entropy
from modeling_lnfree.metrics.attention_entropy import entropy
from modeling_lnfree.metrics.attention_entropy.naive import naive_attention_entropy
from modeling_lnfree.metrics.attention_entropy.visibility import Visibility, split_mask


def stand_in(query, key, *, scaling, is_causal=False, mask=None, bias=None, softcap=None, sinks=None, **more):
    """With the arguments of the kernel, which multiplies whatever it is given: what is infinite becomes a number."""
    assert not more and (mask is None or mask.dtype == torch.bool)
    query, key = query.nan_to_num(posinf=1e4, neginf=-1e4), key.nan_to_num(posinf=1e4, neginf=-1e4)
    shape = (len(query), query.shape[1], query.shape[2], key.shape[2])
    shown = torch.zeros(shape) if bias is None else bias.expand(shape).double()
    shown = shown if mask is None else shown.masked_fill(~mask, -torch.inf)
    options = {"scaling": scaling, "is_causal": is_causal, "softcap": softcap, "sinks": sinks}
    return SimpleNamespace(entropy=naive_attention_entropy(query, key, attention_mask=shown, **options).float())


@pytest.mark.parametrize("kind", ["causal", "all", "padded", "biased", "capped", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_way_of_a_gpu_equals_that_of_a_cpu(kind, dtype, monkeypatch):
    monkeypatch.setattr(entropy, "_load_kernel", lambda: stand_in)
    query, key = torch.randn(2, 4, 20, 8).to(dtype), torch.randn(2, 2, 20, 8).to(dtype)
    key[1, 0, 12, 3] = torch.inf
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    mask[0, :, :, :7] = False
    given = {
        **{"causal": {"is_causal": True}, "all": {}, "padded": {"attention_mask": mask}},
        "biased": {"attention_mask": torch.randn(1, 4, 20, 20).masked_fill(~mask, torch.finfo(torch.float32).min)},
        "capped": {"is_causal": True, "softcap": 2.0},
        "sinks": {"is_causal": True, "sinks": torch.randn(4)},
    }[kind]
    expected = compute_attention_entropy(query, key, scaling=0.25, **given)
    visible, bias = split_mask(given.get("attention_mask"))
    visibility = Visibility(visible, given.get("is_causal", False), 20, 20, query.device)
    sinks = given.get("sinks")
    sinks = None if sinks is None else sinks.view(1, 4, 1, 1)
    found, infinite = entropy.kernel_path(query, key, 0.25, visibility, bias, given.get("softcap"), sinks)
    seen = (visibility.number() > 0).expand(found.shape)
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-5, equal_nan=True)
    # both heads of the first group meet the infinite key where they see it
    first = 0 if kind == "all" else 12
    assert found[1, :2, first:].isnan().all() and infinite.sum() == 2 * (20 - first)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
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
    monkeypatch.setattr(entropy, "_load_kernel", lambda: stand_in)
    query, key = (torch.zeros(2, 4, 5, changes.get("head_dim", 8), dtype=changes.get("dtype")) for _ in range(2))
    query.requires_grad_(changes.get("requires_grad", False))
    assert entropy._kernel_takes(query, key, None, changes.get("sinks")) == taken
    if "requires_grad" in changes:
        with torch.no_grad():
            assert entropy._kernel_takes(query, key, None, None)
    monkeypatch.setattr(entropy, "_load_kernel", lambda: None)
    assert not entropy._kernel_takes(query, key, None, None)
