"""What promises float32 inside keeps it, whatever goes in: at a tolerance that the careless way breaks."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from modeling_lnfree import LNFreeForCausalLM, record_attention_entropy
from modeling_lnfree.cpu import causal_lm_loss
from modeling_lnfree.metrics.attention_entropy.record import AttentionEntropyRecord
from modeling_lnfree.parts_lnfree import LNFreeClipping, LNFreeIdentity, LNFreeRMSNorm, LNFreeRotary
from modeling_lnfree.parts_lnfree import eager_attention_forward as eager
from training.train.trainer import LNFreeTrainer

from ..conftest import tiny_config, tiny_model


half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def share_of_right_roundings(found, expected) -> float:
    """Of what is the float64 value rounded once to the type that was found."""
    return (found == expected.to(found.dtype)).double().mean().item()


@half
def test_rms_norm_rounds_once(dtype):
    norm, states = LNFreeRMSNorm(512, 1e-6), 3 * torch.randn(64, 512).to(dtype)
    with torch.no_grad():
        norm.weight.fill_(1.0)
    wide = states.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert share_of_right_roundings(norm.to(dtype)(states), expected) > 0.999


def test_rms_norm_of_large_states_does_not_overflow():
    norm = LNFreeRMSNorm(16, 1e-6).half()
    with torch.no_grad():
        norm.weight.fill_(1.0)
    # whose squares float16 does not hold
    assert norm(torch.full((1, 16), 3e4, dtype=torch.float16)).equal(torch.ones(1, 16, dtype=torch.float16))


@half
def test_rotary_angles_of_far_positions_round_once(dtype):
    config = tiny_config("SM+R", "pythia", max_position_embeddings=4096, partial_rotary_factor=1.0)
    positions = torch.arange(4000, 4096)[None]
    exponents = torch.arange(0, 8, 2).double() / 8
    angles = positions[0, :, None].double() / 10000.0**exponents
    angles = torch.cat([angles, angles], -1)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            cos, sin = LNFreeRotary(config).to(dtype)(positions, dtype)
        assert cos.dtype == sin.dtype == dtype
        for found, expected in ((cos[0, 0], angles.cos()), (sin[0, 0], angles.sin())):
            # of float32 angles of some thousand, whose rounding is 2e-4
            torch.testing.assert_close(found.double(), expected, atol=torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
@half
def test_softmax_of_eager_attention_rounds_once(dtype, clip):
    clipping = LNFreeClipping(0.4) if clip else LNFreeIdentity()
    module = SimpleNamespace(cap=LNFreeIdentity(), clip=clipping, num_key_value_groups=1, training=False)
    query, key = (torch.randn(1, 2, 300, 16).to(dtype) for _ in range(2))
    # one value, so that the output is the sum of the weights
    value = torch.ones(1, 2, 300, 1, dtype=dtype)
    _, weights = eager(module, query, key, value, None, scaling=0.25)
    scores = (torch.matmul(query, key.mT) * 0.25).double()
    expected = scores.softmax(-1)
    expected = ((1 + 0.4 / 300) * expected - 0.4 / 300).clamp(0, 1) if clip else expected
    assert weights.dtype == dtype and share_of_right_roundings(weights, expected) > 0.995


@pytest.mark.parametrize("labels", ["all", "some"])
@half
def test_loss_of_half_precision_logits_is_that_of_float64(dtype, labels):
    logits, targets = 4 * torch.randn(2, 50, 999).to(dtype), torch.randint(999, (2, 50))
    if labels == "some":
        targets[:, ::3] = -100
    log_probs = logits.double().log_softmax(-1)[:, :-1]
    shown = targets[:, 1:] != -100
    picked = log_probs.gather(-1, targets[:, 1:].clamp(min=0)[..., None])[..., 0]
    expected = -picked[shown].mean()
    found = causal_lm_loss(logits, targets, 999)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=0)


def test_evaluation_loss_of_a_model_in_bfloat16_is_of_float32_logits(tmp_path):
    """Each sequence's loss by the Trainer of this project, from logits of half precision."""
    model = tiny_model("SM+R").bfloat16()
    trainer = LNFreeTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    input_ids = torch.randint(2, 99, (4, 64))
    mean, losses, _ = trainer.prediction_step(model, {"input_ids": input_ids, "labels": input_ids}, False)
    log_probs = model(input_ids).logits.double().log_softmax(-1)[:, :-1]
    expected = -log_probs.gather(-1, input_ids[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)
    assert mean.item() == pytest.approx(expected.mean().item(), abs=1e-5)


def test_counts_of_queries_are_exact_beyond_those_of_float32():
    record = AttentionEntropyRecord()
    many = 2**24
    for number in (many, 1, 2):
        total = torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0]], dtype=torch.float64) * number
        record.add((0, 0), "layer", total)
    assert record.num_queries == many + 3 and record.nan_count.tolist() == [[many + 3]]
    model = LNFreeForCausalLM(tiny_config()).eval()
    with torch.no_grad(), record_attention_entropy(model) as counted:
        model(torch.ones(1, 3, dtype=torch.long))
    assert counted._totals[0, 0][1].dtype == torch.float64
