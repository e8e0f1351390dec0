# Copyright 2026 The LNFree Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What is done with names of variants outside of the models: order, folders, counterparts. Not on the Hub."""

from dataclasses import fields

from .configuration_lnfree import (
    ATTENTION_PROJECTIONS,
    BACKBONES,
    DESIGN_FIELDS,
    MLP_PROJECTIONS,
    LNFreeConfig,
    read_variant,
    write_variant,
)


# the paper's four in its order; ReLU is compared with GELU where the norms are alike
PAPER_VARIANTS = tuple(write_variant(norm, act, "", "", "") for norm in ("LN", "") for act in ("G", "R"))
# what changes are against
BASELINE = PAPER_VARIANTS[0]
# what a name says of a configuration
NAMED_FIELDS = DESIGN_FIELDS | {
    *("norm_type", "final_norm_type", "norm_alpha_init", "hidden_act", "negative_slope", "slope_sharing"),
    "parallel_residual",
}


def variant_order(variant: str) -> tuple[int, str]:
    """A sort key: the paper's variants in its order, then all others by name."""
    return (PAPER_VARIANTS.index(variant), "") if variant in PAPER_VARIANTS else (len(PAPER_VARIANTS), variant)


def variant_slug(variant: str) -> str:
    """The variant as folders and repositories write it: `sm-ln-g`, `sm-r-op`."""
    return variant.lower().replace("+", "-").replace("@", "-")


def rename_variant(variant: str, **words: str) -> str:
    """The name with other words: `rename_variant("SM+R@OP", act="G")` is `SM+G@OP`. Raises ValueError for no name."""
    return write_variant(**{**read_variant(variant), **words})


def as_variant(config: LNFreeConfig, variant: str) -> LNFreeConfig:
    """The configuration of another variant of the same sizes and backbone."""
    same = {f.name: vars(config)[f.name] for f in fields(config) if f.name not in NAMED_FIELDS}
    same |= BACKBONES.get(config.backbone, {"parallel_residual": config.parallel_residual})
    # a matrix that the other MLP does not have has no bias there
    there = {*ATTENTION_PROJECTIONS, *MLP_PROJECTIONS[same.get("mlp_type", "two_layer")]}
    same["biased_projections"] = [name for name in config.biased_projections if name in there]
    return type(config).from_variant(variant, **same)
