"""
TransformerLens 4 on a model of this family:

    bridge = load_bridge(model, tokenizer)
    logits, cache = bridge.run_with_cache("def main():")
    cache["blocks.0.attn.hook_pattern"]

A norm that a variant lacks is an identity under its usual name, so that the residual stream's hooks are where they
are in other models; on the Pythia backbone, whose residual is parallel, there is no `hook_resid_mid`.
"""

from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    ParallelBlockBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import PreTrainedModel


class LNFreeArchitectureAdapter(ArchitectureAdapter):
    """Where TransformerLens finds the parts of a model."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cfg.final_rms = self.cfg.gated_mlp = self.cfg.attn_only = self.cfg.default_prepend_bos = False

    def prepare_model(self, hf_model: PreTrainedModel):
        """Maps the parts, some of which a model has or not: its own configuration does not reach `__init__`."""
        config = hf_model.config
        self.cfg.normalization_type = "LN" if config.norm_type == "layernorm" else None
        self.cfg.positional_embedding_type = "standard" if config.position_embedding_type == "learned" else "rotary"
        self.cfg.parallel_attn_mlp = config.parallel_residual

        def norm(name: str, norm_type: str) -> GeneralizedComponent:
            if norm_type == "none":
                return GeneralizedComponent(name=name, config=self.cfg)
            return NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

        attention: dict[str, GeneralizedComponent] = {letter: LinearBridge(name=f"{letter}_proj") for letter in "qkvo"}
        mlp: dict[str, GeneralizedComponent] = {
            "in": LinearBridge(name="up_proj"),
            "out": LinearBridge(name="down_proj"),
        }
        block_class = ParallelBlockBridge if config.parallel_residual else BlockBridge
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "blocks": block_class(
                name="model.layers",
                config=self.cfg,
                submodules={
                    "ln1": norm("input_layernorm", config.norm_type),
                    "attn": AttentionBridge(name="self_attn", config=self.cfg, submodules=attention),
                    "ln2": norm("post_attention_layernorm", config.norm_type),
                    "mlp": MLPBridge(name="mlp", config=self.cfg, submodules=mlp),
                },
            ),
            "ln_final": norm("model.norm", config.final_norm_type),
            "unembed": UnembeddingBridge(name="lm_head"),
        }
        if config.position_embedding_type == "learned":
            self.component_mapping["pos_embed"] = PosEmbedBridge(name="model.embed_positions")


def load_bridge(model: PreTrainedModel, tokenizer=None) -> TransformerBridge:
    """
    A bridge of TransformerLens around a model, which is changed in place: its modules get hooks, and its attention
    becomes eager, without which there is no `hook_pattern`.

    Args:
        model: `LNFreeForCausalLM`, from this package or from the code that a checkpoint carries.
        tokenizer: for prompts given as text.
    """
    ArchitectureAdapterFactory.register_adapter("LNFreeForCausalLM", LNFreeArchitectureAdapter)
    model.set_attn_implementation("eager")
    return build_bridge_from_module(model, "LNFreeForCausalLM", hf_config=model.config, tokenizer=tokenizer)
