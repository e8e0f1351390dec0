"""What keeps a GPU busy: head and loss in one, norms that are read late, compiled layers, another attention."""

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from training import files
from training.errors import UserError
from training.recipe import build_recipe
from training.train import loop, plan, stability, start
from training.train.stability import StabilityCallback

from ..conftest import one_more_callback, random_ids, tiny_model
from .conftest import weights_of


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def values(recipe_values):
    short = {"max_steps": 4, "logging_steps": 4, "save_strategy": "no", "embedding_dropout": 0.0}
    return {**recipe_values, "variant": "SM+R", **short}


def train(values, folder, callback=None, **more):
    """The run's folder."""
    with nullcontext() if callback is None else one_more_callback(callback):
        return loop.train(build_recipe({**values, **more, "output_dir": str(folder)}))


def assert_close(ours, theirs, atol=1e-4):
    # a bias of the keys changes no softmax: its gradient is rounding, of which AdamW makes steps
    pairs = [{n: w for n, w in weights_of(run).items() if not n.endswith("k_proj.bias")} for run in (ours, theirs)]
    torch.testing.assert_close(*pairs, atol=atol, rtol=1e-4)
    logs = [json.loads((folder / "log_history.json").read_text()) for folder in (ours, theirs)]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0]
    perplexities = [json.loads((folder / "results.json").read_text())["perplexity"] for folder in (ours, theirs)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-2 if atol > 1e-3 else 1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.2},
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
        pytest.param({"entropy_weight": 0.5}, marks=pytest.mark.slow),
    ],
    ids=lambda more: next(iter(more), "plain"),
)
def test_fused_loss_trains_the_same(values, tmp_path, more):
    made = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            ids = torch.zeros(1, 3, dtype=torch.long)
            made.append(model.train()(input_ids=ids, labels=ids).logits is not None)

    for fused in (True, False):
        train(values, tmp_path / str(fused), Look, **more, fused_loss=fused)
    # a CPU's own choice is the plain one
    assert made == [False] * 4 + [True] * 4
    assert_close(tmp_path / "True", tmp_path / "False", atol=5e-3 if "bf16" in more else 1e-4)
    if not more:
        train(values, tmp_path / "chosen", Look)
        assert made[8:] == [True] * 4


def test_a_plan_holds_no_logits_where_training_does_not(values):
    values = {**values, "vocab_size": 5000, "block_size": 64, "per_device_train_batch_size": 64}
    plans = {fused: plan.plan(build_recipe({**values, "fused_loss": fused})) for fused in (None, True, False)}
    assert plans[None] == plans[True] and plans[True]["flops_per_token"] == plans[False]["flops_per_token"]
    # of the plain loss, the logits and their gradient are there at once
    logits = 64 * 64 * 5000 * 4
    assert plans[False]["activations"] > 2 * logits and plans[True]["memory"] < plans[False]["memory"]


class LateStability(StabilityCallback):
    """Reads as on an accelerator."""

    def on_train_begin(self, *args, **kwargs):
        super().on_train_begin(*args, **kwargs)
        self.reads_at_once = False


def test_norms_that_are_read_late_change_nothing(values, monkeypatch, tmp_path):
    # the last record is of two steps
    more = {"max_steps": 10, "logging_steps": 4}
    train(values, tmp_path / "at once", **more)
    monkeypatch.setattr("training.train.trainer.StabilityCallback", LateStability)
    train(values, tmp_path / "late", **more)
    ours, theirs = (weights_of(tmp_path / name) for name in ("late", "at once"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    records = [files.read_records(tmp_path / name / "gradient_norm.jsonl") for name in ("late", "at once")]
    assert records[0] == records[1] and [len(record["norms"]) for record in records[0]] == [4, 4, 2]


class Readings(TorchDispatchMode):
    """How often a number is read, for which an accelerator would have to end all that it was told before."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "more",
    [{"fused_loss": True, "gradient_accumulation_steps": 2}, {"layer_optimizer": "muon"}],
    ids=lambda more: next(iter(more)),
)
def test_no_step_reads_a_number(values, monkeypatch, tmp_path, more):
    counts = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.mode = Readings()
            self.mode.__enter__()
            float(torch.ones(1))  # so that it is seen that they are counted

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            # on a CPU, AdamW reads its own step number
            self.mode.__exit__(None, None, None)
            counts.append(self.mode.count)

    # one step before the last, all are between two logs
    # (of learned positions, the largest is looked at where that costs nothing, on a CPU)
    more = {**more, "logging_steps": 5, "max_steps": 6, "position_embedding_type": "rotary"}
    monkeypatch.setattr("training.train.trainer.StabilityCallback", LateStability)
    train(values, tmp_path / "run", Count, **more)
    assert counts[1:4] == [1, 1, 1]


def test_a_broken_gradient_that_is_read_late_reaches_no_weight(values, monkeypatch, tmp_path):
    class Gradient(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.model.layers[0].mlp.down_proj.register_full_backward_hook(
                    lambda module, inputs, outputs: (inputs[0] * math.inf,)
                )

        def on_step_end(self, args, state, control, model=None, **kwargs):
            assert all(parameter.isfinite().all() for parameter in model.parameters())

    monkeypatch.setattr("training.train.trainer.StabilityCallback", LateStability)
    with pytest.raises(stability.UnstableRunError) as caught:
        train(values, tmp_path, Gradient)
    # the first of the three, found when the fourth step is logged
    assert "is unstable at step 2, layer 0: the gradient norm is nan; in the backward pass" in str(caught.value)
    assert "layers.0.mlp.up_proj.weight" in str(caught.value)


def test_the_recipe_names_the_attention(values, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append(model.config._attn_implementation)

    for name in ("eager", "sdpa"):
        train(values, tmp_path / name, Look, attn_implementation=name)
    train(values, tmp_path / "own", Look)
    assert seen == ["eager", "sdpa", "sdpa"]
    assert_close(tmp_path / "eager", tmp_path / "sdpa")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attn_implementation": "fast"}, "attn_implementation='fast': "),
        ({"attn_implementation": "sdpa", "attn_logit_softcapping": 2.0}, "attn_implementation='sdpa': .*softcapping"),
    ],
)
def test_attention_that_cannot_be_had_is_told_before_the_data(values, tmp_path, more, message):
    values = {**values, "dataset": str(tmp_path / "missing.jsonl")}
    with pytest.raises(UserError, match=message):
        train(values, tmp_path / "run", **more)


@pytest.mark.parametrize(
    "more", [{"torch_compile": True}, {"entropy_weight": 0.5}, {"batch_entropy_weight": 0.5}], ids=str
)
def test_compiled_layers_that_are_looked_into_are_refused(values, more):
    name, value = next(iter(more.items()))
    with pytest.raises(UserError, match=f"compile_layers=True and {name}={value} do not go together"):
        build_recipe({**values, "compile_layers": True, **more})


@pytest.mark.filterwarnings("ignore")  # what torch.compile says of itself
def test_a_compiled_relu_keeps_no_mask_of_its_signs():
    saved, input_ids = {}, random_ids(3, 17)
    for way in ("flat", "plain"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model, kinds = tiny_model("SM+R", embedding_dropout=0.0, num_hidden_layers=1).train(), set()
        expected = model(input_ids=input_ids, labels=input_ids).loss
        if way == "flat":
            start.flatten_mlps(model)
            assert copy.deepcopy(model).model.layers[0].mlp.forward.__self__ is not model.model.layers[0].mlp
            assert model(input_ids=input_ids, labels=input_ids).loss.equal(expected)
        # the partitioner of torch.compile, without its code
        model.model.layers[0].compile(backend="aot_eager_decomp_partition")
        with saved_tensors_hooks(lambda tensor, kinds=kinds: kinds.add(tensor.dtype) or tensor, lambda tensor: tensor):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        torch.testing.assert_close(loss, expected)
        saved[way] = torch.bool in kinds
    # what this torch keeps without it
    assert saved == {"flat": False, "plain": True}


@pytest.mark.slow  # inductor
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", ["compile_layers", "torch_compile"])
def test_compiled_training_equals_eager_and_evaluation_compiles_nothing(values, tmp_path, option):
    graphs = []

    class Count(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

        def on_train_end(self, *args, **kwargs):
            graphs.append(counters["stats"]["unique_graphs"])

        on_evaluate = on_train_end

    torch.compiler.reset()
    counters.clear()
    more = {"eval_strategy": "steps", "eval_steps": 2, "entropy_steps": 1}
    train(values, tmp_path / "plain", **more)
    assert not counters["stats"]["unique_graphs"]
    train(values, tmp_path / option, Count, **more, **{option: True})
    assert_close(tmp_path / option, tmp_path / "plain")
    # the layers are one graph, since they are alike
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}
    assert option == "torch_compile" or graphs[0] == 1
    entropies = [files.read_records(tmp_path / name / "attention_entropy.jsonl") for name in (option, "plain")]
    for ours, theirs in zip(*entropies, strict=True):
        torch.testing.assert_close(*(torch.tensor(record["entropy"]) for record in (ours, theirs)), atol=1e-3, rtol=0)
