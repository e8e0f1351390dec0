"""The mathematics of attention entropy against its definition in float64, forward and gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_lnfree import compute_attention_entropy
from modeling_lnfree.metrics.attention_entropy import entropy as entropy_module
from modeling_lnfree.metrics.attention_entropy import linear as linear_module
from modeling_lnfree.metrics.attention_entropy import visibility as visibility_module
from modeling_lnfree.metrics.attention_entropy.naive import naive_attention_entropy

from ..conftest import LargestTensor
from .models import random_mask, random_states


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    num_queries=st.integers(1, 40),
    num_past=st.integers(0, 20),
    head_dim=st.sampled_from([1, 3, 8, 16, 17, 64]),
    mask=st.sampled_from(["none", "causal", "bool", "bool per head", "causal and bool", "additive"]),
    seed=st.integers(0, 2**16),
)
def test_entropy_matches_definition(batch, kv_heads, groups, num_queries, num_past, head_dim, mask, seed):
    heads, num_keys = kv_heads * groups, num_queries + num_past
    query, key = random_states(batch, heads, kv_heads, num_queries, num_keys, head_dim, seed=seed)
    attention_mask = None
    if "bool" in mask:
        attention_mask = random_mask((batch, heads if "head" in mask else 1, num_queries, num_keys), seed)
    elif mask == "additive":
        attention_mask = torch.randn(1, heads, num_queries, num_keys, generator=torch.Generator().manual_seed(seed))
        attention_mask[..., 1::3] = -torch.inf
    arguments = {"scaling": head_dim**-0.5, "attention_mask": attention_mask, "is_causal": "causal" in mask}
    entropy = compute_attention_entropy(query, key, **arguments)
    assert entropy.shape == (batch, heads, num_queries) and entropy.dtype == torch.float32
    assert (entropy >= 0).all()
    # float32, scores of ordinary size
    torch.testing.assert_close(entropy.double(), naive_attention_entropy(query, key, **arguments), atol=2e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 63, 127, 131, 257, 512])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)], ids=["full", "grouped", "multi-query"])
def test_causal_lengths_match_definition(length, heads, kv_heads):
    query, key = random_states(2, heads, kv_heads, length, length, 32)
    ours = compute_attention_entropy(query, key, scaling=32**-0.5, is_causal=True)
    theirs = naive_attention_entropy(query, key, scaling=32**-0.5, is_causal=True)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [10.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_large_scores_match_definition(scale, masked):
    query, key = (state.requires_grad_() for state in random_states(2, 4, 4, 131, 131, 64, scale=scale))
    mask = random_mask((2, 1, 131, 131)) if masked else None
    arguments = {"scaling": 64**-0.5, "attention_mask": mask, "is_causal": True}
    ours = compute_attention_entropy(query, key, **arguments)
    theirs = naive_attention_entropy(query, key, **arguments)
    # the difference of two terms as large as the scores
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)
    gradients = (torch.autograd.grad(entropy.sum(), query)[0] for entropy in (ours, theirs))
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=0)


@pytest.mark.parametrize("offset", [30.0, 1000.0])
@pytest.mark.parametrize("masked", [False, True])
def test_common_offset_of_keys_costs_no_precision(masked, offset):
    query, key = random_states(2, 4, 2, 61, 61, 32)
    # exactly representable, so that float32 itself loses nothing but the low bits of the keys
    key = key.round(decimals=2) + offset
    mask = None
    if masked:
        # hidden keys, such as the empty slots of a static cache, are not part of the mean
        key[:, :, 20:] = 0.0
        mask = (torch.arange(61) < 20).expand(1, 1, 61, 61)
    arguments = {"scaling": 32**-0.5, "attention_mask": mask, "is_causal": not masked}
    theirs = naive_attention_entropy(query, key, **arguments)
    torch.testing.assert_close(compute_attention_entropy(query, key, **arguments).double(), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("block_elements", [1, 2000, 2**22])
@pytest.mark.parametrize("options", ["softcap", "sinks", "both", "bool", "bias", "bias and causal"])
def test_blocks_match_definition(options, block_elements, monkeypatch):
    monkeypatch.setattr(entropy_module, "_BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(linear_module, "_CACHED_ELEMENTS", block_elements)
    query, key = random_states(2, 4, 2, 23, 29, 16, scale=3.0)
    arguments = {"scaling": 0.25, "is_causal": "causal" in options}
    if options in ("softcap", "both"):
        arguments["softcap"] = 1.5
    if options in ("sinks", "both"):
        arguments["sinks"] = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    if options == "bool":
        arguments["attention_mask"] = random_mask((2, 1, 1, 29))
    if "bias" in options:
        arguments["attention_mask"] = -0.3 * torch.arange(29.0).expand(1, 4, 1, 29)
    ours = compute_attention_entropy(query, key, **arguments)
    torch.testing.assert_close(ours.double(), naive_attention_entropy(query, key, **arguments), atol=2e-5, rtol=0)


def masks(name):
    """Of two sequences of 23 queries and keys, with four heads."""
    positions = torch.arange(23)
    if name == "packed":
        document = torch.stack([positions // 6, positions // 9])
        return (document[:, :, None] == document[:, None]).tril()[:, None]
    if name == "window":
        return ((positions[:, None] - positions).abs() < 4).tril()[None, None]
    mask = random_mask((1 if name == "by head" else 2, 4 if "head" in name else 1, 23, 23))
    # a query that sees nothing
    mask[:, :, 5] = False
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("elements", "queries"), [(1, 1), (70, 3), (400, 8), (2**17, 64)])
@pytest.mark.parametrize(
    "mask", [None, "causal", "packed", "window", "by sequence", "by head", "by sequence and head"]
)
def test_blocks_of_linear_scores_match_definition(mask, elements, queries, dtype, monkeypatch):
    monkeypatch.setattr(linear_module, "_CACHED_ELEMENTS", elements)
    monkeypatch.setattr(linear_module, "_CACHED_QUERIES", queries)
    states = [state.requires_grad_() for state in random_states(2, 4, 2, 23, 23, 8, dtype=dtype)]
    arguments = {"scaling": 0.6, "is_causal": mask == "causal"}
    counted = torch.ones(2, 4, 23, dtype=torch.bool)
    if mask not in (None, "causal"):
        arguments["attention_mask"] = masks(mask)
        counted = arguments["attention_mask"].any(-1).expand(2, 4, 23)
    factor = torch.randn(2, 4, 23, dtype=dtype).masked_fill(~counted, 0.0)
    ours = compute_attention_entropy(*states, **arguments)
    assert ours.isnan().equal(~counted)
    found = torch.autograd.grad((ours.nan_to_num() * factor).sum(), states)
    if not counted.all():
        # the definition's own gradient is NaN beside a query that sees no key
        arguments["attention_mask"] = arguments["attention_mask"] | ~counted[:, :, :, None]
    twins = [state.detach().double().requires_grad_() for state in states]
    theirs = naive_attention_entropy(*twins, **arguments)
    expected = torch.autograd.grad((theirs * factor).sum(), twins)
    atol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(ours[counted].double(), theirs[counted], atol=atol, rtol=0)
    torch.testing.assert_close([grad.double() for grad in found], list(expected), atol=atol, rtol=0)


def test_heads_without_a_gradient_get_exactly_0_and_the_others_the_same(monkeypatch):
    monkeypatch.setattr(linear_module, "_CACHED_ELEMENTS", 200)
    states = [state.requires_grad_() for state in random_states(2, 4, 2, 23, 23, 8)]
    entropy = compute_attention_entropy(*states, scaling=0.6, is_causal=True)
    only = torch.autograd.grad(entropy[:, :2].sum(), states, retain_graph=True)
    both = torch.autograd.grad(entropy.sum(), states)
    for states, heads in ((only[0], 2), (only[1], 1)):
        assert not states[:, heads:].any() and states[:, :heads].any()
    assert only[0][:, :2].equal(both[0][:, :2]) and only[1][:, :1].equal(both[1][:, :1])


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attention_mask": masks("packed")}])
def test_what_autocast_does_not_reach(options):
    states = [state.requires_grad_() for state in random_states(2, 4, 2, 23, 23, 8)]
    expected = torch.autograd.grad(compute_attention_entropy(*states, scaling=0.6, **options).sum(), states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(compute_attention_entropy(*states, scaling=0.6, **options).sum(), states)
    assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True))


def test_half_precision_inputs_are_computed_in_float32():
    query, key = random_states(1, 4, 2, 37, 37, 32, dtype=torch.bfloat16, scale=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = compute_attention_entropy(query, key, scaling=32**-0.5, is_causal=True)
    theirs = naive_attention_entropy(query, key, scaling=32**-0.5, is_causal=True)
    assert ours.dtype == torch.float32
    # against float64 of the same bfloat16 inputs
    torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=0)


def test_extreme_heads_stay_in_range():
    query, key = random_states(1, 2, 2, 64, 64, 16, scale=300.0)
    query[:, 1] = 0.0
    entropy = compute_attention_entropy(query, key, scaling=1.0, is_causal=True)
    assert (entropy >= 0).all() and not entropy.isnan().any()
    torch.testing.assert_close(entropy[0, 1], torch.arange(1, 65).float().log(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", ["causal", "mask", "bias", "softcap and sinks"])
def test_broken_keys_spoil_only_the_queries_that_see_them(options):
    query, key = random_states(2, 4, 2, 17, 17, 16)
    arguments = {"scaling": 0.25, "is_causal": True}
    if options == "mask":
        arguments["attention_mask"] = random_mask((2, 1, 17, 17))
    elif options == "bias":
        arguments["attention_mask"] = torch.randn(1, 4, 17, 17, generator=torch.Generator().manual_seed(0))
    elif options == "softcap and sinks":
        arguments |= {"softcap": 5.0, "sinks": torch.zeros(4)}
    healthy = compute_attention_entropy(query, key, **arguments)
    # a soft cap would turn the infinity of the definition into an ordinary score
    key[0, 1, 11, 3], query[1, 0, 5, 2] = torch.nan, torch.nan if "softcap" in options else torch.inf
    broken = naive_attention_entropy(query, key, **arguments).isnan()
    assert broken[0, 2:].any() and not broken[0, :2].any() and not broken[:, :, :5].any() and broken[1, 0, 5]
    expected = healthy.masked_fill(broken, torch.nan)
    torch.testing.assert_close(
        compute_attention_entropy(query, key, **arguments), expected, atol=2e-5, rtol=0, equal_nan=True
    )


def test_queries_that_see_no_key_are_nan():
    query, key = random_states(1, 2, 2, 5, 5, 8)
    mask = random_mask((1, 1, 5, 5))
    mask[:, :, 2] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for attention_mask in (mask, additive):
        entropy = compute_attention_entropy(query, key, scaling=1.0, attention_mask=attention_mask)
        assert entropy[:, :, 2].isnan().all() and entropy.isnan().sum() == 2
    # more queries than keys: the first ones come before every key
    entropy = compute_attention_entropy(query, key[:, :, :3], scaling=1.0, is_causal=True)
    assert entropy[:, :, :2].isnan().all() and entropy.isnan().sum() == 4


@pytest.mark.parametrize(("batch", "num_queries", "num_keys"), [(2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 3, 4)])
def test_empty_inputs(batch, num_queries, num_keys):
    query, key = random_states(batch, 4, 2, num_queries, num_keys, 8)
    entropy = compute_attention_entropy(query, key, scaling=1.0)
    assert entropy.shape == (batch, 4, num_queries) and entropy.isnan().all()


@pytest.mark.parametrize(
    ("key_shape", "options", "message"),
    [
        ((2, 3, 5, 8), {}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ((2, 0, 5, 8), {}, "heads must be a multiple of kv_heads, got 4 and 0"),
        # the kernel would read past the end of these
        ((1, 2, 5, 8), {}, r"got \(2, 4, 5, 8\) and \(1, 2, 5, 8\)"),
        ((2, 2, 5, 9), {}, r"got \(2, 4, 5, 8\) and \(2, 2, 5, 9\)"),
        ((2, 5, 8), {}, r"got \(2, 4, 5, 8\) and \(2, 5, 8\)"),
        ((2, 2, 5, 8), {"attention_mask": torch.ones(5, 5).bool()}, r"must be \(2 or 1, 4 .* got shape \(5, 5\)"),
        ((2, 2, 5, 8), {"attention_mask": torch.ones(2, 1, 5, 7)}, r"5 or 1, 5\) here, got shape \(2, 1, 5, 7\)"),
        ((2, 2, 5, 8), {"attention_mask": torch.ones(1, 2, 5, 5).bool()}, r"got shape \(1, 2, 5, 5\)"),
        ((2, 2, 5, 8), {"attention_mask": torch.ones(1, 1, 5, 5).long()}, "bool or floating, got torch.int64"),
        ((2, 2, 5, 8), {"sinks": torch.zeros(2)}, r"each of the 4 heads, got shape \(2,\)"),
    ],
)
def test_wrong_shapes_are_refused(key_shape, options, message):
    with pytest.raises(ValueError, match=message):
        compute_attention_entropy(torch.randn(2, 4, 5, 8), torch.randn(key_shape), scaling=1.0, **options)


GRADIENT_CASES = {
    "causal": {"is_causal": True},
    "mask": {"attention_mask": random_mask((2, 1, 7, 7))},
    "no key": {"attention_mask": random_mask((2, 1, 7, 7)) & (torch.arange(7) != 3)[:, None]},
    "bias": {"attention_mask": torch.linspace(-1, 1, 49).view(1, 1, 7, 7), "is_causal": True},
    "softcap": {"is_causal": True, "softcap": 2.0},
    "sinks": {"is_causal": True, "sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradient_matches_definition(case):
    arguments = {"scaling": 0.4, **GRADIENT_CASES[case]}
    states = random_states(2, 4, 2, 7, 7, 8, dtype=torch.float64)
    query, key = (state.requires_grad_() for state in states)
    weights = torch.linspace(0.5, 1.5, 7, dtype=torch.float64)

    def loss(function):
        return (function(query, key, **arguments) * weights).nansum()

    ours = torch.autograd.grad(loss(compute_attention_entropy), (query, key))
    if case != "no key":
        # the definition's own gradient is NaN beside a query that sees no key
        theirs = torch.autograd.grad(loss(naive_attention_entropy), (query, key))
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
    assert torch.autograd.gradcheck(
        lambda query, key: compute_attention_entropy(query, key, **arguments).nan_to_num(),
        (query, key),
        fast_mode=True,
    )


def test_float32_gradient_matches_definition():
    query, key = (state.requires_grad_() for state in random_states(2, 4, 2, 67, 67, 32))
    ours = torch.autograd.grad(compute_attention_entropy(query, key, scaling=0.2, is_causal=True).sum(), (query, key))
    theirs = torch.autograd.grad(naive_attention_entropy(query, key, scaling=0.2, is_causal=True).sum(), (query, key))
    # float32 against float64
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [300, 2**17])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("num_past", [0, 31])
@pytest.mark.parametrize("causal", [True, False])
def test_gradient_by_head_matches_definition(causal, num_past, kv_heads, elements, dtype, monkeypatch):
    monkeypatch.setattr(linear_module, "_CACHED_ELEMENTS", elements)
    query, key = random_states(2, 4, kv_heads, 90, 90 + num_past, 4, dtype=dtype)
    # of even attention, at the end of the range
    query[0, 1] = 0.0
    states = [state.requires_grad_() for state in (query, key)]
    visibility = visibility_module.Visibility(None, causal, 90, 90 + num_past, torch.device("cpu"))
    twins = [state.detach().double().requires_grad_() for state in states]
    theirs = naive_attention_entropy(*twins, scaling=0.6, is_causal=causal)
    ours = entropy_module.entropy_of_visible(*states, 0.6, visibility, by_head=True)[0]
    again = []
    gradients = linear_module._gradients
    monkeypatch.setattr(linear_module, "_gradients", lambda *args: again.append(1) or gradients(*args))
    # one for each head is not computed again; one for each query is, and is right too
    for shape, calls in (((2, 4, 1), 0), ((2, 4, 90), 1)):
        factor = torch.randn(shape)
        found = torch.autograd.grad(ours, states, factor.expand(2, 4, 90), retain_graph=True)
        expected = torch.autograd.grad(theirs, twins, factor.double().expand(2, 4, 90), retain_graph=True)
        tolerance = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 1e-2}
        torch.testing.assert_close([gradient.double() for gradient in found], list(expected), **tolerance)
        assert len(again) == calls


def test_memory_grows_linearly_with_length(monkeypatch):
    monkeypatch.setattr(entropy_module, "_BLOCK_ELEMENTS", 2**14)
    monkeypatch.setattr(linear_module, "_CACHED_ELEMENTS", 2**14)
    query, key = random_states(1, 4, 2, 1024, 1024, 8)
    for options in ({"is_causal": True}, {"softcap": 3.0}, {"attention_mask": torch.ones(1, 1, 1, 1024).bool()}):
        with LargestTensor() as made:
            compute_attention_entropy(query, key, scaling=1.0, **options)
        # `expand` gives the mask its queries without memory
        limit = 1024**2 if "attention_mask" in options else query.numel()
        assert made.most <= limit


# ---- values that a difference of large terms would lose


def streamed(query, key, *, scaling, attention_mask=None, is_causal=False, softcap=None, sinks=None):
    """The way that accelerators take, in the dtype of the inputs."""
    visible, bias = visibility_module.split_mask(attention_mask)
    visibility = visibility_module.Visibility(visible, is_causal, query.shape[2], key.shape[2], query.device)
    sinks = None if sinks is None else sinks.view(1, -1, 1, 1)
    return entropy_module._streamed_entropy(query, key, scaling, visibility, bias, softcap, sinks)[0]


WAYS = pytest.mark.parametrize("function", [compute_attention_entropy, streamed], ids=["cpu", "accelerator"])


@WAYS
@pytest.mark.parametrize("size", [1e3, 1e7, 1e8, 1e20, 1e36])
@pytest.mark.parametrize("options", ["causal", "mask", "bias", "sinks"])
def test_a_huge_key_concerns_only_the_queries_that_see_it(function, size, options):
    query, key = random_states(2, 4, 2, 64, 64, 16)
    key[:, :, -1] *= size
    arguments = {"scaling": 0.25, "is_causal": True}
    if options == "mask":
        arguments["attention_mask"] = random_mask((2, 1, 64, 64))
    elif options == "bias":
        arguments["attention_mask"] = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    elif options == "sinks":
        arguments["sinks"] = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    entropy = function(query, key, **arguments)
    expected = naive_attention_entropy(query, key, **arguments)
    torch.testing.assert_close(entropy[:, :, :-1].double(), expected[:, :, :-1], atol=2e-6, rtol=0)
    # the one that sees it attends to it alone, or not to it at all
    torch.testing.assert_close(entropy[:, :, -1].double(), expected[:, :, -1], atol=2e-5, rtol=0)


@WAYS
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e6, 1e10, 1e16, 1e30])
def test_scores_of_any_size_have_an_entropy_in_range(function, scale):
    query, key = random_states(1, 4, 4, 64, 64, 16, scale=scale)
    # two keys alike, so that no size of the scores decides between them
    key[:, :, 1::2] = key[:, :, ::2]
    entropy = function(query, key, scaling=0.25, is_causal=True)
    largest = torch.arange(1, 65).log() + 1e-6
    assert ((entropy >= 0) & (entropy <= largest)).all()
    expected = naive_attention_entropy(query, key, scaling=0.25, is_causal=True)
    # float32 scores of some hundreds are rounded by 1e-5
    torch.testing.assert_close(entropy.double(), expected, atol=1e-6 if function is not streamed else 1e-4, rtol=0)


def test_scores_beyond_float64_are_nan():
    query, key = (state.double() for state in random_states(1, 2, 2, 5, 5, 8))
    query[:, 1] *= 1e200
    key[:, 1] *= 1e200
    entropy = compute_attention_entropy(query, key, scaling=1.0, is_causal=True)
    assert entropy[:, 1].isnan().all() and not entropy[:, 0].isnan().any()


@WAYS
def test_terms_that_cancel_in_the_scores(function):
    query, key = random_states(1, 2, 2, 40, 40, 16)
    # the scores are ordinary, queries and keys are not
    query[..., 0] = query[..., 1] = 1.0
    key[..., 0] = torch.linspace(-3e3, 3e3, 40).round()
    key[..., 1] = -key[..., 0]
    theirs = naive_attention_entropy(query, key, scaling=0.25)
    torch.testing.assert_close(function(query, key, scaling=0.25).double(), theirs, atol=1e-3, rtol=0)


@WAYS
@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_masks_of_any_depth_hide(function, hidden):
    query, key = random_states(2, 4, 2, 13, 13, 16)
    mask = random_mask((2, 1, 13, 13))
    mask[:, :, 7] = False
    entropy = function(query, key, scaling=0.25, attention_mask=torch.zeros(mask.shape).masked_fill(~mask, hidden))
    expected = naive_attention_entropy(query, key, scaling=0.25, attention_mask=mask)
    seen = torch.arange(13) != 7
    torch.testing.assert_close(entropy[:, :, seen].double(), expected[:, :, seen], atol=2e-5, rtol=0)


@WAYS
def test_a_sink_that_was_taken_out_is_none(function):
    query, key = random_states(2, 4, 2, 13, 13, 16)
    sinks = torch.tensor([-torch.inf, 0.0, -torch.inf, torch.finfo(torch.float32).min])
    ours = function(query, key, scaling=0.25, is_causal=True, sinks=sinks)
    without = naive_attention_entropy(query, key, scaling=0.25, is_causal=True)
    with_sink = naive_attention_entropy(query, key, scaling=0.25, is_causal=True, sinks=torch.zeros(4))
    expected = torch.where((torch.arange(4) == 1)[:, None], with_sink, without)
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=0)


@WAYS
@pytest.mark.parametrize("scaling", [0.0, -0.25])
@pytest.mark.parametrize("masked", [False, True])
def test_scaling_of_either_sign(function, scaling, masked):
    query, key = random_states(2, 4, 2, 13, 13, 16)
    mask = random_mask((2, 1, 13, 13)) if masked else None
    arguments = {"scaling": scaling, "attention_mask": mask, "is_causal": not masked}
    theirs = naive_attention_entropy(query, key, **arguments)
    torch.testing.assert_close(function(query, key, **arguments).double(), theirs, atol=2e-5, rtol=0)


@WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_long_lengths(function, dtype):
    query, key = random_states(1, 1, 1, 4096, 4096, 16, dtype=dtype)
    if function is streamed:
        ours = function(query.float(), key.float(), scaling=0.25, is_causal=True)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = function(query, key, scaling=0.25, is_causal=True)
    theirs = naive_attention_entropy(query, key, scaling=0.25, is_causal=True)
    # sums over 4096 keys: 16 bits would be off by 1e-2
    torch.testing.assert_close(ours.double(), theirs, atol=5e-6, rtol=0)


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradient_of_the_accelerators_way_matches_definition(case):
    arguments = {"scaling": 0.4, **GRADIENT_CASES[case]}
    states = [state.requires_grad_() for state in random_states(2, 4, 2, 7, 7, 8)]
    ours = torch.autograd.grad(streamed(*states, **arguments).nansum(), states)
    reference = compute_attention_entropy(*(state.double() for state in states), **arguments)
    theirs = torch.autograd.grad(reference.nansum(), states)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"softcap": 2.0}, {"attention_mask": torch.ones(1, 1, 1, 512).bool()}]
)
def test_no_map_is_kept_for_the_gradient(options, monkeypatch):
    monkeypatch.setattr(entropy_module, "_BLOCK_ELEMENTS", 2**13)
    monkeypatch.setattr(linear_module, "_CACHED_ELEMENTS", 2**13)
    query, key = (state.requires_grad_() for state in random_states(1, 2, 2, 512, 512, 8))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        entropy = compute_attention_entropy(query, key, scaling=0.3, **options)
    # a map of one head would be 1 MiB
    assert sum(kept.values()) < 2**18
    entropy.sum().backward()


class Made(TorchDispatchMode):
    """The storages of what operations make, by their sizes, as long as something holds them."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return output

    def held(self, nbytes):
        return sum(size == nbytes and not storage.expired() for storage, size in self.storages.items())


@pytest.mark.parametrize("scaling", [0.25, -0.5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_backward_pass_waits_with_nothing_as_large_as_the_keys(scaling, kv_heads):
    query, key = random_states(2, 4, kv_heads, 64, 64, 16)
    query[0, 0, 5] = 0.0
    query, key = query.requires_grad_(), key.requires_grad_()
    with Made() as made:
        entropy = compute_attention_entropy(query, key, scaling=scaling, is_causal=True)
    # but queries and keys themselves
    assert sum(made.held(size) for size in {query.nbytes, key.nbytes}) == 2
    twins = [states.detach().double().requires_grad_() for states in (query, key)]
    expected = naive_attention_entropy(*twins, scaling=scaling, is_causal=True)
    found = torch.autograd.grad(entropy.sum(), (query, key))
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), twins), atol=1e-5, rtol=0, check_dtype=False)
