"""The kernel for GPUs, in Triton's interpreter on a CPU, against a naive computation in float64."""

import math
import os
from contextlib import contextmanager

import pytest
import torch

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.metrics.attention_entropy import entropy as entropy_module

from .models import make_batch, make_model


pytestmark = [
    # the interpreter computes with numpy, which warns of the NaN and infinities that a GPU computes in silence
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 runs it on a CPU"),
]


@pytest.fixture(autouse=True)
def triton():
    """What the default tests, which collect this file and leave its tests out, do not install."""
    pytest.importorskip("triton", reason="the kernel is Triton's; scripts/test_slow.sh installs it")


def kernel_entropy(*args, **kwargs):
    from modeling_lnfree.metrics.attention_entropy import kernel

    return kernel.kernel_entropy(*args, **kwargs)


def naive(query, key, scaling, seen=None, bias=None, softcap=None, sinks=None, padded=None):
    """Entropies, sums by head, and those of the scores, in float64 from the whole map."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = scaling * query @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    seen = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen.expand(scores.shape)
    if bias is not None:
        seen = seen & ~(bias <= -1e4)
    scores = scores.masked_fill(~seen, -torch.inf)
    number, most = seen.sum(-1), scores.amax(-1)
    keys, is_key = scores, torch.zeros(scores.shape[1], dtype=torch.bool)
    if sinks is not None:
        is_key = sinks > -1e4
        column = sinks.double().masked_fill(~is_key, -torch.inf).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        keys = torch.cat([scores, column], -1)
    weights, logsumexp = keys.softmax(-1), keys.logsumexp(-1)
    counted = number > 0
    if padded is not None:
        counted = counted & ~padded[:, None]
    entropy = -(weights * weights.log().masked_fill(weights == 0, 0)).sum(-1).masked_fill(~counted, 0)
    largest = (number + is_key[:, None]).log().masked_fill(~counted, 0)
    first = weights.gather(-1, seen.int().argmax(-1, keepdim=True))[..., 0].masked_fill(~counted, 0)
    ones = counted.double()
    zeros = torch.zeros_like(ones)
    total = torch.stack([each.sum((0, 2)) for each in (entropy, largest, zeros, zeros, ones)], -1)
    sums = [first.sum((0, 2)), logsumexp.masked_fill(~counted, 0).sum((0, 2))]
    logits = torch.stack([most.masked_fill(~counted, -torch.inf).amax((0, 2)), *sums], -1)
    own = torch.full_like(entropy, torch.nan)
    if seen.shape[-1] == seen.shape[-2]:
        own = weights[..., : seen.shape[-1]].diagonal(dim1=-2, dim2=-1)
        own = own.masked_fill(seen.triu(1).any(-1), torch.nan).masked_fill(number == 0, 0)
    return entropy.masked_fill(~counted, torch.nan), total, logits, own


def make(batch=2, heads=4, kv_heads=4, T=37, S=None, d=16, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(T + d)
    S = T if S is None else S
    query = scale * torch.randn(batch, heads, T, d, generator=generator)
    return query.to(dtype), torch.randn(batch, kv_heads, S, d, generator=generator).to(dtype)


def causal(T, S, window=None):
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)[None]
    seen = (distance >= 0) & (distance < (S + 1 if window is None else window))
    return seen[None, None]


def check(query, key, scaling, expected, atol=2e-5, **options):
    """With the scores looked at and without: of what both give, the same to the bit."""
    result = kernel_entropy(query, key, scaling=scaling, **options, logits=True)
    for name, ours, theirs in zip(result._fields, result, expected, strict=True):
        # sums of as many
        tolerance = atol if name in ("entropy", "own_weight") else atol * query.shape[0] * query.shape[2]
        torch.testing.assert_close(
            ours.double(), theirs, atol=tolerance, rtol=1e-5, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    short = kernel_entropy(query, key, scaling=scaling, **options)
    assert short.logits is None and torch.equal(short.total, result.total)
    torch.testing.assert_close(short.entropy, result.entropy, atol=0, rtol=0, equal_nan=True)
    return result


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "T, S, d",
    [
        (1, 1, 16),
        (1, 70, 16),
        (37, 37, 24),
        (128, 128, 64),
        (131, 200, 32),
        (70, 70, 80),
        (130, 130, 128),
        (65, 65, 256),
    ],
)
def test_lengths_and_head_dimensions(T, S, d, is_causal):
    query, key = make(T=T, S=S, d=d)
    expected = naive(query, key, d**-0.5, causal(T, S) if is_causal else None)
    if not is_causal and T == S:
        # none is its own where all see the keys behind them
        expected[-1].fill_(torch.nan)
    check(query, key, d**-0.5, expected, is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_float32_sums(dtype):
    query, key = make(T=140, d=32, dtype=dtype)
    check(query, key, 0.2, naive(query, key, 0.2, causal(140, 140)), is_causal=True)


def test_grouped_heads_of_a_view_that_is_not_contiguous():
    query, key = make(heads=6, kv_heads=2, T=50)
    query, key = (states.transpose(1, 2).contiguous().transpose(1, 2) for states in (query, key))
    check(query, key, 0.25, naive(query, key, 0.25, causal(50, 50)), is_causal=True)


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_sliding_window(window):
    query, key = make(T=150, S=180)
    check(query, key, 0.25, naive(query, key, 0.25, causal(150, 180, window)), is_causal=True, window=window)


def test_packed_sequences_and_padding_by_ids():
    query, key = make(T=90)
    ids = torch.tensor([[0] * 30 + [1] * 60, [0] * 50 + [1] * 25 + [-1] * 15], dtype=torch.int32)
    seen = causal(90, 90) & (ids[:, None, :, None] == ids[:, None, None, :])
    check(query, key, 0.25, naive(query, key, 0.25, seen), is_causal=True, query_ids=ids, key_ids=ids)


def test_padded_queries_do_not_count():
    query, key = make(T=90)
    padded = torch.zeros(2, 90, dtype=torch.bool)
    padded[0, :30] = padded[1, -7:] = True
    mask = causal(90, 90) & ~padded[:, None, None]
    check(query, key, 0.25, naive(query, key, 0.25, mask, padded=padded), mask=mask, padded=padded)
    # of all sequences, and those that no mask hides
    expected = naive(query, key, 0.25, causal(90, 90), padded=padded[:1])
    check(query, key, 0.25, expected, is_causal=True, padded=padded[:1])


def test_masks_biases_soft_caps_and_sinks():
    query, key = make(T=40, S=75, scale=4.0)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, 40, 75, generator=generator) < 0.4
    mask[0, 0, 7] = False  # sees the sink alone
    bias = torch.randn(1, 4, 40, 75, generator=generator).masked_fill(mask[1:].roll(1, -1), -1e4)
    sinks = torch.randn(4, generator=generator)
    sinks[2] = -torch.inf
    expected = naive(query, key, 0.25, mask, bias, 3.0, sinks)
    result = check(query, key, 0.25, expected, mask=mask, bias=bias, softcap=3.0, sinks=sinks)
    assert result.entropy[0, :, 7].isnan().all() and result.total[:, 4].max() < 80
    # and one at a time
    for given in ({"mask": mask}, {"bias": bias}, {"softcap": 3.0}, {"sinks": sinks}):
        named = {"seen" if name == "mask" else name: value for name, value in given.items()}
        check(query, key, 0.25, naive(query, key, 0.25, **named), **given)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores_lose_nothing(size):
    """Integers, whose products float32 has exactly: what is left is the error of the sums."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-9, 10, (1, 2, 70, 16), generator=generator).float()
    key = torch.randint(-9, 10, (1, 2, 70, 16), generator=generator).float()
    scaling = 2.0 ** round(math.log2(size / 300))
    result = kernel_entropy(query, key, scaling=scaling, is_causal=True, logits=True)
    expected = naive(query, key, scaling, causal(70, 70))
    assert expected[2][:, 0].max() >= size
    torch.testing.assert_close(result.entropy.double(), expected[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(result.total, expected[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(result.logits, expected[2], atol=1e-4, rtol=1e-6)
    # spread out by a large score that all keys share: only the differences matter
    shared = torch.full((1, 2, 70, 1), 64.0)
    padded = kernel_entropy(
        torch.cat([query, shared.expand(-1, -1, -1, 16)], -1), torch.cat([key, shared.expand(-1, -1, -1, 16)], -1),
        scaling=2.0**-6, is_causal=True,
    )  # fmt: skip
    plain = naive(query, key, 2.0**-6, causal(70, 70))[0]
    torch.testing.assert_close(padded.entropy.double(), plain, atol=5e-4, rtol=0)


@pytest.mark.parametrize("size", [1e8, 1e20, 1e30])
def test_scores_that_float32_cannot_tell_apart_stay_in_range(size):
    query, key = make(T=64)
    result = kernel_entropy(query, size * key, scaling=0.25, is_causal=True)
    largest = torch.arange(1, 65).float().log()
    assert ((result.entropy >= 0) & (result.entropy <= largest + 1e-6) | result.entropy.isnan()).all()


@pytest.mark.parametrize("T", [64, 200])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_one_broken_key_concerns_the_queries_that_see_it(T, value):
    query, key = make(T=T)
    expected = naive(query, key, 0.25, causal(T, T))[0]
    broken = key.clone()
    broken[1, 2, 40, 5] = value
    result = kernel_entropy(query, broken, scaling=0.25, is_causal=True, logits=True)
    others = torch.ones(2, 4, T, dtype=torch.bool)
    others[1, 2, 40:] = False
    torch.testing.assert_close(result.entropy.double()[others], expected[others], atol=1e-5, rtol=0)
    if value == 1e38:
        return
    assert result.entropy[~others].isnan().all()
    unweighted = torch.zeros(4).double()
    unweighted[2] = torch.arange(41, T + 1).sum()
    assert torch.equal(result.total[:, 2], unweighted)
    infinite = torch.zeros(4).double()
    infinite[2] = 0 if math.isnan(value) else T - 40
    assert torch.equal(result.total[:, 3], infinite)
    for sums in (result.total[:, :1], result.logits):
        assert sums[2].isnan().all() and sums[[0, 1, 3]].isfinite().all()
    assert torch.equal(result.own_weight.isnan(), ~others)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_query_concerns_itself(value):
    query, key = make(T=70)
    query[0, 1, 50, 3] = value
    result = kernel_entropy(query, key, scaling=0.25, is_causal=True)
    assert result.entropy.isnan().nonzero().tolist() == [[0, 1, 50]]
    assert result.total[:, 2].tolist() == [0, 51, 0, 0]
    assert result.total[:, 3].tolist() == [0, 0 if math.isnan(value) else 51, 0, 0]


def test_a_query_that_sees_no_key_is_nan_and_does_not_count():
    query, key = make(T=8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(-1)
    result = check(query, key, 0.25, naive(query, key, 0.25, mask), mask=mask)
    assert result.entropy[:, :, 0].isnan().all() and result.total[:, 4].eq(2 * 7).all()
    none = kernel_entropy(query[:, :, :0], key, scaling=0.25, logits=True)
    assert none.entropy.shape == (2, 4, 0) and none.total.eq(0).all() and none.logits[:, 1:].eq(0).all()


def test_it_starts_on_the_device_of_the_queries(monkeypatch):
    """Triton itself starts on the current device; layers of one model may lie on several."""
    from modeling_lnfree.metrics.attention_entropy import kernel

    query, current, started_on = torch.randn(1, 2, 5, 16), [None], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: started_on.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernel, "_entropy_kernel", Kernel())
    kernel.kernel_entropy(query, query, scaling=1.0)
    assert len(started_on) == 1 and started_on[0] is query


def test_more_queries_than_keys():
    query, key = make(T=150, S=70)
    expected = naive(query, key, 0.25, causal(150, 70))
    assert expected[0][:, :, :80].isnan().all() and expected[0][:, :, 80:].isfinite().all()
    check(query, key, 0.25, expected, is_causal=True)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "gemma2", "gpt_oss", "bert"])
def test_a_record_by_the_kernel_equals_that_of_a_cpu(model_type, padding, monkeypatch):
    """What `record_attention_entropy` takes on a GPU."""
    model, batch = make_model(model_type, "eager"), make_batch(padding)
    records = []
    for takes in (False, True):
        monkeypatch.setattr(entropy_module, "_kernel_takes", lambda *args, takes=takes: takes)
        with record_attention_entropy(model, logits=True) as record, torch.no_grad():
            model(**batch)
        assert not record.unmeasured
        records.append(record)
    for name in ("entropy", "max_entropy", "max_logit", "sink_share", "logsumexp", "spectral_gap"):
        ours, theirs = (getattr(record, name) for record in records)
        torch.testing.assert_close(
            ours, theirs, atol=1e-5, rtol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("nan_count", "inf_count"):
        assert torch.equal(*(getattr(record, name) for record in records))
