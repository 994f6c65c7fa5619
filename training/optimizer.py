"""The model as training loads it, the optimiser, and one step of it."""
import contextlib
import os

import torch
from torch import nn

from hub.errors import InputError
from hub.options import limit_threads, pick_device
from model import Qwen2_5_VL
from training.run import TrainOptions



def load_for_training(options: TrainOptions) -> Qwen2_5_VL:
    """The model with float32 master weights (an update of 3e-6 is lost in bfloat16) and the vision tower frozen."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("training on several processes is not supported yet: run without torchrun")
    model = Qwen2_5_VL.from_pretrained(options.model, device=pick_device(options.device))
    limit_threads(model.config)
    if model.config.vision is not None:
        model.visual.requires_grad_(False)
    return model


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(options.beta1, options.beta2),
                             weight_decay=options.weight_decay)


def autocast(model: Qwen2_5_VL, options: TrainOptions):
    """The forward pass's precision: the one place that decides it."""
    device = model.head_weight.device.type
    if options.dtype == "float32" or options.dtype == "auto" and device == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float,
                   max_grad_norm: float) -> float:
    """One step at the given rate, the gradient clipped; returns its norm before that. Raises InputError if that is not
    finite, before any weight is changed."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_grad_norm)
    if not norm.isfinite():
        raise InputError(f"the gradient's norm is {norm.item()}: training has diverged; try a lower --learning-rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()
