"""The model as training loads it, the precision of its forward pass, and one step of AdamW."""

import contextlib
import os

import torch
from torch import nn

from hub.device import limit_threads, pick_device
from hub.errors import InputError
from model import Qwen2_5_VL
from training.run import TrainOptions


def load_for_training(options: TrainOptions) -> Qwen2_5_VL:
    """Returns the starting model with its vision tower frozen (training is on text only).

    The weights are float32 whatever the file holds: bfloat16 has 8 bits of precision, so to a
    weight of 1 it can add nothing below 0.004, and a learning rate of 3e-6 would be lost.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("training on several processes is not supported yet: run without torchrun")
    model = Qwen2_5_VL.from_pretrained(options.model, device=pick_device(options.device))
    limit_threads(model.config)
    if model.config.vision is not None:
        model.visual.requires_grad_(False)
    return model


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """Returns AdamW over the weights that are trained."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
    )


def autocast(model: Qwen2_5_VL, options: TrainOptions) -> contextlib.AbstractContextManager:
    """Returns the context of a forward pass: bfloat16 products on a GPU, or where --dtype asks for
    them, and plain float32 elsewhere. No other place decides the precision."""
    device = model.head_weight.device.type
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float
) -> float:
    """Makes one optimiser step and clears the gradient. Returns its norm before clipping.

    Where no backward pass has run (in GRPO without a KL term: every advantage is 0) no weight has a
    gradient. AdamW passes over such weights, so neither weights nor moments change, nor does weight
    decay act; the norm is 0.0. A gradient of zeros is something else: the moments decay, and the
    weights still move by what is left of them.

    Raises InputError if the norm is not finite, before any weight is changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # One norm over all weights together: clipping shortens the gradient and keeps its direction.
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if not norm.isfinite():
        raise InputError(
            f"the gradient's norm is {norm.item()}: training has diverged; "
            "try a lower --learning-rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()
