"""The optimizer with a rule of its own for the layers' matrices: by itself, in a plain Trainer, and in a recipe."""

import copy
import json
import math
import runpy
from contextlib import nullcontext

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from modeling_lnfree import (
    LNFreeForCausalLM,
    LNFreeForSequenceClassification,
    build_optimizer,
    get_parameter_groups,
)
from modeling_lnfree.optimization import WideProducts, get_decayed_parameters
from training import cli, runs
from training.errors import UserError
from training.recipe import build_recipe
from training.train import loop, plan

from .conftest import ROOT, interrupting, one_more_callback, random_ids, tiny_config, tiny_model
from .modeling.designs import design


pytestmark = pytest.mark.usefixtures("own_cache")

MATRICES = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


def train_steps(model, optimizer, steps=4, scheduler=None):
    for step in range(steps):
        ids = random_ids(2, 16) if step else torch.arange(32).view(2, 16)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@needs_muon
@pytest.mark.parametrize(
    "variant, capability, products",
    [("SM+R", "AVX512", nullcontext), ("SM+LN+LR-layer", "AVX512", nullcontext), ("SM+R", "AVX2", WideProducts)],
)
def test_muon_steps_the_layers_matrices_and_adamw_all_else(variant, capability, products, monkeypatch):
    """Against torch's two optimizers side by side, each with a schedule of its own, on either kind of processor."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    options = {"learning_rate": 0.003, "weight_decay": 0.2, "muon_momentum": 0.8, "betas": (0.8, 0.9)}
    ours, theirs = tiny_model(variant), tiny_model(variant)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, layer_learning_rate=0.02, muon_adjustment="original", **options)
    named = dict(theirs.named_parameters())
    matrices = [named[name] for name in named if name.endswith(MATRICES)]
    embeddings = [named[name] for name in named if "embed" in name]
    rest = [named[name] for name in named if not name.endswith(MATRICES) and "embed" not in name]
    assert (len(matrices), len(embeddings)) == (18, 2)
    references = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.2, momentum=0.8, adjust_lr_fn="original"),
        torch.optim.AdamW(embeddings, lr=0.003, weight_decay=0.2, betas=(0.8, 0.9)),
        torch.optim.AdamW(rest, lr=0.003, weight_decay=0.0, betas=(0.8, 0.9)),
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in references]
    torch.manual_seed(1)
    train_steps(ours, optimizer, scheduler=schedule)
    torch.manual_seed(1)
    for step in range(4):
        ids = random_ids(2, 16) if step else torch.arange(32).view(2, 16)
        theirs.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        with products():
            references[0].step()
        for each in (*references[1:], *schedules):
            each.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.equal(other), name
    assert schedule.get_last_lr()[0] == pytest.approx(0.003 / 5)
    assert schedule.get_last_lr()[-1] == pytest.approx(0.02 / 5)


class Products(TorchFunctionMode):
    """The type of each product of matrices."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.addmm, torch.Tensor.matmul):
            self.dtypes += {a.dtype for a in args}
        return func(*args, **(kwargs or {}))


def test_wide_products_are_rounded_once_and_leave_all_else_alone():
    torch.manual_seed(0)
    a, b, c = (torch.randn(shape).bfloat16() for shape in ((24, 300), (300, 24), (24, 24)))
    with Products() as products, WideProducts():
        found = torch.addmm(c, a, b, beta=-4.0, alpha=0.5), a @ b
        single, mixed = a.float() @ b.float(), (a @ b).float() + c
    assert products.dtypes == [torch.float32] * 4
    exact = -4 * c.double() + 0.5 * (a.double() @ b.double()), a.double() @ b.double()
    for mine, reference in zip(found, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        # 8 bits; each rounding of a partial sum would add as much again
        assert ((mine.double() - reference).abs() <= 2**-8 * reference.abs() + 1e-4).all()
    assert single.dtype == mixed.dtype == torch.float32 and single.equal(a.float() @ b.float())


@needs_muon
def test_state_goes_on_bitwise():
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build_optimizer(ours)
    train_steps(ours, optimizer)
    theirs.load_state_dict(ours.state_dict())
    resumed = build_optimizer(theirs)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, each in ((ours, optimizer), (theirs, resumed)):
        torch.manual_seed(2)
        train_steps(model, each, steps=2)
    assert all(mine.equal(other) for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True))
    # a fresh optimizer would not
    theirs.load_state_dict(ours.state_dict())
    for model, each in ((ours, optimizer), (theirs, build_optimizer(theirs))):
        torch.manual_seed(3)
        train_steps(model, each, steps=1)
    assert not any(
        mine.equal(other)
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True)
        if name.endswith(MATRICES)
    )


