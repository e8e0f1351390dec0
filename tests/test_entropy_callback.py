"""Attention entropy on the way, in a plain Trainer: into the log, as a picture, and alerts."""

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_lnfree import AttentionEntropyCallback, entropy_callback, record_attention_entropy
from modeling_lnfree.entropy_callback import describe_record, draw_heat_map

from .conftest import random_ids
from .entropy.models import make_uneven_llama
from .test_entropy_regularization import tiny_gpt2


def build_trainer(tmp_path, steps=5, learning_rate=0.0, **kwargs):
    torch.manual_seed(0)
    model = tiny_gpt2()
    ids = random_ids(8, 12).tolist()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=learning_rate,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}), **kwargs)


def measured_steps(trainer):
    return {entry["step"]: entry for entry in trainer.state.log_history if "attention_entropy/mean" in entry}


def test_training_batches_are_measured_as_they_run(tmp_path):
    trainer = build_trainer(tmp_path)
    # what a step trains on, measured by itself; its weights do not change
    expected = []

    class Measure(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.block = record_attention_entropy(model)
            expected.append(self.block.__enter__())

        def on_step_end(self, args, state, control, **kwargs):
            self.block.__exit__(None, None, None)

    trainer.add_callback(AttentionEntropyCallback(trainer, every=2))
    trainer.add_callback(Measure())
    trainer.train()
    logged = measured_steps(trainer)
    assert list(logged) == [1, 2, 4, 5]
    for step, entry in logged.items():
        record = expected[step - 1]
        # both micro-batches
        assert record.num_queries == 4 * 12
        assert entry["attention_entropy/mean"] == pytest.approx(record.mean_entropy)
        for layer in range(2):
            assert entry[f"attention_entropy/layer_{layer}/mean"] == pytest.approx(record.entropy[layer].mean().item())
            assert entry[f"attention_nan_count/layer_{layer}"] == entry[f"attention_inf_count/layer_{layer}"] == 0
            for head in range(4):
                value = entry[f"attention_entropy/layer_{layer}/head_{head}"]
                assert value == pytest.approx(record.entropy[layer, head].item())
        shares = [entry[f"attention_entropy/share_of_heads_in_quarter_{quarter}"] for quarter in range(4)]
        assert shares == record.head_distribution.tolist() and sum(shares) == 1
    # the losses of all steps are logged too
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]


def test_probe_is_measured_in_evaluation_mode_before_after_and_between(tmp_path):
    trainer = build_trainer(tmp_path, learning_rate=1e-2)
    modes = []
    trainer.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    probe = {"input_ids": random_ids(3, 10)}
    trainer.add_callback(AttentionEntropyCallback(trainer, every=2, probe=probe))
    trainer.train()
    logged = measured_steps(trainer)
    assert list(logged) == [0, 2, 4, 5] and modes.count(False) == 4 and trainer.model.training
    with torch.no_grad(), record_attention_entropy(trainer.model) as record:
        trainer.model.eval()(**probe)
    assert logged[5]["attention_entropy/mean"] == pytest.approx(record.mean_entropy)
    assert logged[0]["attention_entropy/mean"] != logged[5]["attention_entropy/mean"]


def test_measuring_changes_no_weight(tmp_path):
    trainers = [build_trainer(tmp_path / name, learning_rate=1e-2) for name in ("plain", "batches", "probe")]
    trainers[1].add_callback(AttentionEntropyCallback(trainers[1], every=1))
    trainers[2].add_callback(AttentionEntropyCallback(trainers[2], every=1, probe={"input_ids": random_ids(3, 10)}))
    weights = []
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train()
        weights.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]))
    assert weights[0].equal(weights[1]) and weights[0].equal(weights[2])


def uniform(model):
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] = 0
            block.attn.c_attn.bias[:64] = 0


