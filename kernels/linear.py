"""Linear maps for sampling on a CPU: F.linear is the definition; here is the same, faster.

To decode is to multiply a few rows, one per sequence, by every weight. oneDNN reads a weight faster
that was rearranged into blocks once: 1.8 times the tokens per second for 16 sequences at 0.5B, and
nothing for the micro model, whose weights are left alone (docs/log.md).
"""

import copy

import torch
from torch import Tensor, nn

ROWS = 16  # for which the blocks are chosen; they serve any number
SMALLEST = 2**17  # elements: a call takes 12 us instead of 3, which small weights do not earn back


def gains_by_blocks(weight: Tensor) -> bool:
    """Returns whether a weight is large enough, and whether torch and the processor can do it."""
    if weight.numel() < SMALLEST or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:  # it takes more than AVX2
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and weight.dtype == torch.float32


class BlockedLinear(nn.Module):
    """x -> x weight^T + bias, without gradients, for the weight and the bias of `owner`."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.owner, self.stamp = owner, None
        self.rearrange()

    def rearrange(self) -> None:
        """Follows the weight: an optimiser writes in place, which raises its _version, and
        load_state_dict may put another tensor there, at another address."""
        weight = self.owner.weight
        if weight is not None and self.stamp != (weight.data_ptr(), weight._version):
            self.stamp = (weight.data_ptr(), weight._version)
            self.blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        self.rearrange()
        bias = getattr(self.owner, "bias", None)  # an embedding has none
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, bias, "none", [], "")


def fast_linears(module: nn.Module, *, release: bool = False) -> nn.Module:
    """Returns a twin that shares all with the module, but whose large linear maps are blocked.
    `release` takes their weights away from the module, so that memory holds them once."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            twin._modules[name] = fast_linears(child, release=release)
        elif gains_by_blocks(child.weight):
            twin._modules[name] = BlockedLinear(child)
            if release:
                child.weight = None
    # A tied head is no linear map in the tree, but the embedding, which stays.
    tied = hasattr(module, "head_weight") and not hasattr(module, "lm_head")
    if tied and gains_by_blocks(module.head_weight):
        twin.lm_head = BlockedLinear(module.model.embed_tokens)
    return twin
