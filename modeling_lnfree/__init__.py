"""LNFree: GPT language models without LayerNorm, and exact attention entropy of any Hub model (arXiv 2410.09637)."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .attribution import attribute_logits, logit_lens
from .configuration_lnfree import LNFreeConfig
from .cpu import use_fast_cpu
from .entropy_callback import AttentionEntropyCallback
from .entropy_regularization import EntropyRegularizationMixin, EntropyRegularizer
from .fused_loss import use_fused_loss
from .measurement import Measurement, measure
from .metrics.attention_entropy.entropy import compute_attention_entropy
from .metrics.attention_entropy.recorder import record_attention_entropy
from .modeling_lnfree import (
    LNFreeForCausalLM,
    LNFreeForSequenceClassification,
    LNFreeForTokenClassification,
    LNFreeModel,
    LNFreePreTrainedModel,
)
from .optimization import build_optimizer, get_parameter_groups
from .patching import activation_patching, attribution_patching
from .residual_stream import record_residual_stream


# Where this is imported, the Auto classes know the model type and no remote code is needed.
AutoConfig.register("lnfree", LNFreeConfig)
AutoModel.register(LNFreeConfig, LNFreeModel)
AutoModelForCausalLM.register(LNFreeConfig, LNFreeForCausalLM)
AutoModelForSequenceClassification.register(LNFreeConfig, LNFreeForSequenceClassification)
AutoModelForTokenClassification.register(LNFreeConfig, LNFreeForTokenClassification)

# `save_pretrained` and `push_to_hub` carry the model's code along, for those who have no package.
LNFreeConfig.register_for_auto_class()
LNFreeModel.register_for_auto_class("AutoModel")
LNFreeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LNFreeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LNFreeForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")

__all__ = [
    "AttentionEntropyCallback",
    "EntropyRegularizationMixin",
    "EntropyRegularizer",
    "LNFreeConfig",
    "LNFreeForCausalLM",
    "LNFreeForSequenceClassification",
    "LNFreeForTokenClassification",
    "LNFreeModel",
    "LNFreePreTrainedModel",
    "Measurement",
    "activation_patching",
    "attribute_logits",
    "attribution_patching",
    "build_optimizer",
    "compute_attention_entropy",
    "get_parameter_groups",
    "logit_lens",
    "measure",
    "record_attention_entropy",
    "record_residual_stream",
    "use_fast_cpu",
    "use_fused_loss",
]