def single_key(model):
    """Every query sees the first key alone: all have that one's direction, and only its score is large."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 1e3


def test_alert_once_when_heads_collapse_or_overload(tmp_path, caplog):
    for change, what, other in (
        (uniform, "overloaded, above 95%", "collapsed"),
        (single_key, "collapsed, below 5%", "over"),
    ):
        trainer = build_trainer(tmp_path / what[:4])

        class Change(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, change=change, **kwargs):
                if state.global_step == 1:
                    change(model)

        trainer.add_callback(Change())
        trainer.add_callback(AttentionEntropyCallback(trainer, every=1))
        caplog.clear()
        trainer.train()
        told = [record.getMessage() for record in caplog.records if "heads are" in record.getMessage()]
        assert len(told) == 1 and told[0].startswith("step 2: ") and what in told[0] and other not in told[0]
        if change is uniform:
            assert "8 of 8 heads" in told[0] and told[0].endswith("(by layer, 0: 4, 1: 4)")
    # below the share that was asked for
    trainer = build_trainer(tmp_path / "none")
    trainer.add_callback(AttentionEntropyCallback(trainer, every=1, overload=1.0, collapse=0.0))
    caplog.clear()
    trainer.train()
    assert not [record for record in caplog.records if "heads are" in record.getMessage()]


def test_trackers_get_a_heat_map_and_an_alert(tmp_path, monkeypatch):
    sent = []

    class Writer:
        def add_image(self, *args, **kwargs):
            sent.append(("tensorboard", *args, kwargs))

    # they are known by their classes' names
    callbacks = []
    for name in ("TensorBoardCallback", "TrackioCallback", "WandbCallback"):
        callback = type(name, (TrainerCallback,), {})()
        callback.tb_writer = Writer()
        callbacks.append(callback)
    for package in ("trackio", "wandb"):
        module = ModuleType(package)
        module.Image = lambda picture: SimpleNamespace(picture=picture)
        module.log = lambda values, package=package: sent.append((package, values))
        module.alert = lambda package=package, **kwargs: sent.append((package, "alert", kwargs))
        monkeypatch.setitem(sys.modules, package, module)
    trainer = build_trainer(tmp_path, steps=2, callbacks=callbacks)
    uniform(trainer.model)
    trainer.add_callback(AttentionEntropyCallback(trainer, every=1))
    trainer.train()
    [_, name, picture, step, options] = sent[0]
    assert (name, step, options) == ("attention_entropy/heat_map", 1, {"dataformats": "HWC"})
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    for package in ("trackio", "wandb"):
        logged = [entry[1] for entry in sent if entry[0] == package and entry[1] != "alert"]
        assert [entry["train/global_step"] for entry in logged] == [1, 2]
        assert (logged[0]["attention_entropy/heat_map"].picture == picture).all()
        [alert] = [entry[2] for entry in sent if entry[:2] == (package, "alert")]
        assert alert["title"] == "attention heads overloaded" and "8 of 8 heads" in alert["text"]


def test_heat_map_shows_each_head():
    model = tiny_gpt2()
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(random_ids(2, 9))
    before = draw_heat_map(record)
    uniform(model)
    with torch.no_grad(), record_attention_entropy(model) as record:
        model(random_ids(2, 9))
    assert before.shape == draw_heat_map(record).shape and (before != draw_heat_map(record)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"collapse": -0.1}, r"collapse must be in \[0, 1\], got -0.1"),
        ({"alert_share": math.nan}, r"alert_share must be in \[0, 1\], got nan"),
    ],
)
def test_wrong_arguments_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionEntropyCallback(None, **options)


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([[0.1, 0.5], [0.5, 0.5]], ["collapsed"]),
        ([[0.31, 0.5], [0.5, 0.5]], []),
        ([[0.5, 0.5], [0.5, 0.61]], ["overloaded"]),
        ([[0.59, 0.59], [0.59, 0.59]], []),
        ([[0.1, 0.1], [0.9, 0.9]], ["collapsed", "overloaded"]),
    ],
)
def test_bounds_of_an_alert_are_those_given(shares, told, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(entropy_callback.logger, "warning", said.append)
    record = SimpleNamespace(normalized_entropy=torch.tensor(shares), max_entropy=torch.ones(2, 2))
    # a quarter of the four heads is one
    callback = AttentionEntropyCallback(None, collapse=0.3, overload=0.6, alert_share=0.25)
    callback._alert(record, 5, {})
    assert said == []  # the first measurement
    callback._is_first = False
    callback._alert(record, 5, {})
    assert [word for word in ("collapsed", "overloaded") if any(word in text for text in said)] == told
    # once, until it has been below again
    callback._alert(record, 6, {})
    assert len(said) == len(told)
    calm = SimpleNamespace(normalized_entropy=torch.full((2, 2), 0.5), max_entropy=torch.ones(2, 2))
    for each in (calm, record):
        callback._alert(each, 7, {})
    assert len(said) == 2 * len(told)
    # three quarters of them are more than there are
    said.clear()
    callback = AttentionEntropyCallback(None, collapse=0.3, overload=0.6, alert_share=0.75)
    callback._is_first = False
    callback._alert(record, 5, {})
    assert said == []


def test_an_alert_is_past_the_warmup(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_lnfree.entropy_callback.logger.warning", said.append)
    trainer = build_trainer(tmp_path)
    trainer.args.warmup_steps = 3
    uniform(trainer.model)
    trainer.add_callback(AttentionEntropyCallback(trainer, every=1))
    trainer.train()
    assert [text.partition(":")[0] for text in said] == ["step 4"]


def test_scalars_of_layers_with_different_heads():
    model = make_uneven_llama()
    with torch.no_grad(), record_attention_entropy(model, logits=True) as record:
        model(random_ids(2, 9, vocab_size=61))
    _, scalars = describe_record(record)
    heads = [f"attention_entropy/layer_1/head_{head}" for head in range(4)]
    assert [name in scalars for name in heads] == [True, True, False, False]
    mean = sum(scalars[name] for name in heads[:2]) / 2
    assert scalars["attention_entropy/layer_1/mean"] == pytest.approx(mean)
    assert scalars["sink_share/layer_1"] == pytest.approx(record.sink_share[1, :2].mean().item())
    assert scalars["max_logit/layer_1"] == record.max_logit[1, :2].max().item()