def test_rate_of_the_layers_follows_the_width():
    model = tiny_model()  # 32 wide
    for layer_optimizer in ("adamw", "muon") if hasattr(torch.optim, "Muon") else ("adamw",):
        optimizer = build_optimizer(
            model, layer_optimizer=layer_optimizer, layer_learning_rate=0.01, layer_base_width=8, learning_rate=0.004
        )
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert rates[id(parameter)] == (0.0025 if name.endswith(MATRICES) else 0.004), name


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.6)])
def test_adamw_without_a_rate_of_its_own_is_plain_adamw(betas):
    ours, theirs = tiny_model(), tiny_model()
    theirs.load_state_dict(ours.state_dict())
    decayed = [p for name, p in theirs.named_parameters() if p.ndim == 2]
    rest = [p for name, p in theirs.named_parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    for model, optimizer in (
        (ours, build_optimizer(ours, layer_optimizer="adamw", learning_rate=0.01, betas=betas)),
        (theirs, torch.optim.AdamW(groups, lr=0.01, betas=betas)),
    ):
        torch.manual_seed(2)
        train_steps(model, optimizer)
    assert all(mine.equal(other) for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True))


@needs_muon
def test_a_closure_computes_with_gradients():
    model, ids = tiny_model(embedding_dropout=0.0), random_ids(2, 9)
    optimizer = build_optimizer(model)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    before = model(input_ids=ids, labels=ids).loss.item()
    assert optimizer.step(closure).item() == before != model(input_ids=ids, labels=ids).loss.item()


@needs_muon
def test_heads_frozen_and_parametrized_weights():
    model = LNFreeForSequenceClassification(tiny_config())
    first, second = (model.model.layers[index].self_attn for index in (0, 1))
    first.q_proj.weight.requires_grad_(False)
    torch.nn.utils.parametrizations.weight_norm(second.q_proj)
    optimizer = build_optimizer(model)
    rules = {id(p): "momentum" in group for group in optimizer.param_groups for p in group["params"]}
    assert id(first.q_proj.weight) not in rules
    assert rules[id(model.score.weight)] is False
    magnitude, direction = second.q_proj.parametrizations.weight.parameters()
    assert rules[id(direction)] is True
    assert len(rules) == len(list(model.parameters())) - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be finite and more than 0, got 0"),
        ({"layer_learning_rate": float("inf")}, "layer_learning_rate must be finite and more than 0, got inf"),
        ({"muon_momentum": 1.0}, r"muon_momentum must be in \[0, 1\), got 1.0"),
        ({"layer_base_width": 0}, "layer_base_width must be at least 1, got 0"),
        ({"layer_optimizer": "lion"}, "layer_optimizer must be one of adamw, muon, got 'lion'"),
        ({"muon_adjustment": "none"}, "muon_adjustment must be one of original, match_rms_adamw, got 'none'"),
    ],
)
def test_what_makes_no_optimizer_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(tiny_model(), **options)


def test_torch_without_muon_and_models_without_linear_layers(monkeypatch):
    with pytest.raises(ValueError, match="Embedding has no linear layers to train"):
        build_optimizer(torch.nn.Embedding(3, 2))
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ImportError, match="layer_optimizer='muon' needs torch 2.9 or newer, found 2"):
        build_optimizer(tiny_model())
    build_optimizer(tiny_model(), layer_optimizer="adamw")


