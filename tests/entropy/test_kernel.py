"""The kernel for GPUs, in Triton's interpreter on a CPU, against a naive computation in float64."""

import math
import os

import pytest
import torch


triton = pytest.importorskip("triton", reason="the kernel is Triton's; scripts/test_slow.sh installs it")
pytestmark = [
    # the interpreter computes with numpy, which warns of the NaN and infinities that a GPU computes in silence
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 runs it on a CPU"),
]

from modeling_lnfree import compute_attention_entropy  # noqa: E402
from modeling_lnfree.metrics.attention_entropy.entropy import kernel_path  # noqa: E402
from modeling_lnfree.metrics.attention_entropy.kernel import kernel_entropy  # noqa: E402
from modeling_lnfree.metrics.attention_entropy.visibility import Visibility, split_mask  # noqa: E402


def naive(query, key, scaling, seen=None, bias=None, softcap=None, sinks=None):
    """Entropy, log-sum-exp, largest score, weight on key 0 and number of keys, in float64 from the whole map."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = scaling * query @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    seen = torch.ones_like(scores, dtype=torch.bool) if seen is None else seen.expand(scores.shape)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)
    entropy = -(weights * weights.log().masked_fill(weights == 0, 0)).sum(-1)
    number = seen.sum(-1) + (sinks is not None)
    return entropy, scores.logsumexp(-1), scores.amax(-1), weights[..., 0], number.double()


def make(batch=2, heads=4, kv_heads=4, T=37, S=None, d=16, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(T + d)
    S = T if S is None else S
    query = scale * torch.randn(batch, heads, T, d, generator=generator)
    return query.to(dtype), torch.randn(batch, kv_heads, S, d, generator=generator).to(dtype)


def causal(T, S, window=None):
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)[None]
    seen = (distance >= 0) & (distance < (S + 1 if window is None else window))
    return seen[None, None]


def check(result, expected, atol=2e-5):
    for name, ours, theirs in zip(result._fields, result, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, atol=atol, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "T, S, d", [(1, 1, 16), (1, 70, 16), (37, 37, 24), (128, 128, 64), (131, 200, 32), (65, 65, 256)]
)
def test_lengths_and_head_dimensions(T, S, d, is_causal):
    query, key = make(T=T, S=S, d=d)
    expected = naive(query, key, d**-0.5, causal(T, S) if is_causal else None)
    check(kernel_entropy(query, key, scaling=d**-0.5, is_causal=is_causal), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_float32_sums(dtype):
    query, key = make(T=140, d=32, dtype=dtype)
    check(kernel_entropy(query, key, scaling=0.2, is_causal=True), naive(query, key, 0.2, causal(140, 140)))


def test_grouped_heads_of_a_view_that_is_not_contiguous():
    query, key = make(heads=6, kv_heads=2, T=50)
    query, key = (states.transpose(1, 2).contiguous().transpose(1, 2) for states in (query, key))
    check(kernel_entropy(query, key, scaling=0.25, is_causal=True), naive(query, key, 0.25, causal(50, 50)))


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_sliding_window(window):
    query, key = make(T=150, S=180)
    result = kernel_entropy(query, key, scaling=0.25, is_causal=True, window=window)
    check(result, naive(query, key, 0.25, causal(150, 180, window)))


def test_packed_sequences_and_padding_by_ids():
    query, key = make(T=90)
    ids = torch.tensor([[0] * 30 + [1] * 60, [0] * 50 + [1] * 25 + [-1] * 15], dtype=torch.int32)
    seen = causal(90, 90) & (ids[:, None, :, None] == ids[:, None, None, :])
    result = kernel_entropy(query, key, scaling=0.25, is_causal=True, query_ids=ids, key_ids=ids)
    check(result, naive(query, key, 0.25, seen))


def test_masks_biases_soft_caps_and_sinks():
    query, key = make(T=40, S=75, scale=4.0)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, 40, 75, generator=generator) < 0.4
    mask[0, 0, 7] = False  # sees the sink alone
    bias = torch.randn(1, 4, 40, 75, generator=generator)
    sinks = torch.randn(4, generator=generator)
    result = kernel_entropy(query, key, scaling=0.25, mask=mask, bias=bias, softcap=3.0, sinks=sinks)
    check(result, naive(query, key, 0.25, mask, bias, 3.0, sinks))
    assert result.entropy[0, :, 7].tolist() == [0.0] * 4
    # and one at a time
    for given in ({"mask": mask}, {"bias": bias}, {"softcap": 3.0}, {"sinks": sinks}):
        if "mask" in given:
            given = {"mask": mask | torch.eye(40, 75, dtype=torch.bool)}
        check(
            kernel_entropy(query, key, scaling=0.25, **given),
            naive(query, key, 0.25, **{"seen" if k == "mask" else k: v for k, v in given.items()}),
        )


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_scores_lose_nothing(size):
    """Integers, whose products float32 has exactly: what is left is the error of the sums."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-9, 10, (1, 2, 70, 16), generator=generator).float()
    key = torch.randint(-9, 10, (1, 2, 70, 16), generator=generator).float()
    scaling = 2.0 ** round(math.log2(size / 300))
    result = kernel_entropy(query, key, scaling=scaling, is_causal=True)
    expected = naive(query, key, scaling, causal(70, 70))[0]
    torch.testing.assert_close(result.entropy.double(), expected, atol=2e-6, rtol=0)
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


