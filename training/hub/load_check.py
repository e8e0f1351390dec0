"""
Loads an exported model as a stranger would, in a process that does not know this project:

    python -I load_check.py EXPORT_DIR INPUTS.safetensors OUTPUTS.safetensors

Writes the logits of `input_ids` and a greedy continuation of `prompt`, and fails unless the code came out of the
export itself.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, inputs: str, outputs: str):
    """Loads `folder` by the Auto classes and writes `logits` and `generated`."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if not type(model).__module__.startswith("transformers_modules."):
        sys.exit(f"the model's code is {type(model).__module__}, not the export's")
    given = load_file(inputs)
    logits = model(given["input_ids"]).logits.detach()
    prompt = given["prompt"][:, : model.config.max_position_embeddings // 2]
    length = min(prompt.shape[1] + 24, model.config.max_position_embeddings)
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_length=length, do_sample=False)
    save_file({"logits": logits, "generated": generated}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