@needs_muon
def test_plain_trainer_trains_saves_and_resumes_bitwise(tmp_path):
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in random_ids(24, 16).tolist()])

    def run(name, **resume):
        model = tiny_model(embedding_dropout=0.0)
        model.load_state_dict(start)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=6, save_steps=3, per_device_train_batch_size=2, report_to=[],
            gradient_accumulation_steps=2, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=3,
        )  # fmt: skip
        optimizers = (build_optimizer(model, learning_rate=0.01), None)
        Trainer(model, arguments, train_dataset=rows, optimizers=optimizers).train(**resume)
        return load_file(tmp_path / name / "checkpoint-6" / "model.safetensors")

    start = tiny_model(embedding_dropout=0.0).state_dict()
    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert all(not whole[name].equal(start[name]) for name in whole if name.endswith(MATRICES))


# ---- in a recipe


def train_by_command(tmp_path, values, *overrides):
    """Trains by the command; returns the run, and of every step the weights before it and the optimizer's groups."""

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            seen.append(
                {name: (p.detach().clone(), dict(groups[id(p)])) for name, p in model.named_parameters()}
            )  # fmt: skip

    seen: list[dict] = []
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "variant": "SM+R", "output_dir": str(tmp_path / "run")}))
    with one_more_callback(Watch):
        assert cli.main(["train", str(path), *overrides]) == 0
    return tmp_path / "run", seen


@needs_muon
@pytest.mark.parametrize("adjustment", ["match_rms_adamw", "original"])
def test_command_trains_the_layers_by_muon(recipe_values, tmp_path, adjustment):
    values = {**recipe_values, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_steps": 4}
    overrides = ["layer_optimizer=muon", "layer_learning_rate=0.02", f"muon_adjustment={adjustment}"]
    run, seen = train_by_command(tmp_path, values, *overrides, "muon_momentum=0.7")
    for name, (before, group) in seen[2].items():
        step = (seen[3][name][0] - before).double()
        assert (group["lr"], group.get("momentum")) == ((0.02, 0.7) if name.endswith(MATRICES) else (0.01, None))
        if name.endswith(MATRICES):
            rows, columns = before.shape
            scale = (
                0.2 * math.sqrt(max(rows, columns))
                if adjustment == "match_rms_adamw"
                else max(1, rows / columns) ** 0.5
            )
            # an orthogonal matrix, as near as five Newton-Schulz iterations come
            values_of_step = torch.linalg.svdvals(step) / (0.02 * scale)
            assert values_of_step.max() < 1.3 and values_of_step.median() > 0.6, name
        elif name == "model.embed_tokens.weight":
            assert step.abs().max() < 0.02
    log = json.loads((run / "log_history.json").read_text())
    rates = [(entry["learning_rate"], entry["layer_learning_rate"]) for entry in log if "loss" in entry]
    assert rates == [(0.01, 0.02)] * 2
    recipe = runs.read_results(run)["recipe"]
    assert (recipe["layer_optimizer"], recipe["muon_momentum"]) == ("muon", 0.7)


def test_command_trains_the_layers_at_the_rate_of_their_width(recipe_values, tmp_path):
    overrides = ["layer_learning_rate=0.04", "layer_base_width=8"]
    values = {**recipe_values, "warmup_steps": 4, "weight_decay": 0.3}
    run, seen = train_by_command(tmp_path, values, *overrides)
    # the sixth of eight steps; the first four warm up, the hidden size is 16
    for name, (_, group) in seen[5].items():
        assert group["lr"] == pytest.approx((0.02 if name.endswith(MATRICES) else 0.01) * 3 / 4), name
        assert group["weight_decay"] == (0.0 if "bias" in name or "norm" in name else 0.3), name
        assert "momentum" not in group
    log = json.loads((run / "log_history.json").read_text())
    rates = [(2 * entry["learning_rate"], entry["layer_learning_rate"]) for entry in log if "loss" in entry]
    assert len(rates) == 4 and all(layers == pytest.approx(twice) for twice, layers in rates)


@needs_muon
def test_command_trains_the_preset_of_the_recipe(recipe_values, tmp_path):
    overrides = ["preset=Stable", "layer_optimizer=muon", "max_steps=2"]
    run, seen = train_by_command(tmp_path, recipe_values, *overrides)
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["residual_gains"] == pytest.approx([1, 0.5, 1, 0.5])  # 1 / sqrt(2 * 2 layers)
    assert runs.read_results(run)["variant"] == "SM+R@Stable"
    # gains that are not trained have no optimizer
    assert not any("residual_gains" in name for name in seen[0])


def test_without_options_nothing_is_changed(recipe_values, tmp_path):
    run, _ = train_by_command(tmp_path, {**recipe_values, "max_steps": 2})
    assert not any("layer_learning_rate" in entry for entry in json.loads((run / "log_history.json").read_text()))
    assert build_recipe({**recipe_values, "layer_optimizer": "adamw"}).layer_options == {}


@needs_muon
def test_run_interrupted_goes_on_bitwise(recipe_values, tmp_path):
    values = {**recipe_values, "layer_optimizer": "muon", "gradient_accumulation_steps": 2}
    whole, broken = ({**values, "output_dir": str(tmp_path / name)} for name in ("whole", "broken"))
    loop.train(build_recipe(whole))
    with one_more_callback(interrupting(6)), pytest.raises(KeyboardInterrupt):
        loop.train(build_recipe(broken))
    assert [path.name for path in runs.list_checkpoints(tmp_path / "broken")] == ["checkpoint-4"]
    loop.train(build_recipe(broken))
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("broken", "whole"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    # nothing of the optimizer is lost on the way: both rules have their state in the checkpoint
    state = torch.load(tmp_path / "whole" / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"].values()
    assert sum("momentum_buffer" in each for each in state) == 12
    assert sum("exp_avg_sq" in each for each in state) == len(list(state)) - 12 > 0


@needs_muon
def test_accumulated_gradients_are_those_of_the_whole_batch(recipe_values, tmp_path):
    losses = []
    for name, more in {"whole": (4, 1), "parts": (1, 4)}.items():
        more = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), more, strict=True))
        values = {**recipe_values, "layer_optimizer": "muon", "embedding_dropout": 0.0, "logging_steps": 1, **more}
        run = loop.train(build_recipe({**values, "output_dir": str(tmp_path / name)}))
        log = json.loads((run / "log_history.json").read_text())
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    # the iterations are in bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@needs_muon
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"muon_momentum": 0.9}, "muon_momentum=0.9 has no effect with layer_optimizer='adamw'"),
        ({"muon_adjustment": "original"}, "muon_adjustment=original has no effect with layer_optimizer='adamw'"),
        ({"layer_optimizer": "muon", "muon_momentum": 1}, r"muon_momentum must be in \[0, 1\), got 1"),
        ({"layer_optimizer": "muon", "optim": "sgd"}, "layer_optimizer=muon needs AdamW .*, got optim='sgd'"),
        ({"layer_learning_rate": 0.1, "optim": "sgd"}, "layer_learning_rate=0.1 needs AdamW .*, got optim='sgd'"),
        ({"layer_learning_rate": -1.0}, "layer_learning_rate must be finite and more than 0, got -1.0"),
        ({"layer_base_width": 0}, "layer_base_width must be at least 1, got 0"),
        ({"layer_optimizer": "lion"}, "layer_optimizer"),
        ({"layer_optimizer": "muon", "muon_adjustment": "none"}, "muon_adjustment"),
    ],
)
def test_recipe_that_asks_for_what_has_no_effect_is_refused(recipe_values, values, message):
    with pytest.raises(UserError, match=message):
        build_recipe({**recipe_values, **values})


def test_recipe_of_muon_on_a_torch_without_it(recipe_values, monkeypatch, capsys, tmp_path):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    assert cli.main(["train", str(path), "layer_optimizer=muon"]) == 1
    assert "layer_optimizer='muon' needs torch 2.9 or newer, found 2" in capsys.readouterr().err


