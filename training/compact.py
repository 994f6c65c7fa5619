"""Stand-in until the compact optimiser lands."""

import torch
from torch import Tensor


class CompactAdamW(torch.optim.Optimizer):
    pass


def off_the_grid(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor
