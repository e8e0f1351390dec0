"""Every preset from the command line to a folder that loads back: trained, measured, exported."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_lnfree.configuration_lnfree import PRESETS
from training import cli, runs

from ..modeling.designs import preset_name


pytestmark = pytest.mark.usefixtures("own_cache")
QUICK = ("OP", "SAS-P", "HybridNorm")


def train(name: str, recipe_values: dict, folder):
    values = {**recipe_values, "variant": preset_name(name), "output_dir": str(folder / name)}
    (folder / f"{name}.yaml").write_text(json.dumps(values))
    assert cli.main(["train", str(folder / f"{name}.yaml")]) == 0
    return folder / name


def check_trained_and_exported(name: str, recipe_values: dict, folder):
    run_dir = train(name, recipe_values, folder)
    results = runs.read_results(run_dir)
    assert results["variant"] == preset_name(name)
    assert math.isfinite(results["eval_loss"]) and results["eval_loss"] < 1.5 * math.log(
        results["recipe"]["vocab_size"]
    )
    weights = load_file(run_dir / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert cli.main(["export", str(run_dir), str(folder / f"{name}-export")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(folder / f"{name}-export", trust_remote_code=True)
    assert exported.config.variant == preset_name(name)
    ours = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    input_ids = torch.randint(300, (2, 12))
    with torch.no_grad():
        assert exported.eval()(input_ids).logits.equal(ours.eval()(input_ids).logits)


@pytest.mark.parametrize("name", QUICK)
def test_a_preset_is_trained_exported_and_loaded_back(name, recipe_values, tmp_path):
    check_trained_and_exported(name, recipe_values, tmp_path)


@pytest.mark.slow  # processes that load each export
@pytest.mark.parametrize("name", [name for name in PRESETS if name not in QUICK])
def test_every_preset_is_trained_exported_and_loaded_back(name, recipe_values, tmp_path):
    check_trained_and_exported(name, {**recipe_values, "max_steps": 100}, tmp_path)