@needs_muon
def test_defaults_of_muon_are_written_out(recipe_values):
    recipe = build_recipe({**recipe_values, "layer_optimizer": "muon"})
    assert (recipe.data.muon_momentum, recipe.data.muon_adjustment) == (0.95, "match_rms_adamw")
    assert build_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()


@needs_muon
def test_plan_knows_muons_state_and_products(recipe_values):
    adamw, muon = (
        plan.plan(build_recipe({**recipe_values, "variant": "SM+R", "layer_optimizer": name, **more}))
        for name, more in (("adamw", {}), ("muon", {"gradient_accumulation_steps": 2}))
    )
    matrices = 2 * (4 * 16 * 16 + 2 * 16 * 64)
    assert adamw["checkpoint"] - muon["checkpoint"] == 4 * matrices
    assert adamw["optimizer"] - muon["optimizer"] == pytest.approx(4 * matrices, rel=0.05)
    # five iterations of X X', (X X')(X X') and (..) X on rows of 16, once for two micro-batches of 64 tokens
    products = 2 * 5 * sum(number * 16 * 16 * (2 * columns + 16) for number, columns in ((8, 16), (4, 64)))
    assert muon["flops_per_token"] - adamw["flops_per_token"] == pytest.approx(2 * products / 2 / 64 / 2)


# ---- why a model stalls


def test_steps_by_rule_and_the_cosine_of_tokens():
    script = runpy.run_path(str(ROOT / "scripts" / "update_rank.py"))
    left, right = torch.linalg.qr(torch.randn(5, 5))[0][:, :3], torch.linalg.qr(torch.randn(4, 4))[0][:3]
    step = left * torch.tensor([8.0, 2.0, 1.0]) @ right
    for rule, kept in {"adamw": (8, 2, 1), "clipped": (4, 2, 1), "scaled": (4, 1, 0.5)}.items():
        limited, rank, norm = script["limit_step"](step, 4.0, rule)
        torch.testing.assert_close(limited, left * torch.tensor(kept) @ right, atol=1e-5, rtol=0)
        assert (rank, norm) == pytest.approx((sum(value**2 for value in kept) / kept[0] ** 2, kept[0]))
    # a step that is small enough stays as it is
    assert script["limit_step"](step, 9.0, "scaled")[0].equal(step)
    states = torch.randn(2, 3, 7)
    pairs = [
        torch.cosine_similarity(row[i], row[j], dim=0) for row in states for i in range(3) for j in range(3) if i != j
    ]
    assert script["mean_cosine"](states) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_script_of_the_mechanism_writes_a_table(recipe_values, monkeypatch, tmp_path):
    (tmp_path / "docs" / "data").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- table update-rank -->\n<!-- end -->\n")
    values = {name: value for name, value in recipe_values.items() if name not in ("max_steps", "warmup_steps")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "max_grad_norm": 1.0}))
    given = [str(tmp_path / "recipe.yaml"), "max_steps=4", "--every", "2", "--docs", str(tmp_path / "docs")]
    monkeypatch.setattr("sys.argv", ["update_rank.py", *given])
    runpy.run_path(str(ROOT / "scripts" / "update_rank.py"), run_name="__main__")
    rows = json.loads((tmp_path / "docs" / "data" / "update-rank.json").read_text())["rows"]
    assert [(row["steps of"], row["step"]) for row in rows] == [
        (rule, step) for rule in ("adamw", "clipped", "scaled") for step in (2, 4)
    ]
    assert "| clipped | 1,337 | 4 |" in (tmp_path / "README.md").read_text()
    # of rate 0.01 / 10 at the second step of 20; the largest matrices have sides of 64
    assert max(row["spectral norm"] for row in rows if row["steps of"] != "adamw") < 6 * 0.01 * 0.2 * 8
    monkeypatch.setattr("sys.argv", ["update_rank.py", *given[:-1], str(tmp_path)])
    with pytest.raises(SystemExit, match="update_rank: --docs must be the folder docs of a checkout"):
        runpy.run_path(str(ROOT / "scripts" / "update_rank.py"), run_name="__main__")


def test_script_of_the_stalls_counts_the_steps_of_runs(recipe_values, monkeypatch, tmp_path, capsys):
    usual = {**recipe_values, "warmup_steps": 20, "save_strategy": "no", "logging_steps": 10, "max_steps": 30}
    losses = []
    for seed in (1, 2):
        run_dir = loop.train(
            build_recipe({**usual, "variant": "SM+R", "seed": seed, "output_dir": str(tmp_path / str(seed))})
        )
        log = json.loads((run_dir / "log_history.json").read_text())
        losses.append([record["loss"] for record in log if "loss" in record])
    # a loss that seed 1 reaches with the second log, or both never
    (tmp_path / "docs" / "data").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- table steps-to-loss -->\n<!-- end -->\n")
    own = ("warmup_steps", "save_strategy", "logging_steps", "max_steps", "disable_tqdm")
    given = [f"{name}={value}" for name, value in usual.items() if name not in own]
    for loss in (losses[0][1] + 1e-4, 0.1):
        results = tmp_path / f"{loss}.jsonl"
        arguments = [*given, "--seeds", "2", "--results", str(results), "--docs", str(tmp_path / "docs")]
        monkeypatch.setattr("sys.argv", ["steps_to_loss.py", *arguments])
        for _ in range(2):  # the second time nothing is missing
            script = runpy.run_path(str(ROOT / "scripts" / "steps_to_loss.py"))
            script["main"].__globals__.update(LOSS=loss, STEPS=30, SETTINGS={"SM+R": ["variant=SM+R"]})
            script["main"]()
        found = [json.loads(line) for line in results.read_text().splitlines()]
        assert {record.pop("commit") for record in found} == {runs.find_commit()}
        assert all(record.pop("overrides") == given for record in found)
        reached = [[10 * i for i, value in enumerate(each, 1) if value < loss] for each in losses]
        steps = [each[0] if each else None for each in reached]
        assert found == [{"setting": "SM+R", "seed": seed, "steps": steps[seed - 1]} for seed in (1, 2)]
    # with other values everything is missing
    monkeypatch.setattr("sys.argv", ["steps_to_loss.py", *given, "seed=7", "--seeds", "1", "--results", str(results)])
    script["main"]()
    assert json.loads(results.read_text().splitlines()[2])["overrides"] == [*given, "seed=7"]
    assert "| SM+R | 2 | 0 | > 30 | > 30 | > 30 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "docs" / "steps_to_loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["all at once", "derf", "gated, leaky", "SAS"])
def test_weight_decay_is_for_matrices_and_embeddings(name):
    model = LNFreeForCausalLM(design(name))
    groups = get_parameter_groups(model, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed = {id(parameter) for parameter in groups[0]["params"]}
    assert len(decayed) + len(groups[1]["params"]) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        matrix = "_proj.weight" in key or "embed_" in key or "lm_head" in key
        assert (id(parameter) in decayed) == matrix, key
    model.model.embed_tokens.weight.requires_grad_(False)
    trained = [id(parameter) for group in get_parameter_groups(model, 0.1) for parameter in group["params"]]
    assert id(model.model.embed_tokens.weight) not in trained


def test_weights_of_stock_gpt2_decay_too():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    decayed = set(get_decayed_parameters(model))
    for name, parameter in model.named_parameters():
        assert (name in decayed) == (parameter.ndim == 2), name


@needs_muon
def test_group_added_later_is_of_the_first_rule_and_comes_first():
    model, more = tiny_model(), torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(model, learning_rate=0.01, layer_learning_rate=0.02)
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.add_param_group({"params": [more], "weight_decay": 0.0})
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, *rates]
    assert optimizer.param_groups[0]["params"][0] is more
    alone, alike = torch.nn.Parameter(torch.ones(3)), model.model.embed_tokens.weight
    reference = torch.optim.AdamW([alone], lr=0.01, weight_decay=0.0)
    for parameter in (more, alone):
        parameter.grad = torch.tensor([1.0, -2.0, 0.5])
    before = alike.clone()
    optimizer.step(), reference.step()
    # AdamW has stepped it, and nothing that has no gradient
    assert more.equal(alone) and alike.equal(before)
