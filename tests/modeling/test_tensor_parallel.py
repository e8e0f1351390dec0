"""Two tensor-parallel processes equal one."""

import os

import pytest
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import PROJECTIONS

from ..conftest import greedy, random_ids, randomized, tiny_model


def _tensor_parallel(rank, input_ids, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        plan = DistributedConfig(tp_plan="auto")
        parallel = LNFreeForCausalLM.from_pretrained(folder / "model", distributed_config=plan).eval()
        logits = parallel(input_ids).logits
        generated = greedy(parallel, input_ids)
        parallel(input_ids, labels=input_ids).loss.backward()
        whole = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in ((name, p.grad) for name, p in parallel.named_parameters())
        }
        shard = parallel.model.layers[0].self_attn.q_proj.weight
        shape = tuple(getattr(shard, "_local_tensor", shard).shape)
        if rank == 0:
            torch.save({"logits": logits, "generated": generated, "grads": whole, "shape": shape}, folder / "out.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # each process imports transformers
@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+R", "SM+LR-layer", "SM+LR-global"])
@pytest.mark.parametrize("backbone", ["gpt2", "pythia"])
def test_two_tensor_parallel_processes_equal_one(variant, backbone, tmp_path):
    assert_two_processes_equal_one(
        randomized(tiny_model(variant, backbone, biased_projections=list(PROJECTIONS))), tmp_path, shared=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared heads", "whole heads"])
def test_two_tensor_parallel_processes_equal_one_in_every_part(shared, tmp_path):
    fields = {"normalized_projections": ["q_proj", "k_proj", "v_proj"], "attention_gains": [0.7, 0.9, 0.4]}
    fields |= {"softmax_temperature": 0.5, "residual_gains": [0.9, 0.5, 1.1, 0.3], "num_key_value_heads": 2}
    # a gate reads all of the input: its heads are not shared out
    fields |= {} if shared else {"attention_gate_init": 0.3}
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = randomized(LNFreeForCausalLM(LNFreeConfig.from_variant("SM+RMS+S", "llama", **sizes, **fields)))
    for name, parameter in model.named_parameters():
        if name.endswith("temperature"):
            parameter.data.abs_().add_(0.5)
    assert_two_processes_equal_one(model, tmp_path, shared)


def assert_two_processes_equal_one(model, tmp_path, shared):
    model.save_pretrained(tmp_path / "model")
    input_ids = random_ids(2, 9)
    torch.multiprocessing.spawn(_tensor_parallel, args=(input_ids, tmp_path), nprocs=2)
    parallel = torch.load(tmp_path / "out.pt")
    output = model(input_ids, labels=input_ids)
    output.loss.backward()
    query = model.model.layers[0].self_attn.q_proj.weight
    assert parallel["shape"] == (query.shape[0] // (1 + shared), query.shape[1])
    torch.testing.assert_close(parallel["logits"], output.logits, atol=1e-5, rtol=1e-5)
    assert parallel["generated"].equal(greedy(model, input_ids))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parallel["grads"][name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
