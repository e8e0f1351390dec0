"""Gradients: checkpointing, accumulation, mixed precision, compiling, dropout, label smoothing."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_lnfree import use_fast_cpu
from training.train.trainer import LNFreeTrainer

from ..conftest import (
    checkpoint_activations,
    every_backbone,
    every_variant,
    gradients,
    random_ids,
    tiny_model,
)


@every_variant
@every_backbone
def test_gradient_checkpointing_gives_equal_gradients(variant, backbone):
    model = tiny_model(variant, backbone, embedding_dropout=0.0).train()
    checkpointed = copy.deepcopy(model)
    checkpoint_activations(checkpointed)
    input_ids = random_ids(2, 9)
    for each in (model, checkpointed):
        each(input_ids, labels=input_ids, use_cache=False).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, msg=name)


@every_backbone
def test_accumulated_gradients_equal_one_large_batch(backbone):
    model = tiny_model("SM+R", backbone)
    input_ids = random_ids(8, 9)
    labels = input_ids.clone()
    labels[:3, 4:] = -100  # micro-batches with different token counts
    model(input_ids, labels=labels).loss.backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    for ids, part in zip(input_ids.split(2), labels.split(2), strict=True):
        model(ids, labels=part, num_items_in_batch=count).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_variant
@every_backbone
def test_mixed_precision_gives_the_gradients_of_float32(variant, backbone, dtype):
    model = tiny_model(variant, backbone, embedding_dropout=0.0, initializer_range=0.05).train()
    input_ids = random_ids(2, 9)
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.06
    assert (gradients(model) - expected).norm() < tolerance * expected.norm()
    embedding = model.model.embed_tokens.weight.detach().clone()
    scaler.step(optimizer)  # leaves the step out if a gradient is not finite
    assert not torch.equal(model.model.embed_tokens.weight, embedding)


def test_loss_is_the_mean_nll_of_the_next_token():
    model = tiny_model("SM+R")
    input_ids = random_ids(2, 9)
    log_probs = model(input_ids).logits.double().log_softmax(-1)
    expected = -log_probs[:, :-1].gather(-1, input_ids[:, 1:, None]).mean()
    assert model(input_ids, labels=input_ids).loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_loss_function_can_be_replaced():
    model, input_ids = tiny_model("SM+R"), random_ids(2, 9)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean() + vocab_size
    output = model(input_ids, labels=input_ids)
    assert output.loss == output.logits.mean() + model.config.vocab_size


# the linear layers of all variants are the same: one of them is enough by oneDNN
@pytest.mark.parametrize(
    ("variant", "by_onednn"),
    [("SM+LN+G", False), ("SM+R", False), ("SM+LR-global", False), ("SM+R", True)],
    ids=["SM+LN+G", "SM+R", "SM+LR-global", "SM+R by oneDNN"],
)
@every_backbone
def test_compiles_as_one_graph_with_equal_results(variant, backbone, by_onednn, request):
    model = tiny_model(variant, backbone)
    if by_onednn:
        request.getfixturevalue("onednn")
        use_fast_cpu(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in ((2, 9), (3, 12), (2, 15)):  # with sizes that change from the second on
        input_ids, found = random_ids(*shape), []
        for each in (compiled, model):
            model.zero_grad()
            each(input_ids, labels=input_ids, use_cache=False).loss.backward()
            found.append(gradients(model))
        torch.testing.assert_close(*found)


PLACES = {
    "embeddings": ({"embedding_dropout": 0.5}, ["o_proj", "down_proj"]),
    "attention weights, eager": ({"attention_dropout": 0.5, "attn_implementation": "eager"}, ["down_proj"]),
    "attention weights, sdpa": ({"attention_dropout": 0.5, "attn_implementation": "sdpa"}, ["down_proj"]),
    "attention's output": ({"hidden_dropout": 0.5}, ["down_proj"]),
    "the MLP's output": ({"hidden_dropout": 0.5}, ["o_proj"]),
}


@pytest.mark.parametrize("place", PLACES)
@every_backbone
def test_dropout_acts_in_its_place_and_in_training_alone(place, backbone):
    fields, silenced = PLACES[place]
    model = tiny_model("SM+R", backbone, **{"embedding_dropout": 0.0, **fields}).train()
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in silenced:
            parameter.data.zero_()
    input_ids = random_ids(1, 9)
    assert not model(input_ids).logits.equal(model(input_ids).logits)
    model.eval()
    assert model(input_ids).logits.equal(model(input_ids).logits)
    # and with all of them silenced, nothing but the embeddings is left
    if place != "embeddings":
        for name, parameter in model.train().named_parameters():
            if name.split(".")[-2] in ("o_proj", "down_proj"):
                parameter.data.zero_()
        assert model(input_ids).logits.equal(model(input_ids).logits)


@torch.no_grad()
def smoothed_loss(model, input_ids) -> float:
    """A tenth of each next token's share goes to all tokens alike."""
    log_probs = model(input_ids).logits.double().log_softmax(-1)[:, :-1]
    nll = -log_probs.gather(-1, input_ids[:, 1:, None]).mean()
    return (0.9 * nll - 0.1 * log_probs.mean()).item()


# transformers' own does not shift the labels of a model that was compiled before
@pytest.mark.parametrize(
    ("trainer_class", "compiles"), [(Trainer, False), (LNFreeTrainer, False), (LNFreeTrainer, True)]
)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_label_smoothing_of_a_trainer_predicts_the_next_token(trainer_class, compiles, tmp_path):
    model, input_ids = tiny_model("SM+R"), random_ids(2, 9)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    # the class of what is compiled is torch's
    called = torch.compile(model, backend="eager") if compiles else model
    loss = trainer_class(model, arguments).compute_loss(called, {"input_ids": input_ids, "labels": input_ids})
    assert loss.item() == pytest.approx(smoothed_loss(model, input_ids), abs=1e-5)


REMOTE = """
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

model, input_ids = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval(), torch.load("ids.pt")
assert type(model).__module__.startswith("transformers_modules."), type(model)
trainer = Trainer(model, TrainingArguments("run", label_smoothing_factor=0.1, use_cpu=True))
print(trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids.clone()}).item())
"""


def test_label_smoothing_of_remote_code_predicts_the_next_token(tmp_path):
    model, input_ids = tiny_model("SM+R"), random_ids(2, 9)
    model.save_pretrained(tmp_path / "model")
    torch.save(input_ids, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-I", "-c", REMOTE]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(smoothed_loss(model, input_ids), abs=1e-5)
