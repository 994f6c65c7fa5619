"""Linear maps on a CPU with the weight kept in oneDNN's own blocked layout.

Decoding is many thin products: as many rows as there are sequences. torch sends float32 ones to MKL and hands bfloat16
ones to oneDNN with the weight as it lies; a weight that was blocked once is read as fast as memory allows. Measured on
2 cores of an AMD EPYC (Zen 4), [B, 896] x [896, 4864], GB/s of weights at B = 1 / 16 / 128: float32 18 / 12 / 3.0 before
and 47 / 35 / 7.4 blocked; bfloat16 27 / 20 / 6.0 before and 48 / 33 / 7.2 blocked (a copy moves 46).
"""
import copy

import torch
from torch import Tensor, nn

ROWS = 16  # that the layout is chosen for; it serves any number
SMALLEST = 2**17  # elements; a call takes 12 us where F.linear takes 3, which small weights do not earn back


def can_pack(weight: Tensor) -> bool:
    """Whether it is worth while, and this torch and this processor have the blocked product."""
    return (weight.numel() >= SMALLEST and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (weight.dtype == torch.float32
                 or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class PackedLinear(nn.Module):
    """x -> x weight^T + bias with the weight and bias of `owner`, without gradients.

    Follows a weight that is being trained: it is packed again once it has changed. `release` gives up the owner's
    weight, for models that are only sampled from.
    """

    def __init__(self, owner: nn.Module, *, release: bool):
        super().__init__()
        self.owner, self.stamp = owner, None
        self.pack()
        if release and isinstance(owner, nn.Linear):  # an embedding is still needed
            owner.weight = None

    def pack(self) -> None:
        weight = self.owner.weight
        if weight is not None and self.stamp != (stamp := (weight.data_ptr(), weight._version)):
            self.stamp, self.packed = stamp, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        self.pack()
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, getattr(self.owner, "bias", None), "none", [], "")


def packed_twin(module: nn.Module, *, release: bool) -> nn.Module:
    """The module with its linear maps packed where that helps; everything else is shared with it."""
    twin = copy.copy(module)
    twin._modules = {name: packed_twin(child, release=release) if not isinstance(child, nn.Linear) else
                     PackedLinear(child, release=release) if can_pack(child.weight) else child
                     for name, child in module._modules.items() if child is not None}
    return twin
