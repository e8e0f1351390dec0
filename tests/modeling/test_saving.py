"""Saved and loaded models are equal, and the Auto classes know them."""

import warnings

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from modeling_lnfree import (
    LNFreeConfig,
    LNFreeForCausalLM,
    LNFreeForSequenceClassification,
    LNFreeForTokenClassification,
    LNFreeModel,
)

from ..conftest import every_backbone, every_variant, random_ids, tiny_model


@every_variant
@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_save_and_load_are_equal(tmp_path, variant, backbone, dtype):
    model = tiny_model(variant, backbone).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = LNFreeForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.dtype == dtype
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and ours.equal(theirs), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (backbone == "gpt2")
    input_ids = random_ids(2, 11)
    assert loaded(input_ids).logits.equal(model(input_ids).logits)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix not in (".json", ".py")) == [
        ".safetensors"
    ]


@pytest.mark.parametrize("load", [LNFreeForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_variant_is_a_suffix_of_the_files_where_a_model_is_loaded(tmp_path, load):
    # what the notation calls a variant has this name too
    model, other = tiny_model("SM+R"), tiny_model("SM+R")
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="half")
    input_ids = random_ids(1, 7)
    assert load(tmp_path, variant="half")(input_ids).logits.equal(model(input_ids).logits)
    assert load(tmp_path)(input_ids).logits.equal(other(input_ids).logits)


def test_partly_missing_weights_keep_what_was_loaded(tmp_path):
    model = tiny_model("SM+LR-layer")
    state = model.state_dict()
    del state["model.layers.1.self_attn.q_proj.weight"], state["lm_head.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, info = LNFreeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.self_attn.q_proj.weight"}
    for name, tensor in loaded.state_dict().items():
        if name not in info["missing_keys"]:
            assert tensor.equal(model.state_dict()[name]), name


def test_body_loads_from_the_head_and_the_head_from_the_body(tmp_path):
    model = tiny_model("SM+R", "pythia")
    model.save_pretrained(tmp_path / "head")
    body = LNFreeModel.from_pretrained(tmp_path / "head").eval()
    input_ids = random_ids(1, 7)
    assert body(input_ids).last_hidden_state.equal(model.model(input_ids).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    head = LNFreeForCausalLM.from_pretrained(tmp_path / "body")
    assert head.model.layers[2].mlp.up_proj.weight.equal(model.model.layers[2].mlp.up_proj.weight)


def test_resized_embeddings_stay_tied_and_work():
    model = tiny_model("SM+R")
    model.resize_token_embeddings(120)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(random_ids(1, 5, vocab_size=120)).logits.shape == (1, 5, 120)


def test_installed_package_registers_the_type(tmp_path):
    tiny_model("SM+R").save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LNFreeForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is LNFreeModel
    assert type(AutoModelForCausalLM.from_config(LNFreeConfig(vocab_size=9, num_hidden_layers=1))) is LNFreeForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the score head is new
        assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is LNFreeForSequenceClassification
        assert type(AutoModelForTokenClassification.from_pretrained(tmp_path)) is LNFreeForTokenClassification
