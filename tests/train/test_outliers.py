"""Outliers of the stream and the learned scalars of designs, against float64 by definition and the state dict."""

import pytest
import torch

from training import files, quantities, runs
from training.recipe import build_recipe
from training.train import loop

from ..conftest import random_ids, tiny_model
from ..modeling.designs import design_model
from .conftest import measure


@pytest.mark.parametrize("backbone", ["gpt2", "pythia"])
def test_outliers_match_float64_hidden_states(backbone):
    model, probe = tiny_model("SM+R", backbone), random_ids(3, 17)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.1)
        model.model.embed_tokens.weight[0:, 7].add_(40.0 * (torch.arange(99) == int(probe[0, 3])))  # at one token
    record, scalars = measure(quantities.Outliers(), model, probe)
    states: list[torch.Tensor] = []
    for layer in model.double().model.layers:
        layer.register_forward_hook(lambda module, args, output: states.append(output.detach()))
    model(probe)
    for layer, state in enumerate(states):
        entries = state.flatten()
        deviations = entries - entries.mean()
        kurtosis = (deviations**4).mean() / (deviations**2).mean() ** 2
        cosines = [
            torch.cosine_similarity(row[i], row[j], dim=0)
            for row in state
            for i in range(17)
            for j in range(17)
            if i != j
        ]
        far = ((state - entries.mean()).abs() > 6 * entries.std(unbiased=False)) & (state.abs() > 6)
        assert record["infinity_norm"][layer] == pytest.approx(entries.abs().max().item(), rel=1e-5)
        assert record["pearson_kurtosis"][layer] == pytest.approx(kurtosis.item(), rel=1e-4)
        assert record["cosine"][layer] == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
        assert record["dimensions"][layer] == far.flatten(0, 1).any(0).nonzero().flatten().tolist()
        assert scalars[f"outliers/layer_{layer}/dimensions"] == len(record["dimensions"][layer])
    if backbone == "gpt2":
        assert 7 in record["dimensions"][0]


def test_a_sequence_of_one_token_has_no_cosine():
    record, _ = measure(quantities.Outliers(), tiny_model("SM+R"), random_ids(2, 1))
    assert all(value != value for value in record["cosine"])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Gated", {"head_gate.bias"}),
        ("AERO", {"temperature", "residual_gains"}),
        ("SAS", {"attention_gains", "residual_gains"}),
        ("OP", set()),  # its gains are fixed
        ("derf", {"alpha", "shift"}),
    ],
)
def test_learned_scalars_are_those_of_the_design(name, kinds):
    model = design_model(name).float()
    record, scalars = measure(quantities.LearnedScalars(model), model, torch.randint(61, (1, 5)))
    state = model.state_dict()
    assert {kind for kind in quantities.LearnedScalars.kinds if any(key.endswith(kind) for key in record)} == kinds
    for key, value in record.items():
        assert value == state[key].tolist()
        assert scalars[f"learned_scalars/{key}/mean"] == pytest.approx(state[key].mean().item())


@pytest.mark.usefixtures("own_cache")
def test_a_run_has_both_files(recipe_values, tmp_path):
    run_dir = loop.train(build_recipe({**recipe_values, "variant": "SM+R@SAS", "output_dir": str(tmp_path / "run")}))
    records = files.read_records(run_dir / "learned_scalars.jsonl")
    assert [record["step"] for record in records] == [0, 3, 6, 8]
    gains = "model.layers.0.self_attn.attention_gains"
    assert records[0][gains] == [[1.0, 1.0]] * 3 and records[-1][gains] != records[0][gains]
    outliers = files.read_records(run_dir / "outliers.jsonl")
    assert [record["step"] for record in outliers] == [0, 3, 6, 8]
    assert all(len(record["infinity_norm"]) == 2 for record in outliers)
    assert runs.read_results(run_dir)["variant"] == "SM+R@SAS"


@pytest.mark.parametrize(
    ("name", "relu"), [("OP", True), ("gated", False), ("fused", False), ("per layer, MLP", False)]
)
def test_zero_activations_are_of_models_whose_blocks_all_have_a_relu(name, relu):
    assert quantities.ZeroActivations.holds(design_model(name)) == relu


def test_gates_are_means_over_tokens():
    model, probe = design_model("Gated").float(), torch.randint(61, (3, 7))
    record, scalars = measure(quantities.HeadGates(), model, probe)
    inputs: list[torch.Tensor] = []
    for layer in model.double().model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    model(probe)
    for index, states in enumerate(inputs):
        gate = model.model.layers[index].self_attn.head_gate
        for head in range(4):
            logits = states[..., 4 * head : 4 * head + 4] @ gate.weight[head] + gate.bias[head]
            assert record["mean"][index][head] == pytest.approx((1 / (1 + (-logits).exp())).mean().item(), rel=1e-5)
        assert scalars[f"head_gates/layer_{index}/mean"] == pytest.approx(sum(record["mean"][index]) / 4)
