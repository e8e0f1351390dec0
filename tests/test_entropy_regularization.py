"""Attention entropy as a loss: against naive float64 maps, and in plain Trainers."""

import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from modeling_lnfree import EntropyRegularizationMixin, EntropyRegularizer
from modeling_lnfree.entropy_regularization import add_parameter

from .conftest import checkpoint_activations, random_ids, tiny_model
from .entropy.models import make_uneven_llama


def tiny_gpt2(**kwargs) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    dropouts = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    special = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **dropouts, **special, **kwargs})).train()


def tiny_llama() -> LlamaForCausalLM:
    """Two heads of queries for each of keys."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return LlamaForCausalLM(config).train()


def naive_penalty(model, batch, visible, counted, targets, weight, margin):
    """
    By float64 maps of the model; `visible` (B, T, T) and `counted` (B, T) say which keys a query sees, and which
    queries count.
    """
    scores = []

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores.append(scaling * query @ key.mT)
        weights = scores[-1].masked_fill(~visible[:, None], -1e300).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    AttentionInterface.register("naive_float64", attention)
    implementation = model.config._attn_implementation
    model.double().set_attn_implementation("naive_float64")
    model(**batch)
    model.set_attn_implementation(implementation)
    penalties = []
    for layer, layer_scores in enumerate(scores):
        total = 0.0
        for head in range(layer_scores.shape[1]):
            entropies, largest = [], []
            for row in range(len(layer_scores)):
                for query in torch.nonzero(counted[row]).flatten().tolist():
                    weights = layer_scores[row, head, query][visible[row, query]].softmax(-1)
                    entropies.append(-(weights * weights.log()).sum())
                    largest.append(math.log(len(weights)))
            entropy, largest = torch.stack(entropies).mean(), sum(largest) / len(largest)
            delta = entropy - targets[layer, head] * largest
            total = total + (delta**2 if abs(delta.item()) > margin * largest else 0 * delta)
        penalties.append(total / layer_scores.shape[1])
    return weight * sum(penalties) / len(penalties)


def cases(name):
    model = {"lnfree": lambda: tiny_model("SM+LN+R", embedding_dropout=0.0).train(), "gpt2": tiny_gpt2}.get(
        name.partition(" ")[0], tiny_llama
    )()
    # where it is long, the gradients of the heads are computed with their entropies
    length = 160 if "long" in name else 11
    ids = random_ids(3, length)
    visible = torch.ones(3, length, length, dtype=torch.bool).tril()
    counted = torch.ones(3, length, dtype=torch.bool)
    batch = {"input_ids": ids}
    if "padded" in name:
        counted[0, :4], counted[1, 8:] = False, False
        batch |= {"attention_mask": counted.long()}
        visible = visible & counted[:, None]
        # those that see nothing, and do not count
        visible[0, :4, 0] = True
    if "packed" in name:
        batch |= {"position_ids": torch.tensor([[*range(4), *range(7)]] * 3), "use_cache": False}
        visible[:, 4:, :4] = False
    return model, batch, visible, counted


@pytest.mark.parametrize(
    "name", ["lnfree", "lnfree padded", "lnfree packed", "gpt2 padded", "llama", "llama padded", "llama long"]
)
@pytest.mark.parametrize("learned", [True, False])
def test_penalty_and_its_gradients_match_naive_float64_maps(name, learned):
    model, batch, visible, counted = cases(name)
    regularizer = EntropyRegularizer(model, weight=3.0, margin=0.1, target=0.6, learned=learned)
    # so that heads are above their thresholds, near them, and below
    spread = torch.linspace(0.4, 1.4, regularizer.targets.numel())
    with torch.no_grad():
        regularizer.targets[:] = spread.view_as(regularizer.targets)
    with regularizer.measure():
        model(**batch)
    penalty = regularizer.penalty()
    penalty.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    targets = regularizer.targets.detach().double().requires_grad_()
    expected = naive_penalty(model, batch, visible, counted, targets, 3.0, 0.1)
    expected.backward()
    assert (targets.grad == 0).any() and (targets.grad > 0).any() and (targets.grad < 0).any()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
    if learned:
        torch.testing.assert_close(regularizer.targets.grad.double(), targets.grad, rtol=1e-4, atol=1e-6)
    else:
        assert regularizer.targets.grad is None
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[key] is None or not found[key].any()
        else:
            largest = parameter.grad.abs().max().item()
            torch.testing.assert_close(found[key].double(), parameter.grad, rtol=0, atol=1e-4 * largest + 1e-6)


def test_uniform_attention_in_closed_form_and_exactly_0_inside_the_margin():
    model = tiny_gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.zero_()
            block.attn.c_attn.bias.zero_()
    largest = sum(math.log(i + 1) for i in range(16)) / 16
    for target, margin, expected in ((0.6, 0.3, (0.4 * largest) ** 2), (0.6, 0.401, 0.0), (1.0, 0.0, 0.0)):
        regularizer = EntropyRegularizer(model, weight=0.5, margin=margin, target=target)
        with regularizer.measure():
            model(random_ids(2, 16))
        penalty = regularizer.penalty()
        penalty.backward()
        assert penalty.item() == pytest.approx(0.5 * expected, rel=1e-6, abs=1e-13)
        if expected == 0 < margin:
            assert penalty.item() == 0 and not regularizer.targets.grad.any()
            assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
        elif expected:
            # of each of the 8 thresholds
            slope = -0.5 * 2 * 0.4 * largest**2 / 8
            torch.testing.assert_close(regularizer.targets.grad, torch.full((2, 4), slope))


def step_gradients(model, regularizer, micro_batches):
    model.zero_grad()
    regularizer.targets.grad = None
    regularizer.look_ahead(lambda ids: model(ids), micro_batches)
    value = 0.0
    for ids in micro_batches:
        with regularizer.measure():
            model(ids)
            penalty = regularizer.penalty()
            value += penalty.item()
            penalty.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return value, torch.cat([grad.flatten() for grad in [*gradients, regularizer.targets.grad]]).clone()


def test_accumulated_micro_batches_equal_one_large_batch_and_draw_the_same_random_numbers():
    model, ids = tiny_gpt2(), random_ids(6, 13)
    regularizer = EntropyRegularizer(model, weight=3.0, margin=0.1, target=0.6)
    value, expected = step_gradients(model, regularizer, [ids])
    for parts in ([ids[:2], ids[2:4], ids[4:]], [ids[:1], ids[1:]]):
        found, gradients = step_gradients(model, regularizer, parts)
        assert found == pytest.approx(value, rel=1e-5)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    # with dropout, what is looked at is what is trained on afterwards
    model, looked_at = tiny_gpt2(resid_pdrop=0.3), []
    regularizer = EntropyRegularizer(model, weight=3.0, margin=0.0, target=0.6)
    regularizer.look_ahead(lambda part: looked_at.append(model(part).logits), [ids[:3], ids[3:]])
    for part, logits in zip((ids[:3], ids[3:]), looked_at, strict=True):
        with regularizer.measure():
            assert model(part).logits.equal(logits)
    assert not model(ids[:3]).logits.equal(looked_at[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_layers_count_once_and_give_the_same_gradients(dtype):
    model, ids = tiny_model("SM+LN+R", embedding_dropout=0.0, use_cache=False).train(), random_ids(3, 13)
    regularizer = EntropyRegularizer(model, weight=3.0, margin=0.1, target=0.6)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return step_gradients(model, regularizer, [ids])

    value, expected = run()
    checkpoint_activations(model, use_reentrant=False)
    found, gradients = run()
    assert found == value
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    checkpoint_activations(model, use_reentrant=True)
    with pytest.raises(RuntimeError, match="carries no gradient: gradient checkpointing must have use_r"):
        run()


def test_bfloat16_penalty_is_near_that_of_float64_on_the_same_scores():
    model, ids = tiny_gpt2(), random_ids(3, 16)
    regularizer = EntropyRegularizer(model, weight=1.0, margin=0.0, target=0.6)
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), regularizer.measure():
            model(ids)
        penalty = regularizer.penalty()
        assert penalty.dtype in (torch.float32, torch.float64)
        values.append(penalty.item())
    assert values[0] != values[1] and values[1] == pytest.approx(values[0], rel=0.02)


def test_measuring_changes_no_output_and_missing_measurements_are_told():
    model, ids = tiny_gpt2(), random_ids(2, 9)
    regularizer = EntropyRegularizer(model, weight=1.0)
    expected = model(ids).logits
    with regularizer.measure():
        assert model(ids).logits.equal(expected)
    with regularizer.measure():
        pass
    with pytest.raises(RuntimeError, match="no attention of GPT2LMHeadModel was measured"):
        regularizer.penalty()
    for name, value in (
        ("weight", 0.0),
        ("weight", math.nan),
        ("margin", 1.1),
        ("target", -0.1),
        ("target", 1.5),
        ("weight", math.inf),
        ("margin", -0.1),
        ("margin", math.nan),
        ("target", math.nan),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            EntropyRegularizer(model, **{"weight": 1.0, name: value})
    with pytest.raises(ValueError, match="computes its attention itself"):
        EntropyRegularizer(torch.nn.Linear(3, 3), weight=1.0)


class RegularizedTrainer(EntropyRegularizationMixin, Trainer):
    pass


def train(tmp_path, weight=0.5, **arguments):
    torch.manual_seed(0)
    model = tiny_gpt2()
    ids = random_ids(16, 12).tolist()
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2}
    trainer = RegularizedTrainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            **{**defaults, **arguments},
            lr_scheduler_type="constant",
            logging_steps=2,
            save_steps=2,
            weight_decay=0.1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )
    if weight:
        trainer.entropy_regularizer = EntropyRegularizer(trainer.model, weight=weight, margin=0.05, target=0.3)
    return trainer


def test_a_plain_trainer_learns_saves_and_resumes_the_thresholds(tmp_path):
    trainer = train(tmp_path / "run")
    trainer.train()
    targets = trainer.entropy_regularizer.targets.detach().clone()
    assert not torch.allclose(targets, torch.full_like(targets, 0.3), atol=1e-3)
    group = next(g for g in trainer.optimizer.param_groups if trainer.entropy_regularizer.targets in set(g["params"]))
    assert group["weight_decay"] == 0 and group["lr"] == 1e-2
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["entropy_penalty"] > 0 for entry in logged)
    assert logged[-1]["entropy_target"] == pytest.approx(targets.mean().item())
    # the loss is the model's own: the first is that of a run without the penalty
    plain = train(tmp_path / "plain", weight=None, max_steps=1)
    plain.args.logging_steps = 1
    plain.train()
    alone = train(tmp_path / "alone", max_steps=1)
    alone.args.logging_steps = 1
    alone.train()
    assert plain.state.log_history[0]["loss"] == alone.state.log_history[0]["loss"]
    assert any(not a.equal(b) for a, b in zip(plain.model.parameters(), alone.model.parameters(), strict=True))
    # resumed from step 2, bit by bit
    again = train(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.entropy_regularizer.targets.equal(targets)
    assert all(a.equal(b) for a, b in zip(again.model.parameters(), trainer.model.parameters(), strict=True))
    # a checkpoint without thresholds is told
    plain = train(tmp_path / "without", weight=None, max_steps=2)
    plain.train()
    with pytest.raises(ValueError, match="the optimizer's state has no 'entropy_targets'"):
        train(tmp_path / "without").train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-2"))


@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
def test_accumulation_in_a_trainer_equals_a_large_batch(tmp_path, monkeypatch, accepts_loss_kwargs):
    if not accepts_loss_kwargs:
        # then the Trainer divides the loss itself
        monkeypatch.setattr(GPT2LMHeadModel, "accepts_loss_kwargs", False, raising=False)
    results = []
    for sizes in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        trainer = train(tmp_path / str(len(sizes)), optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **sizes)
        assert trainer.model_accepts_loss_kwargs == accepts_loss_kwargs
        trainer.train()
        results.append([*trainer.model.parameters(), trainer.entropy_regularizer.targets])
        penalties = [entry["entropy_penalty"] for entry in trainer.state.log_history if "loss" in entry]
        results[-1].append(torch.tensor(penalties))
    for one, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(accumulated, one, rtol=1e-4, atol=1e-5)


def test_evaluation_has_no_penalty(tmp_path):
    with_penalty, without = train(tmp_path / "a"), train(tmp_path / "b", weight=None)
    for trainer in (with_penalty, without):
        trainer.eval_dataset = trainer.train_dataset
    assert with_penalty.evaluate()["eval_loss"] == without.evaluate()["eval_loss"]


# TRL reads a name of transformers that 5.24 has a newer one for
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trainer_takes_the_mixin(tmp_path):
    trl = pytest.importorskip("trl")

    class RegularizedSFT(EntropyRegularizationMixin, trl.SFTTrainer):
        pass

    model = tiny_gpt2()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    vocabulary = {f"t{i}": i for i in range(97)} | {"<pad>": 97, "<eos>": 98}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")), pad_token="<pad>", eos_token="<eos>"
    )
    rows = Dataset.from_dict({"input_ids": [row[: 6 + i % 4] for i, row in enumerate(random_ids(8, 12).tolist())]})
    trainer = RegularizedSFT(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.entropy_regularizer = EntropyRegularizer(trainer.model, weight=0.5, margin=0.05, target=0.3)
    before = trainer.entropy_regularizer.targets.detach().clone()
    trainer.train()
    assert not trainer.entropy_regularizer.targets.equal(before)
    assert all(entry["entropy_penalty"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_thresholds_do_not_decay_and_are_forgotten_between_steps():
    model = tiny_model("SM+R", embedding_dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.9)
    thresholds = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    for _ in range(2):
        add_parameter(optimizer, thresholds, "thresholds")
    assert sum(thresholds is parameter for group in optimizer.param_groups for parameter in group["params"]) == 1
    for _ in range(2):
        thresholds.sum().backward()
        # as the Trainer does
        model.zero_grad()
        optimizer.step()
    assert thresholds.tolist() == [0.0, 1.0] and thresholds.grad is None
    assert optimizer.state_dict()["thresholds"].tolist() == [0.0, 1.0]


def test_penalty_in_the_log_is_the_mean_over_steps(tmp_path):
    penalties = []
    trainer = train(tmp_path / "run", max_steps=2)
    penalty = trainer.entropy_regularizer.penalty

    def kept():
        penalties.append(penalty())
        return penalties[-1]

    trainer.entropy_regularizer.penalty = kept
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    number = len(penalties)
    assert number % 2 == 0 and entry["entropy_penalty"] == pytest.approx(
        sum(p.item() for p in penalties) / 2, rel=1e-5
    )


def test_layers_of_fewer_heads_count_as_much_as_others():
    model = make_uneven_llama()
    regularizer = EntropyRegularizer(model, weight=2.0, margin=0.0, target=0.3)
    with regularizer.measure():
        maps = model(random_ids(1, 9, vocab_size=61), output_attentions=True).attentions
    largest = torch.arange(1, 10).double().log().mean()
    layers = []
    for weights in maps:
        entropy = -torch.special.xlogy(weights.double(), weights.double()).sum(-1).mean((0, 2))
        layers.append((entropy - 0.3 * largest).square().mean())
    assert [len(weights[0]) for weights in maps] == [4, 2]
    assert regularizer.penalty().item() == pytest.approx(2.0 * torch.stack(layers).mean().item(), rel=1e-4)
