"""What a GPU computes, against float64 on the CPU; scripts/test_gpu.sh runs it, `LNFREE_GPU_DEVICE=cpu` tries it."""

import copy
import os

import pytest
import torch

from modeling_lnfree import record_attention_entropy, use_fast_cpu, use_fused_loss

from ..conftest import gradients, greedy, random_ids, tiny_model
from ..entropy.models import EAGER_ONLY, FAMILIES, float64_maps, make_batch, make_model, mean_of_queries


DEVICE = os.environ.get("LNFREE_GPU_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]
# of a model's own rounding: the same weights in float64 are what is measured against
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"gpt_oss", "bert"}))
def test_entropies_equal_float64_and_outputs_stay(model_type, dtype):
    implementation = "eager" if model_type in EAGER_ONLY else "sdpa"
    model, batch = make_model(model_type, implementation).to(dtype), make_batch("left")
    maps = float64_maps(model.double(), batch)
    expected = mean_of_queries(torch.special.entr(maps).sum(-1), batch["attention_mask"])
    model, batch = model.to(DEVICE, dtype), {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    with torch.no_grad():
        plain = model(**batch).logits
        with record_attention_entropy(model) as record:
            measured = model(**batch).logits
    assert measured.equal(plain) and not record.unmeasured
    torch.testing.assert_close(record.entropy.double().cpu(), expected, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_fused_loss_equals_the_plain_one(dtype):
    plain = tiny_model("SM+LN+G", embedding_dropout=0.0).train().to(DEVICE)
    fused, input_ids, found = use_fused_loss(copy.deepcopy(plain)), random_ids(3, 33).to(DEVICE), []
    for model in (plain, fused):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            output = model(input_ids=input_ids, labels=input_ids)
        output.loss.backward()
        found.append((output.loss, gradients(model)))
    assert output.logits is None
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)


def test_generation_by_a_static_cache_and_fast_cpu_change_nothing():
    model, input_ids = tiny_model("SM+R").to(DEVICE), random_ids(2, 5).to(DEVICE)
    expected = greedy(model, input_ids)
    assert greedy(model, input_ids, cache_implementation="static", disable_compile=True).equal(expected)
    assert greedy(use_fast_cpu(model), input_ids).equal(expected)
