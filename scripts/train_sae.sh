#!/usr/bin/env bash
# A sparse autoencoder of the residual stream behind a layer, trained by sae-lens on the quick start's texts. It needs an
# older TransformerLens, so it has an environment of its own (.venv/sae), on top of the project's. CPU, about a minute.
#
#     bash scripts/train_sae.sh runs/first/model runs/first/sae [LAYER]
set -euo pipefail
model=$(realpath "$1") out=$(realpath -m "$2") layer=${3:-}
cd "$(dirname "$0")/.."

venv=.venv/sae
if [ ! -e "$venv/ready" ]; then
    bash scripts/setup.sh
    .venv/bin/python -m venv "$venv"
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # what the project's environment has is not installed again
    .venv/bin/python -c 'import sys; print(*(path for path in sys.path if "site-packages" in path), sep="\n")' > "$site/project.pth"
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet install --constraint <(grep '^torch==' constraints.txt) 'sae-lens==6.54.0'
    touch "$venv/ready"
fi
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled PYTHONPATH=$PWD
exec "$venv/bin/python" - "$model" "$out" "$layer" <<'PYTHON'
import math
import sys

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, TopKTrainingSAEConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_lnfree  # noqa: F401  # makes the model type known
from training.data import load_documents
from training.recipe import DataArguments


path, out, layer = sys.argv[1:]
documents = load_documents(DataArguments(), seed=0)
model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
config, length = model.config, min(model.config.max_position_embeddings, 128)
layer = int(layer) if layer else config.num_hidden_layers // 2
config = LanguageModelSAERunnerConfig(
    sae=TopKTrainingSAEConfig(d_in=config.hidden_size, d_sae=8 * config.hidden_size, k=16),
    model_name=path,
    model_class_name="AutoModelForCausalLM",
    hook_name=f"model.layers.{layer}",
    streaming=False,
    is_dataset_tokenized=False,
    prepend_bos=False,
    sequence_separator_token="eos",
    context_size=length,
    training_tokens=300_000,
    store_batch_size_prompts=16,
    train_batch_size_tokens=1024,
    lr=1e-3,
    n_batches_in_buffer=8,
    logger=LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
    output_path=out,
)
texts = documents["train"].select_columns("content").rename_column("content", "text")
sae = LanguageModelSAETrainingRunner(config, override_dataset=texts).run().eval()

# on texts that it has not seen: what of the stream it gives back, and what the model makes of that
text = "\n".join(documents["eval"]["content"])
ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 64 * length]).view(-1, length)
seen, replaced = [], []


def replace(module, args, output):
    seen.append(output)
    replaced.append(sae.decode(sae.encode(output)))
    return replaced[-1]


with torch.no_grad():
    before = model(ids, labels=ids).loss.item()
    with model.model.layers[layer].register_forward_hook(replace):
        after = model(ids, labels=ids).loss.item()
stream, found = seen[0].flatten(0, 1), replaced[0].flatten(0, 1)
left = (stream - found).square().sum() / (stream - stream.mean(0)).square().sum()
print(f"{out}: {sae.cfg.d_sae} features behind layer {layer}, 16 at a token; {100 * (1 - left.item()):.1f} % of the variance")
print(f"perplexity {math.exp(before):.2f}, and {math.exp(after):.2f} with the autoencoder's output for the stream")
PYTHON
