"""
Loads an exported model as a stranger would, in a process that does not know this project:

    python -I load_check.py EXPORT_DIR INPUTS.safetensors OUTPUTS.safetensors

Writes the logits of `input_ids` and a greedy continuation of `prompt`, and fails unless the code came out of the
export itself.
"""

import sys

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
    generated = model.generate(given["prompt"], max_new_tokens=24, do_sample=False)
    save_file({"logits": logits, "generated": generated}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