def test_one_broken_key_concerns_the_queries_that_see_it():
    query, key = make(T=64)
    expected = naive(query, key, 0.25, causal(64, 64))[0]
    for value in (torch.nan, torch.inf, 1e38):
        broken = key.clone()
        broken[:, :, 40] = value
        entropy = kernel_entropy(query, broken, scaling=0.25, is_causal=True).entropy
        torch.testing.assert_close(entropy[:, :, :40].double(), expected[:, :, :40], atol=1e-5, rtol=0)
        if not math.isfinite(value):
            assert entropy[:, :, 40:].isnan().all()


def test_a_query_that_sees_no_key_is_nan():
    query, key = make(T=8)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(-1)
    result = kernel_entropy(query, key, scaling=0.25, mask=mask)
    assert result.entropy[:, :, 0].isnan().all() and result.num_keys[:, :, 0].eq(0).all()
    assert result.entropy[:, :, 1:].isfinite().all()


def test_more_queries_than_keys():
    query, key = make(T=150, S=70)
    result = kernel_entropy(query, key, scaling=0.25, is_causal=True)
    expected = naive(query, key, 0.25, causal(150, 70))[0]
    assert expected[:, :, :80].isnan().all() and expected[:, :, 80:].isfinite().all()
    torch.testing.assert_close(result.entropy.double(), expected, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["causal", "padded", "biased", "capped", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_path_of_a_gpu_equals_that_of_a_cpu(kind, dtype):
    """What `compute_attention_entropy` takes on a GPU, called here by its name."""
    query, key = make(heads=4, kv_heads=2, T=50, dtype=dtype)
    key[1, 0, 20, 3] = torch.inf
    mask = torch.ones(2, 1, 50, 50, dtype=torch.bool).tril()
    mask[0, :, :, :7] = False
    given = {
        "causal": {"is_causal": True},
        "padded": {"attention_mask": mask},
        "biased": {"attention_mask": torch.randn(1, 4, 50, 50).masked_fill(~mask, torch.finfo(torch.float32).min)},
        "capped": {"is_causal": True, "softcap": 2.0},
        "sinks": {"is_causal": True, "sinks": torch.randn(4)},
    }[kind]
    expected = compute_attention_entropy(query, key, scaling=0.25, **given)
    visible, bias = split_mask(given.get("attention_mask"))
    visibility = Visibility(visible, given.get("is_causal", False), 50, 50, query.device)
    sinks = given.get("sinks")
    sinks = None if sinks is None else sinks.view(1, 4, 1, 1)
    entropy, infinite = kernel_path(query, key, 0.25, visibility, bias, given.get("softcap"), sinks)
    none_seen = visibility.number() == 0
    torch.testing.assert_close(
        entropy.masked_fill(none_seen, torch.nan), expected, atol=1e-5, rtol=1e-5, equal_nan=True
    )
    assert entropy[1, :2, 20:].isnan().all() and infinite[1, :2, 20:].eq(1).all() and infinite.sum() == 2 * 30
