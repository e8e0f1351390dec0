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
"""
Faster training and inference on a CPU, for LNFree models and any others: `use_fast_cpu(model)`.

Two things, of which the second changes results only by rounding: a cross-entropy that keeps less and passes over the
logits fewer times, and products by oneDNN where torch's default, MKL, leaves half of the processor unused.
"""

from types import MethodType
from typing import TypeVar

import torch
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula
from transformers import Conv1D, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.import_utils import is_tracing


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def mkl_leaves_half_unused() -> bool:
    """
    Whether torch multiplies by MKL on an AMD processor with AVX-512: MKL works with half of its vectors there, and
    oneDNN, which torch has too, with all. Older versions of torch do not tell the processor: False.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    processor: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return processor.get("avx512_f", False) and "AMD" in processor.get("cpu_name", "")


# Not beside an accelerator, where the model will be: copies by `nn.DataParallel` would share the first one's method.
USE_ONEDNN = mkl_leaves_half_unused() and not torch.accelerator.is_available()
# the number of multiplications above which a call of oneDNN pays off
ONEDNN_SIZE = 2**21


def use_fast_cpu(model: ModuleT) -> ModuleT:
    """
    Makes `model` compute its linear layers (`nn.Linear` and transformers' `Conv1D`) by oneDNN, where that is the
    faster library on this machine, and the loss of a causal language model by `causal_lm_loss`. Layers keep their type
    and their pickles; a copy has what its model has; what another tool has put in place of a forward pass or of a loss
    stays. Doing it twice is doing it once.

    Returns:
        The same model.
    """
    if USE_ONEDNN:
        for layer in model.modules():
            fast = FAST_LAYERS.get(type(layer))
            if fast is not None and "forward" not in vars(layer):
                layer.forward = MethodType(fast.forward, layer)
    if isinstance(model, PreTrainedModel) and model.can_generate():
        # the property `loss_function` warns where a class, as GPT-2's, names no loss and gets this one
        untouched = not hasattr(model, "_loss_function")
        if untouched and LOSS_MAPPING.get(model.loss_type or "ForCausalLM") is ForCausalLMLoss:
            model.loss_function = causal_lm_loss
    return model


# The operation that torch has for it is private, the only one with which a program reaches oneDNN's products; it has
# no derivatives, and torch.compile takes it with constant weights only.
@torch.library.custom_op("lnfree::linear", mutates_args=(), device_types="cpu")
def onednn_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`nn.functional.linear` of matrices, `(N, in)` and `(out, in)`, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


@onednn_linear.register_fake
def _(states, weight, bias):
    return states.new_empty((len(states), len(weight)))


def _setup_context(ctx, inputs, output):
    needs_states, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(inputs[0] if needs_weight else None, inputs[1] if needs_states else None)


def _backward(ctx, grads):  # (N, out)
    states, weight = ctx.saved_tensors
    grad_states = grad_weight = grad_bias = None
    if weight is not None:
        grad_states = onednn_linear(grads, weight.t(), None)
    if states is not None:
        # oneDNN copies a first factor that is transposed: the gradients, or the states and then the result
        if grads.numel() < states.numel() + grads.shape[1] * states.shape[1]:
            grad_weight = onednn_linear(grads.t(), states.t(), None)
        else:
            grad_weight = onednn_linear(states.t(), grads.t(), None).t().contiguous()
    if ctx.needs_input_grad[2]:
        grad_bias = grads.sum(0)
    return grad_states, grad_weight, grad_bias


onednn_linear.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lnfree.linear)
def _flops(states_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * states_shape[0] * states_shape[1] * weight_shape[0]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is dense, float32, on the CPU, of no subclass, and has no tangent (of forward-mode derivatives)."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and (torch.compiler.is_compiling() or unpack_dual(tensor).tangent is None)
    )


def takes_onednn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `nn.functional.linear` of these takes less time by oneDNN, and means the same."""
    # an exported graph is for any machine, and sizes would be fixed in it
    if not states.is_cpu or torch.jit.is_tracing() or torch.compiler.is_exporting() or not states.numel():
        return False
    # reading a weight takes the time of 8 multiplications
    size = max(states.numel(), 8 * weight.shape[-1]) * weight.shape[0]
    return (
        size > ONEDNN_SIZE
        and bool(torch.backends.mkldnn.enabled)
        and all(is_plain(tensor) for tensor in (states, weight, bias) if tensor is not None)
        and states.shape[-1] == weight.shape[-1]
        # of the transforms of torch.func no public function tells, and this operation has no rules for them
        and not (torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active())
    )


def _by_onednn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    output = torch.ops.lnfree.linear(states.reshape(-1, states.shape[-1]), weight, bias)
    return output.view(*states.shape[:-1], -1)


# A pickle holds a bound method by its name: read anywhere, it is the forward pass of the layer's own class.
class FastLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight  # read once: a parametrization computes it
        if takes_onednn(input, weight, self.bias):
            return _by_onednn(input, weight, self.bias)
        return nn.functional.linear(input, weight, self.bias)


class FastConv1D(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if takes_onednn(x, weight.t(), self.bias):
            return _by_onednn(x, weight.t(), self.bias)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


FAST_LAYERS = {nn.Linear: FastLinear, Conv1D: FastConv1D}


class CrossEntropySum(torch.autograd.Function):
    """
    Sum of the cross-entropies, in nats, of `logits` `(N, vocab_size)` and `labels` `(N, 1)` where `kept` `(N, 1)`. In
    float32 or the logits' own type, whichever is the wider. torch's own keeps log-probabilities and makes two
    gradients of their size: this one goes through a few rows at a time, while the processor has them at hand, keeps
    nothing but the logits themselves, and makes one, softmax - one_hot.
    """

    CHUNK = 2**20  # entries: 4 MiB in float32
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: torch.Tensor, labels: torch.Tensor, kept: torch.Tensor):
        wide = torch.promote_types(logits.dtype, torch.float32)
        parts = CrossEntropySum.split(logits, labels)
        picked = [chunk.log_softmax(-1, dtype=wide).gather(-1, label) for chunk, label in parts]
        return -torch.cat(picked).where(kept, 0).sum()

    @staticmethod
    def split(logits: torch.Tensor, *others: torch.Tensor):
        """The tensors' rows, `CHUNK` entries of the logits at a time."""
        rows = max(1, CrossEntropySum.CHUNK // logits.shape[-1])
        return zip(*(states.split(rows) for states in (logits, *others)), strict=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        logits, labels, kept = ctx.saved_tensors
        scale = grad_output * kept  # (N, 1)
        # the gradient of a gradient is wanted, or torch.func is at work: operations that autograd follows
        if torch.is_grad_enabled():
            probabilities = logits.softmax(-1, dtype=scale.dtype)
            return (probabilities * scale).scatter_add(-1, labels, -scale).to(logits.dtype), None, None
        grad_logits = torch.empty_like(logits)
        for chunk, grad, label, factor in CrossEntropySum.split(logits, grad_logits, labels, scale):
            grad.copy_(chunk.softmax(-1, dtype=scale.dtype).mul_(factor).scatter_add_(-1, label, -factor))
        return grad_logits, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        logits, labels, kept = ctx.saved_tensors
        wide = torch.promote_types(logits.dtype, torch.float32)
        mean = (logits.softmax(-1, dtype=wide) * tangent).sum(-1, keepdim=True)
        return (mean - tangent.gather(-1, labels)).where(kept, 0).sum()


def next_tokens(
    rows: torch.Tensor, labels: torch.Tensor, shift_labels: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each of the rows `(N, ...)` of all sequences' tokens predicts, and whether it counts, both `(N, 1)`: the token
    behind it in `labels`, or its own entry of `shift_labels`; 0 where that is `ignore_index`.

    Raises:
        ValueError: for another number of labels than of rows.
    """
    targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    if targets.numel() != len(rows):
        raise ValueError(f"labels must have one entry for each of the {len(rows)} tokens, got {targets.numel()}")
    targets = targets.reshape(-1, 1).to(rows.device)
    kept = targets != ignore_index
    return targets.where(kept, 0), kept


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    transformers' `ForCausalLMLoss`, by `CrossEntropySum` on the CPU; the logits must stay as they are until the
    backward pass. Where kernels are fused (torch.compile, a GPU's log-softmax), and for other kinds of tensors
    (DTensor), it is transformers' own.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, seq_len, vocab_size)`).
        labels (`torch.LongTensor` of shape `(batch_size, seq_len)`): shifted here, unless `shift_labels` are given.

    Returns:
        The mean in nats over the tokens that are not `ignore_index`; or their sum over `num_items_in_batch`.

    Raises:
        ValueError: for another number of labels than of tokens.
    """
    if logits.device.type != "cpu" or type(logits) is not torch.Tensor or is_tracing(logits):
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs
        )
    logits = logits.view(-1, vocab_size)
    targets, kept = next_tokens(logits, labels, shift_labels, ignore_index)
    loss = CrossEntropySum.apply(logits, targets, kept)
    return loss / (kept.sum() if num_items_in_batch is None else num_items_in_batch)
