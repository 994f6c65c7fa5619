"""Two linear maps that are not torch's own: the head's, and those of sampling on a CPU.

The head's logits are float32, whatever the weights are: rounded to bfloat16 they would be off by up
to 0.06 where they are around 16. Sampler and trainer both take them from `logits_float32`.

To decode is to multiply a few rows, one per sequence, by every weight. On a CPU oneDNN reads a
weight faster that was rearranged into blocks once: 1.8 times the tokens per second for 16 sequences
at 0.5B, and nothing for the micro model, whose weights are left alone (docs/log.md). F.linear is
the definition.
"""

import copy

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.triton_or_none import on_gpu

ROWS = 16  # for which the blocks are chosen; they serve any number
SMALLEST = 2**17  # elements: a call takes 12 us instead of 3, which small weights do not earn back


# --- The head ---


class Float32Logits(torch.autograd.Function):
    """hidden [N, C], weight [V, C], both in 16 bits -> hidden @ weight.T [N, V] in float32.

    A product of two 16-bit numbers is exact in float32, so only the sum is rounded. The gradients
    are in 16 bits, as those of any other product of the model.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        if on_gpu(hidden):
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        upstream = upstream.to(weight.dtype)
        d_hidden = upstream @ weight if ctx.needs_input_grad[0] else None
        d_weight = upstream.T @ hidden if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight


def logits_float32(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns the logits [..., V] of hidden [..., C] and the head's weight [V, C], in float32.

    (float64 stays.) hidden and weight have one dtype.
    """
    if weight.dtype in (torch.float32, torch.float64):
        return hidden @ weight.T
    logits = Float32Logits.apply(hidden.reshape(-1, hidden.shape[-1]), weight)
    return logits.view(*hidden.shape[:-1], len(weight))


# --- On a CPU ---


def gains_by_blocks(weight: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a weight is large enough, and whether torch and the processor can multiply
    it in this dtype."""
    if weight.numel() < SMALLEST or weight.device.type != "cpu" or on_gpu(weight):
        return False
    if dtype == torch.bfloat16:  # it takes more than AVX2
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and dtype == torch.float32


class BlockedLinear(nn.Module):
    """x -> x weight^T + bias, without gradients, for the weight and the bias of `owner`.

    It computes in `dtype`, and its result is in that.
    """

    def __init__(self, owner: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.owner, self.dtype, self.stamp = owner, dtype, None
        self.rearrange()

    def rearrange(self) -> None:
        """Follows the weight: an optimiser writes in place, which raises its _version, and
        load_state_dict may put another tensor there, at another address."""
        weight = self.owner.weight
        if weight is not None and self.stamp != (weight.data_ptr(), weight._version):
            self.stamp = (weight.data_ptr(), weight._version)
            weight = weight.detach().to(self.dtype)
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        bias = getattr(self.owner, "bias", None)  # an embedding has none
        self.rearrange()
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, bias, "none", [], "")


def fast_linears(module: nn.Module, *, release: bool = False) -> nn.Module:
    """Returns a twin that shares all with the module, but whose large linear maps are blocked.
    `release` takes their weights away from the module, so that memory holds them once.

    The head's logits are float32, as in `logits_float32`; but where the module is only sampled from
    (`release`), and no trainer's log-probs are to be met, they are in the weights' dtype: in
    bfloat16 that takes half the time.
    """
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            twin._modules[name] = fast_linears(child, release=release)
            continue
        exact = name == "lm_head" and not release
        dtype = torch.float32 if exact else child.weight.dtype
        if gains_by_blocks(child.weight, dtype):
            twin._modules[name] = BlockedLinear(child, dtype)
            if release:
                child.weight = None
    # A tied head is no linear map in the tree, but the embedding, which stays.
    if hasattr(module, "head_weight") and not hasattr(module, "lm_head"):
        dtype = module.head_weight.dtype if release else torch.float32
        if gains_by_blocks(module.head_weight, dtype):
            twin.lm_head = BlockedLinear(module.model.embed_tokens, dtype)
    return twin
