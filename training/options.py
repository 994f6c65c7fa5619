"""The options that both stages of training share."""

from dataclasses import dataclass

from data.prompts import STYLES
from hub.device import DEVICE_HELP, DTYPES
from hub.options import MICRO_BASE, option


@dataclass
class TrainOptions:
    """The options that both training commands have."""

    model: str = option(str(MICRO_BASE), "model folder to start from")
    data: str = option("", "training data")
    out: str = option("", "run folder")
    resume: bool = option(False, "go on from the run folder's checkpoint")
    overwrite: bool = option(False, "replace a run that the folder holds")
    skip_bad_lines: bool = option(False, "leave bad records out, say how many they are, and go on")
    prompt_style: str = option("direct", "how a question is asked", choices=STYLES)
    epochs: int = option(1, "passes over the data", low=1)
    max_steps: int | None = option(None, "stop after so many optimiser steps", low=1)
    learning_rate: float = option(1e-5, "peak learning rate", low=0.0)
    weight_decay: float = option(0.0, "weight decay of AdamW", low=0.0)
    beta1: float = option(0.9, "decay of AdamW's first moment", low=0.0, high=0.999999)
    beta2: float = option(0.999, "decay of AdamW's second moment", low=0.0, high=0.999999)
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to this norm", low=1e-6)
    pack_tokens: int = option(
        4096, "tokens of one forward pass; changes memory, not results (but for rounding)", low=1
    )
    save_every: int = option(20, "steps between checkpoints; 0 is at the end only", low=0)
    keep: int = option(1, "checkpoints to keep, the last ones; 0 writes none", low=0)
    eval_every: int = option(0, "steps between validations, the best is kept; 0 is never", low=0)
    eval_data: str = option("", "questions with answers for validation")
    eval_new_tokens: int = option(256, "response length limit in validation", low=1)
    seed: int = option(0, "seed of the data order and of sampling", low=0)
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option(
        "auto", "of the weights in forward passes; auto: bfloat16 on a GPU", choices=DTYPES
    )
    states_on: str = option(
        "auto",
        "where a single GPU in bfloat16 keeps the optimiser's states; auto: where they fit",
        choices=("auto", "device", "host"),
    )
    checkpointing: str = option(
        "auto",
        "compute each layer anew in the backward pass, which saves memory; "
        "auto: on, but for models as small as the micro one",
        choices=("auto", "on", "off"),
    )
    plan: bool = option(False, "say what a step takes of each GPU (in a minute or a few), and stop")
    gpus: int | None = option(None, "--plan: of so many; None: as many as torchrun starts", low=1)
    gpu_gib: float | None = option(
        None, "memory of a GPU in GiB; None: that of this machine's, or 80", low=1.0
    )


def disk_needed(options: TrainOptions, in_checkpoint: int, in_model: int) -> int:
    """Returns the bytes that a run's checkpoints and models take on the disk at most, from those of
    one each. While a new one is written, those before are still there."""
    checkpoints, models = options.keep + 1, 2
    # With --save-every 0 a new run writes once, at its end.
    if options.save_every == 0 and not options.resume:
        checkpoints, models = 1, 1
    if options.keep == 0:
        checkpoints = 0
    if options.eval_every:
        models += 2  # best/
    return checkpoints * in_checkpoint + models * in_model
