"""
TransformerLens 4 on a model of this family, at hand or by TransformerLens' own call, once this is imported:

    bridge = load_bridge(model, tokenizer)
    bridge = TransformerBridge.boot_transformers("runs/first/model")
    logits, cache = bridge.run_with_cache("def main():")
    cache["blocks.0.attn.hook_pattern"]

A norm that a variant lacks is an identity under its usual name, so that the residual stream's hooks are where they
are in other models; on the Pythia backbone, whose residual is parallel, there is no `hook_resid_mid`. `hook_pattern`
is the softmax, clipped where it is, and `hook_z` what the output projection gets, behind gains and gates.

What a branch gives must be what is added to the stream, and a feed-forward layer have its two projections. So norms
that are not before the branches, residual gains, and `mlp_type` `"fused"` or `"none"` are refused.

`bridge.enable_compatibility_mode()` folds norms and centers weights, with equal log-probabilities. It leaves norms as
they are for designs with gates or clipping, does not center what is written to a stream that no norm reads at its end,
and raises RuntimeError for gates or clipping with biases of values.
"""

from importlib.metadata import entry_points

from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
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


ARCHITECTURE = "LNFreeForCausalLM"


class LNFreeArchitectureAdapter(ArchitectureAdapter):
    """Where TransformerLens finds the parts of a model."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cfg.attn_only = self.cfg.default_prepend_bos = False
        self.weight_processing_conversions = self._qkvo_weight_conversions(include_biases=True)

    def prepare_model(self, hf_model: PreTrainedModel):
        """Maps the parts, some of which a model has or not: its own configuration does not reach `__init__`."""
        config = hf_model.config
        _check(config)
        gated = config.per_layer_config[0].mlp_type == "gated"
        self.cfg.normalization_type = {"layernorm": "LN", "rmsnorm": "RMS"}.get(config.norm_type)
        self.cfg.final_rms, self.cfg.gated_mlp = config.final_norm_type == "rmsnorm", gated
        self.cfg.positional_embedding_type = "standard" if config.position_embedding_type == "learned" else "rotary"
        self.cfg.parallel_attn_mlp = config.parallel_residual
        # what is the same for all entries of the stream reaches the logits, if no norm takes it out at the end
        self.supports_center_writing_weights = config.norm_type != "layernorm" or config.final_norm_type == "layernorm"
        # weights that do not add up to 1 behind gates and clipping: biases of values cannot go into the output's, as
        # those of a norm would too; and a gate reads what the norm gives
        sums_to_one = all(
            layer.attention_gate_init is None and layer.softmax_clipping is None for layer in config.per_layer_config
        )
        self.supports_fold_ln = sums_to_one
        self.supports_compatibility_mode = sums_to_one or "v_proj" not in config.biased_projections

        def norm(name: str, norm_type: str) -> GeneralizedComponent:
            if norm_type not in ("layernorm", "rmsnorm"):
                return GeneralizedComponent(name=name, config=self.cfg)
            return NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

        attention: dict[str, GeneralizedComponent] = {letter: LinearBridge(name=f"{letter}_proj") for letter in "qkvo"}
        mlp: dict[str, GeneralizedComponent] = {
            "in": LinearBridge(name="up_proj"),
            "out": LinearBridge(name="down_proj"),
        }
        if gated:
            mlp["gate"] = LinearBridge(name="gate_proj")
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


def _check(config):
    """Raises ValueError for a design whose parts are not where TransformerLens looks for them."""
    for layer in config.per_layer_config:
        for field, value, taken in (
            ("norm_position", layer.norm_position, ("pre",)),
            ("residual_gains", layer.residual_gains, (None,)),
            ("mlp_type", layer.mlp_type, (config.per_layer_config[0].mlp_type,)),
            ("mlp_type", layer.mlp_type, ("two_layer", "gated")),
        ):
            if value not in taken:
                allowed = " or ".join(map(repr, taken))
                raise ValueError(f"TransformerLens cannot show {field}={value!r}, only {field}={allowed}")


def load_bridge(model: PreTrainedModel, tokenizer=None) -> TransformerBridge:
    """
    A bridge of TransformerLens around a model, which is changed in place: its modules get hooks, and its attention
    becomes eager, without which there is no `hook_pattern`.

    Args:
        model: `LNFreeForCausalLM`, from this package or from the code that a checkpoint carries.
        tokenizer: for prompts given as text.

    Raises:
        ValueError: for a design that TransformerLens cannot show, before anything is changed.
    """
    _check(model.config)
    model.set_attn_implementation("eager")
    return build_bridge_from_module(model, ARCHITECTURE, hf_config=model.config, tokenizer=tokenizer)


# `boot_transformers` looks here first, before it has asked for entry points
SUPPORTED_ARCHITECTURES[ARCHITECTURE] = LNFreeArchitectureAdapter
# of a project that is installed, the entry point registers it, and warns of one that is there
if not entry_points(group="transformer_lens.architectures", name=ARCHITECTURE):
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, LNFreeArchitectureAdapter)
