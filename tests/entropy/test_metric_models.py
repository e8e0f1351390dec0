"""The metric on models that are wrapped, adapted, offloaded or frozen, beside other metrics, and after errors."""

import copy
import pickle

import evaluate
import pytest
import torch
from accelerate import cpu_offload
from huggingface_hub import HfApi
from torch import nn

from modeling_lnfree import record_attention_entropy
from modeling_lnfree.metrics.attention_entropy.attention_entropy import AttentionEntropy
from modeling_lnfree.metrics.attention_entropy.summary import summarize

from ..hub_server import TOKEN, HubServer, read_from
from .test_metric import TEXTS, make_model


@pytest.fixture(scope="module")
def expected(tokenizer):
    return AttentionEntropy().compute(predictions=TEXTS, model=make_model("llama"), tokenizer=tokenizer)


def test_a_wrapped_model(metric, tokenizer, expected):
    model = nn.DataParallel(make_model("llama"))
    assert metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer) == expected
    with record_attention_entropy(model) as record, torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert record.num_queries == 3


def test_an_offloaded_model(metric, tokenizer, expected):
    model = make_model("llama")
    cpu_offload(model)
    assert model.device.type == "meta"
    assert metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer) == expected


def test_modes_of_frozen_parts_are_as_before(metric, tokenizer):
    model = make_model("llama").train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_texts_added_before_outlive_a_failed_measurement(metric, tokenizer):
    metric.add_batch(predictions=TEXTS[:2])

    class Fails(nn.Module):
        def forward(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    broken = make_model("llama")
    broken.model.layers[1] = Fails()
    model = make_model("llama")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            metric.compute(predictions=TEXTS[2:], model=broken, tokenizer=tokenizer)
    result = metric.compute(predictions=TEXTS[2:], model=model, tokenizer=tokenizer)
    assert result["num_queries"] == sum(map(len, TEXTS))
    # and are counted once
    assert metric.compute(predictions=TEXTS[2:], model=model, tokenizer=tokenizer)["num_queries"] == sum(
        map(len, TEXTS[2:])
    )


def test_beside_other_metrics(metric, tokenizer, expected):
    both = evaluate.combine([metric, AttentionEntropy(experiment_id="second")])
    result = both.compute(predictions=TEXTS, model=make_model("llama"), tokenizer=tokenizer)
    assert result["attention_entropy_0_entropy"] == result["attention_entropy_1_entropy"] == expected["entropy"]
    for text in TEXTS:
        both.add(prediction=text)
    again = both.compute(model=make_model("llama"), tokenizer=tokenizer)
    assert again["attention_entropy_1_entropy"] == expected["entropy"]


def test_a_metric_with_texts_can_be_copied(metric, tokenizer, expected):
    metric.add_batch(predictions=TEXTS)
    for again in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert again.compute(model=make_model("llama"), tokenizer=tokenizer) == expected


def test_layers_with_different_numbers_of_heads(metric, tokenizer):
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj, attention.k_proj, attention.v_proj = (nn.Linear(32, 16, bias=False) for _ in range(3))
    attention.o_proj = nn.Linear(16, 32, bias=False)
    result = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    assert [len(row) for row in result["entropy"]] == [4, 2, 4]
    assert result["layer_entropy"][1] == pytest.approx(sum(result["entropy"][1]) / 2)
    assert result["mean_entropy"] == pytest.approx(sum(map(sum, result["entropy"])) / 10)
    assert sum(result["head_distribution"]) == pytest.approx(1)
    again = AttentionEntropy().compute(predictions=[result, result])
    assert sum(again["entropy"], []) == pytest.approx(sum(result["entropy"], []))
    assert again["num_queries"] == 2 * result["num_queries"]
    with record_attention_entropy(model.model) as record, torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert [len(row) for row in summarize(record)["max_entropy"]] == [4, 2, 4]


def test_what_could_not_be_seen_is_the_error(metric, tokenizer):
    model = make_model("gpt2")
    model.set_attn_implementation("eager")
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    with (
        pytest.warns(UserWarning, match="3 calls"),
        pytest.raises(ValueError, match="computed its attention by itself"),
    ):
        metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)


# of PEFT, which uses what transformers has renamed
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora"])
def test_adapters_are_measured_with_what_they_add(metric, tokenizer, kind):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    configs = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"]),
    }
    model = make_model("llama")
    plain = AttentionEntropy().compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, configs[kind]()).eval()
    result = metric.compute(predictions=TEXTS, model=adapted, tokenizer=tokenizer)
    with record_attention_entropy(adapted) as record, torch.no_grad():
        for text in TEXTS:
            adapted(input_ids=torch.tensor([tokenizer(text)["input_ids"][: 40 - 4]]), use_cache=False)
    if kind == "prompt":
        # its tokens are queries as well
        assert record.num_queries == plain["num_queries"] + 4 * len(TEXTS)
    assert result["num_queries"] == record.num_queries
    torch.testing.assert_close(torch.tensor(result["entropy"]), record.entropy, atol=2e-5, rtol=0)
    assert abs(result["mean_entropy"] - plain["mean_entropy"]) > 1e-3


def test_the_revision_that_is_measured_is_the_one_named(metric, tokenizer, tmp_path, monkeypatch):
    models = {"main": make_model("llama"), "other": make_model("llama")}
    with torch.no_grad():
        for layer in models["other"].model.layers:
            layer.self_attn.q_proj.weight *= 3
    with HubServer().running() as server:
        read_from(server, monkeypatch, tmp_path / "hub")
        api = HfApi(endpoint=server.endpoint, token=TOKEN)
        api.create_repo("me/two")
        for branch, model in models.items():
            folder = tmp_path / branch
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if branch != "main":
                api.create_branch("me/two", branch=branch)
            api.upload_folder(repo_id="me/two", folder_path=folder, revision=branch)
        found = {
            branch: metric.compute(predictions=TEXTS, model_id="me/two", revision=revision, device="cpu")
            for branch, revision in (("main", None), ("other", "other"))
        }
    for branch, model in models.items():
        alone = metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer)
        assert sum(found[branch]["entropy"], []) == pytest.approx(sum(alone["entropy"], []))
    assert abs(found["main"]["mean_entropy"] - found["other"]["mean_entropy"]) > 1e-3
