"""
Which parts of a model write a token's logit: exact where there is no final norm, for then every logit is the sum of
what the embeddings, each head, each feed-forward layer and the biases write to the residual stream.

    .venv/bin/python scripts/logit_attribution.py MODEL_ID_OR_PATH "def main("

Such models are the `-noLNf` variants, and what `lnfree import` makes of the published GPT-2s without LayerNorm.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@torch.no_grad()
def attribute(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Args:
        model: an `LNFreeForCausalLM` without a final norm, in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(1, seq_len)`).

    Returns:
        For every component the logits that it writes, `(seq_len, vocab_size)`, and the model's logits, their sum.

    Raises:
        ValueError: for a model with a final norm, which mixes the components.
    """
    config = model.config
    final_norm_type = getattr(config, "final_norm_type", f"that of a {config.model_type}")
    if final_norm_type != "none":
        raise ValueError(f"attribution is exact without a final norm only, got final_norm_type={final_norm_type}")
    written = {}  # to the residual stream, (T, D) each

    def on_heads(layer: int):
        def hook(projection, args):
            # (T, H, d) and (D, H, d)
            states = args[0][0].unflatten(-1, (config.num_attention_heads, -1))
            weight = projection.weight.unflatten(-1, (config.num_attention_heads, -1))
            for head in range(config.num_attention_heads):
                written[f"layer {layer} head {head}"] = states[:, head] @ weight[:, head].T
            if projection.bias is not None:
                written[f"layer {layer} attention bias"] = projection.bias.expand(len(states), -1)

        return hook

    def on_output(name: str):
        return lambda module, args, output: written.__setitem__(name, output[0])

    body = model.model
    handles = [body.embedding_dropout.register_forward_hook(on_output("embeddings"))]
    for index, layer in enumerate(body.layers):
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(on_heads(index)))
        handles.append(layer.mlp.register_forward_hook(on_output(f"layer {index} feed-forward")))
    try:
        logits = model(input_ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return {name: model.lm_head(states) for name, states in written.items()}, logits


def main():
    """Prints what wrote the logit of the likeliest next token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_id", metavar="MODEL_ID_OR_PATH", help="the code that comes with it is run")
    parser.add_argument("text", metavar="TEXT", help="what the token follows")
    arguments = parser.parse_args()
    model_id, text = arguments.model_id, arguments.text
    try:
        model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
        parts, logits = attribute(model, tokenizer(text, return_tensors="pt")["input_ids"])
    except (OSError, ValueError) as error:
        sys.exit(f"logit_attribution: {model_id}: {' '.join(str(error).split())}")
    token = logits[-1].argmax().item()
    shares = {name: part[-1, token].item() for name, part in parts.items()}
    print(f"{tokenizer.decode([token])!r} after {text!r}: logit {logits[-1, token]:.4f}")
    for name, share in sorted(shares.items(), key=lambda item: -abs(item[1]))[:10]:
        print(f"{share:+10.4f}  {name}")
    print(f"{sum(shares.values()):+10.4f}  the sum of all {len(shares)}")


if __name__ == "__main__":
    main()
