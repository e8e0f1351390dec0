"""Every preset from the command line to a folder that loads back: trained, measured, exported."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training import cli, runs

from ..modeling.designs import preset_name


pytestmark = pytest.mark.usefixtures("own_cache")


# all of them, published too: `every_design` in tests/hub/test_publish.py
@pytest.mark.parametrize("name", ["OP", "SAS-P", "Clipped"])
def test_a_preset_is_trained_exported_and_loaded_back(name, recipe_values, tmp_path):
    run_dir, recipe = tmp_path / name, tmp_path / f"{name}.yaml"
    recipe.write_text(json.dumps({**recipe_values, "variant": preset_name(name), "output_dir": str(run_dir)}))
    assert cli.main(["train", str(recipe)]) == 0
    results = runs.read_results(run_dir)
    assert results["variant"] == preset_name(name)
    assert math.isfinite(results["eval_loss"]) and results["eval_loss"] < 1.5 * math.log(
        results["recipe"]["vocab_size"]
    )
    weights = load_file(run_dir / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert cli.main(["export", str(run_dir), str(tmp_path / f"{name}-export")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-export", trust_remote_code=True)
    assert exported.config.variant == preset_name(name)
    ours = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    input_ids = torch.randint(300, (2, 12))
    with torch.no_grad():
        assert exported.eval()(input_ids).logits.equal(ours.eval()(input_ids).logits)
    # queries that clipping leaves no weight are counted, and make no head one that is broken
    assert np.isfinite(results["attention_entropy"]["entropy"]).all()
    assert any(results["attention_entropy"]["nan_count"]) == (name == "Clipped")
