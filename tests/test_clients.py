"""
What people use with models of the Hub, tried for real. Their packages are the extra `clients`.

`LNFREE_EXPORT=FOLDER` runs the tests on that export in place of a small random model; `-rP` prints their figures.
"""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_lnfree import LNFreeForCausalLM
from modeling_lnfree.configuration_lnfree import BACKBONES, PRESETS
from modeling_lnfree.modeling_lnfree import CACHE_NAME

from .conftest import ROOT, every_backbone, random_ids, tiny_config, tiny_model
from .modeling.designs import (
    design,
    design_model,
    every_design,
    every_path,
    every_preset_and_backbone,
    possible,
    preset_name,
)


# what these packages warn about in themselves is not ours to mend
pytestmark = pytest.mark.filterwarnings("default")

LICENSE = (ROOT / "LICENSE").read_text()  # a text that does not change
TEXTS = [LICENSE[start : start + 300] for start in range(0, len(LICENSE), 1000)]


def needs(package: str, extra: str = "clients"):
    return pytest.importorskip(package, reason=f"{package} is not installed: pip install 'lnfree[{extra}]'")


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory):
    """An export that the environment names, or a small random model with a tokenizer."""
    if "LNFREE_EXPORT" in os.environ:
        return Path(os.environ["LNFREE_EXPORT"]).resolve()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clients") / "export"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, 300, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special).save_pretrained(folder)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = tiny_config("SM+R", vocab_size=300, max_position_embeddings=512, **tokens)
    LNFreeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(export_dir):
    return AutoModelForCausalLM.from_pretrained(export_dir).eval()


@pytest.fixture
def tokenizer(export_dir):
    return AutoTokenizer.from_pretrained(export_dir)


def some_ids(model, *shape: int) -> torch.Tensor:
    return random_ids(*shape, vocab_size=model.config.vocab_size)


def nats_per_token(model, tokenizer) -> float:
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : model.config.max_position_embeddings]
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


# ---- fine-tuning


def test_peft_finds_the_projections_and_merges_exactly(model, export_dir, tmp_path):
    peft = needs("peft")
    input_ids = some_ids(model, 2, 20)
    before = model(input_ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    found = {name.split(".")[-1] for name in adapted.targeted_module_names}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        adapted(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    expected = adapted.eval()(input_ids).logits
    assert (expected - before).abs().max() > 1e-2  # it has learned something
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(export_dir), tmp_path / "adapter")
    assert again.eval()(input_ids).logits.equal(expected)
    merged = adapted.merge_and_unload()
    assert type(merged) is LNFreeForCausalLM
    torch.testing.assert_close(merged(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


@every_path
def test_peft_adapts_every_matrix_of_a_design_and_merges_exactly(name, backbone):
    peft = needs("peft")
    model, input_ids = design_model(name, backbone), random_ids(2, 9, vocab_size=61)
    linears = {
        key.removeprefix("model.")
        for key, module in model.model.named_modules(prefix="model")
        if isinstance(module, torch.nn.Linear)
    }
    before = model(input_ids).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    assert {key.removeprefix("model.") for key in adapted.targeted_module_names} == linears
    expected = adapted(input_ids).logits
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted.merge_and_unload()(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # trl imports for seconds
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trl_fine_tunes(lora, model, tokenizer, tmp_path):
    trl, peft = needs("trl"), needs("peft")
    from datasets import Dataset

    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2 if lora else 1e-3,
        max_length=64,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
    )
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if lora else None
    rows = Dataset.from_dict({"text": TEXTS * 4})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


# ---- generation, quantization


def test_pipeline_continues_each_text_as_generate_does(model, tokenizer):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["def main(", "import os, sys\n\nclass A"]
    answers = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        alone = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert answer[0]["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)


def test_assisted_generation_with_a_draft_of_the_family_equals_greedy(model):
    draft = LNFreeForCausalLM(tiny_config("SM+LN+G", vocab_size=model.config.vocab_size)).eval()
    input_ids = some_ids(model, 1, 6)
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(input_ids)}
    expected = model.generate(input_ids, **options)
    assert model.generate(input_ids, assistant_model=draft, **options).equal(expected)
    assert model.generate(input_ids, prompt_lookup_num_tokens=3, **options).equal(expected)


@pytest.mark.slow  # which has torchao: it writes to the stderr of all that imports transformers
def test_int8_weights_keep_the_perplexity(model, tokenizer, export_dir, tmp_path):
    needs("torchao", "quantization")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    before = nats_per_token(model, tokenizer)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    quantized = AutoModelForCausalLM.from_pretrained(export_dir, quantization_config=config).eval()
    after = nats_per_token(quantized, tokenizer)
    print(f"perplexity {math.exp(before):.4f} before, {math.exp(after):.4f} with int8 weights")
    assert after != before
    assert after == pytest.approx(before, abs=0.02)
    assert type(quantized.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
    assert quantized.lm_head.weight is quantized.model.embed_tokens.weight
    quantized.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8").eval()
    input_ids = some_ids(model, 2, 20)
    assert again(input_ids).logits.equal(quantized(input_ids).logits)


# ---- graphs


def test_exported_graph_takes_any_batch_and_length(model):
    length = model.config.max_position_embeddings
    shapes = {"input_ids": {0: torch.export.Dim("B"), 1: torch.export.Dim("T", max=length)}, "use_cache": None}
    graph = torch.export.export(model, (some_ids(model, 2, 9),), {"use_cache": False}, dynamic_shapes=shapes).module()
    for shape in ((1, 2), (3, 17), (2, length)):
        input_ids = some_ids(model, *shape)
        torch.testing.assert_close(graph(input_ids, use_cache=False).logits, model(input_ids).logits)


class WithCache(torch.nn.Module):
    """Token ids and each layer's keys and values in, logits and the longer keys and values out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, *states):
        cache = DynamicCache()
        for layer in range(self.model.config.num_hidden_layers):
            cache.update(states[2 * layer], states[2 * layer + 1], layer)
        logits = self.model(input_ids, use_cache=True, **{CACHE_NAME: cache}).logits
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.slow  # the exporter takes half a minute
def test_onnx_runtime_gives_the_logits_with_and_without_a_cache(model, tmp_path):
    needs("onnx"), needs("onnxscript")
    runtime = needs("onnxruntime")
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    states = [torch.randn(2, heads, 5, width) for _ in range(2 * config.num_hidden_layers)]
    names = [f"state_{index}" for index in range(len(states))]
    batch, new, past = torch.export.Dim("B"), torch.export.Dim("T", max=60), torch.export.Dim("S", max=60)
    torch.onnx.export(
        WithCache(model),
        (some_ids(model, 2, 3), *states),
        tmp_path / "model.onnx",
        dynamo=True,
        dynamic_shapes=({0: batch, 1: new}, tuple({0: batch, 2: past} for _ in states)),
        input_names=["input_ids", *names],
        output_names=["logits", *(f"new_{name}" for name in names)],
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for batch_size, pieces in ((1, (10, 1, 1, 5, 13)), (3, (30,))):
        input_ids = some_ids(model, batch_size, 30)
        expected = model(input_ids).logits
        found, feeds = [], {name: torch.zeros(batch_size, heads, 0, width).numpy() for name in names}
        for piece in input_ids.split(pieces, dim=1):
            logits, *new_states = session.run(None, {"input_ids": piece.numpy(), **feeds})
            found.append(torch.from_numpy(logits))
            feeds = dict(zip(names, new_states, strict=True))
        torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.slow  # seconds a design
@every_preset_and_backbone
def test_onnx_runtime_gives_the_logits_of_every_preset(name, backbone, tmp_path):
    needs("onnx"), needs("onnxscript")
    runtime = needs("onnxruntime")
    model = design_model(name, backbone).float()
    shapes = {"input_ids": {0: torch.export.Dim("B"), 1: torch.export.Dim("T", max=32)}, "use_cache": None}
    torch.onnx.export(
        model,
        (random_ids(2, 9, vocab_size=61),),
        tmp_path / "model.onnx",
        kwargs={"use_cache": False},
        dynamo=True,
        dynamic_shapes=shapes,
        output_names=["logits"],
    )
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((1, 5), (3, 32)):
        input_ids = random_ids(*shape, vocab_size=61)
        (logits, *_) = session.run(None, {"input_ids": input_ids.numpy()})
        expected = model(input_ids).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=5e-5, rtol=1e-4)


# ---- evaluation


@pytest.mark.slow  # a process that imports the harness
def test_lm_eval_measures_the_perplexity_that_we_measure(model, tokenizer, export_dir, tmp_path):
    needs("lm_eval")
    from training.measure import measure

    length = model.config.max_position_embeddings
    # whole windows only: where a text is cut, the harness reads on and we do not
    texts = [tokenizer.decode(tokenizer(text)["input_ids"][: length // 2]) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # the harness has each text follow the end of another
    ours = [{"text": tokenizer.eos_token + text} for text in texts]
    (tmp_path / "ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ours))
    (tmp_path / "task.yaml").write_text(
        "task: local_texts\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {tmp_path / 'texts.jsonl'}\n"
        "test_split: train\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    arguments = f"pretrained={export_dir},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-I", "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", "local_texts", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.rglob("out*.json")
    bits_per_byte = json.loads(path.read_text())["results"]["local_texts"]["bits_per_byte,none"]
    measured = measure(str(export_dir), dataset=str(tmp_path / "ours.jsonl"), text_column="text", batch_size=2)
    assert measured["truncated_texts"] == 0
    num_bytes = sum(len(text.encode()) for text in texts)
    theirs = bits_per_byte * math.log(2) * num_bytes / measured["predicted_tokens"]
    print(f"nats per token: {theirs:.6f} by lm-eval, {measured['nll']:.6f} by lnfree measure")
    assert theirs == pytest.approx(measured["nll"], abs=1e-4)


# ---- interpretability


@pytest.mark.parametrize("variant", ["SM+LN+G", "SM+R", "SM+R-noLNf", "SM+LR-layer"])
@every_backbone
def test_transformer_lens_sees_what_the_model_computes(variant, backbone):
    needs("transformer_lens")
    from modeling_lnfree.adapters.transformer_lens import load_bridge

    model = tiny_model(variant, backbone, attn_implementation="eager")
    input_ids = random_ids(2, 9)
    expected = model(input_ids, output_attentions=True, output_hidden_states=True)
    bridge = load_bridge(model)
    logits, cache = bridge.run_with_cache(input_ids)
    close = {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(logits, expected.logits, **close)
    for index in range(model.config.num_hidden_layers):
        block = f"blocks.{index}"
        torch.testing.assert_close(cache[f"{block}.attn.hook_pattern"], expected.attentions[index], **close)
        before = cache[f"{block}.hook_resid_pre"]
        torch.testing.assert_close(before, expected.hidden_states[index], **close)
        attended = before + cache[f"{block}.hook_attn_out"]
        if backbone == "gpt2":
            torch.testing.assert_close(cache[f"{block}.hook_resid_mid"], attended, **close)
        after = attended + cache[f"{block}.hook_mlp_out"]
        torch.testing.assert_close(cache[f"{block}.hook_resid_post"], after, **close)
    assert cache["ln_final.hook_out"].shape == (2, 9, 32)  # an identity, where the variant has no final norm
    assert cache["blocks.0.attn.hook_z"].shape == (2, 9, 4, 8)

    # one head out: the same as without its columns in the output projection
    def ablate(states, hook):
        states = states.clone()
        states[:, :, 2] = 0
        return states

    ablated = bridge.run_with_hooks(input_ids, fwd_hooks=[("blocks.1.attn.hook_z", ablate)])
    projection = model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        projection.weight[:, 16:24] = 0
    torch.testing.assert_close(ablated, bridge(input_ids), **close)
    assert (ablated - logits).abs().max() > 1e-2


# what each of the other presets has, and TransformerLens cannot show
NO_BRIDGE = {
    **dict.fromkeys(("OP", "Stable", "SAS", "SAS-P", "V-SkipInit", "Shaped", "ScFFN"), "residual_gains"),
    **dict.fromkeys(("ScFuFFN", "AERO", "Pruned"), "residual_gains|mlp_type"),
    **dict.fromkeys(("PostLN", "PeriLN", "HybridNorm", "HybridNorm-star"), "norm_position"),
    **dict.fromkeys(("fused", "no MLP, hybrid", "per layer, MLP"), "mlp_type|norm_position"),
}


@every_design
def test_transformer_lens_shows_a_design_or_says_which_field_it_cannot(name):
    needs("transformer_lens")
    from modeling_lnfree.adapters.transformer_lens import load_bridge

    for backbone in ("gpt2", "llama"):
        model = design_model(name, backbone).float()
        input_ids = random_ids(2, 9, vocab_size=61)
        fields = {"residual_gains", "norm_position", "mlp_type"}
        config = model.config
        layers = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
        usual = all(
            layer.residual_gains is None and layer.norm_position == "pre" and layer.mlp_type in ("two_layer", "gated")
            for layer in layers
        )
        if not usual:
            with pytest.raises(ValueError, match=rf"cannot show ({NO_BRIDGE.get(name, '|'.join(fields))})="):
                load_bridge(model)
            continue
        assert name not in NO_BRIDGE
        expected = model(input_ids, output_hidden_states=True).logits
        bridge = load_bridge(model)
        logits, cache = bridge.run_with_cache(input_ids)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        for index in range(config.num_hidden_layers):
            block = f"blocks.{index}"
            after = cache[f"{block}.hook_resid_pre"] + cache[f"{block}.hook_attn_out"] + cache[f"{block}.hook_mlp_out"]
            torch.testing.assert_close(after, cache[f"{block}.hook_resid_post"], atol=1e-4, rtol=1e-4)
            assert cache[f"{block}.attn.hook_pattern"].shape == (2, 4, 9, 9)


@pytest.mark.parametrize(
    ("variant", "backbone", "unsupported"),
    [
        ("SM+LN+G", "gpt2", None),
        ("SM+R", "pythia", None),
        ("SM+RMS+S", "gpt2", None),
        ("SM+R-noLNf", "gpt2", None),
        ("SM+LN+R-noLNf", "pythia", "center_writing_weights"),
        ("SM+LN+G@Gated", "gpt2", "fold_ln"),
        ("SM+LN+G@Clipped", "gpt2", "fold_ln"),
    ],
)
def test_transformer_lens_boots_a_folder_and_processes_its_weights(
    variant, backbone, unsupported, tokenizer, tmp_path
):
    needs("transformer_lens")
    from transformer_lens.model_bridge import TransformerBridge

    import modeling_lnfree.adapters.transformer_lens  # noqa: F401  # puts the architecture into the table

    model = tiny_model(variant, backbone, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    input_ids = some_ids(model, 2, 9)
    expected = model(input_ids).logits.log_softmax(-1)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    torch.testing.assert_close(bridge(input_ids).log_softmax(-1), expected, atol=1e-4, rtol=1e-5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bridge.enable_compatibility_mode(disable_warnings=True)
    found = {str(warning.message).split(" does not support ")[-1].split(";")[0] for warning in told}
    assert found & {"fold_ln", "center_writing_weights"} == {unsupported} - {None}
    logits, cache = bridge.run_with_cache(input_ids)
    torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-4, rtol=1e-5)
    # all that was asked for was done
    assert logits.mean(-1).abs().max() < 1e-4
    if variant == "SM+LN+G":
        assert cache["blocks.1.hook_resid_post"].mean(-1).abs().max() < 1e-5
        assert bridge.blocks[1].ln2.weight.equal(torch.ones(32))


def test_transformer_lens_does_not_fold_values_where_weights_do_not_add_up():
    needs("transformer_lens")
    from modeling_lnfree.adapters.transformer_lens import load_bridge

    every = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    bridge = load_bridge(tiny_model("SM+R@Clipped", biased_projections=every))
    with pytest.raises(RuntimeError, match="does not support compatibility mode"):
        bridge.enable_compatibility_mode()


def test_transformer_lens_on_an_export(model, tokenizer):
    needs("transformer_lens")
    from modeling_lnfree.adapters.transformer_lens import load_bridge

    text = "def main(argument):"
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = model(input_ids, output_hidden_states=True)
    bridge = load_bridge(model, tokenizer)
    logits, cache = bridge.run_with_cache(bridge.to_tokens(text))
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(cache["blocks.1.hook_resid_pre"], expected.hidden_states[1], atol=1e-5, rtol=1e-5)


def test_nnsight_reads_and_sets_hidden_states(model, tokenizer):
    nnsight = needs("nnsight")
    text = "def main(argument):"
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = model(input_ids, output_hidden_states=True)
    traced = nnsight.TransformersModel(model, task="text-generation", tokenizer=tokenizer)
    with traced.trace(text):
        states = traced.model.layers[1].output.save()
        normed = traced.model.norm.output.save()
        logits = traced.lm_head.output.save()
    torch.testing.assert_close(states, expected.hidden_states[2])
    torch.testing.assert_close(logits, expected.logits)
    assert normed.shape == expected.hidden_states[-1].shape
    with traced.trace(text):
        traced.model.layers[1].mlp.output[:] = 0
        ablated = traced.lm_head.output.save()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    torch.testing.assert_close(ablated, model(input_ids).logits, atol=1e-5, rtol=1e-5)


# ---- serving


# presets that miss a point: a buffer beside the parameters, a second call of attention in a layer, a score or a weight
# that its attention would have to change; and matrices without a row in the tensor-parallel plan
NOT_VLLM = {
    **dict.fromkeys(("OP", "Stable"), "buffer"),
    **dict.fromkeys(("SAS", "SAS-P", "V-SkipInit", "Shaped"), "second call"),
    **dict.fromkeys(("Clipped", "SoftCap"), "scores and weights"),
    **dict.fromkeys(("ScFuFFN", "Pruned", "AERO", "Gated"), "whole on each rank"),
}
SERVED = [name for name in PRESETS if name not in NOT_VLLM]


@pytest.mark.parametrize(
    "variant, backbone",
    [
        (variant, backbone)
        for variant in ["SM+LN+G", "SM+R", "SM+LR-layer", "SM+DyT+G", "SM+Derf+R", *map(preset_name, SERVED)]
        for backbone in BACKBONES
        if possible(variant.partition("@")[2], backbone)
    ],
)
def test_what_vllm_asks_of_a_custom_model(variant, backbone, tmp_path, monkeypatch):
    """The points of "Writing custom models" in vLLM's documentation; vLLM itself is not run."""
    llama = {**BACKBONES["llama"], "tie_word_embeddings": False, "biased_projections": []}
    model = tiny_model(variant, **llama) if backbone == "llama" else tiny_model(variant, backbone)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map["AutoModel"] == "modeling_lnfree.LNFreeModel"
    with torch.device("meta"):
        empty = AutoModel.from_config(config)
    assert empty._supports_attention_backend
    # nothing to fill but what a checkpoint holds
    assert not list(empty.named_buffers())
    # the attention module is found by its causality, its layer by a whole number
    attentions = [module for module in empty.modules() if hasattr(module, "layer_idx")]
    assert [module.layer_idx for module in attentions] == [0, 1, 2]
    assert all(module.is_causal and isinstance(module.scaling, float) for module in attentions)
    # tensor parallelism by name, column- and row-wise
    linears = {name for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
    styles = {name.replace("*", str(i)): s for name, s in config.base_model_tp_plan.items() for i in range(3)}
    assert linears <= set(styles) and {styles[name] for name in linears} == {"colwise", "rowwise"}
    # pipeline parallelism by name, with one list of blocks; not with learned positions, which the body would add again
    # at every stage
    if backbone == "pythia":
        children = {name for name, child in empty.named_children() if list(child.parameters())}
        assert children - {"learned_slope"} <= set(config.base_model_pp_plan)
        assert [name for name, child in empty.named_children() if isinstance(child, torch.nn.ModuleList)] == ["layers"]

    # the body runs on its attention: flat queries, keys and values of one row, and the layer's own instance
    def flat_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
        assert scaling == module.scaling
        length = query.shape[-2]
        flat = [states.transpose(1, 2).reshape(length, -1) for states in (query, key, value)]
        return attention_instances[module.layer_idx](*flat), None

    class Instance:
        calls = 0

        def __call__(self, *flat):
            self.calls += 1
            heads = [states.view(len(states), 4, 8).transpose(0, 1)[None] for states in flat]
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            return out[0].transpose(0, 1).reshape(len(flat[0]), -1)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flat", flat_attention)
    body = AutoModel.from_pretrained(tmp_path, attn_implementation="flat").eval()
    input_ids, instances = random_ids(1, 13), [Instance() for _ in range(3)]
    for inputs in ({"input_ids": input_ids}, {"inputs_embeds": body.embed_tokens(input_ids)}):
        hidden = body(
            **inputs,
            use_cache=False,
            position_ids=torch.arange(13)[None],
            attention_instances=instances,
            return_dict=False,
        )[0][0]
        torch.testing.assert_close(hidden, model.model(input_ids).last_hidden_state[0], atol=1e-5, rtol=1e-5)
    assert [instance.calls for instance in instances] == [2, 2, 2]


@pytest.mark.parametrize("name", NOT_VLLM)
def test_what_vllm_cannot_serve_of_the_presets(name):
    config = design(name)
    model = LNFreeForCausalLM(config).model
    indices = [module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")]
    linears = {key.split(".")[-1] for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    planned = {key.split(".")[-1] for key in config.base_model_tp_plan}
    misses = {
        "buffer": bool(list(model.named_buffers())),
        "second call": len(indices) > config.num_hidden_layers,
        "scores and weights": bool(model.layers[0].self_attn.options),
        "whole on each rank": not linears <= planned,
    }
    assert misses[NOT_VLLM[name]]
