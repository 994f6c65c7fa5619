"""The model as training loads it, its optimiser, and one step of it.

One rule of precision: `--dtype` is that of the weights in every forward pass, the sampler's too.
There is no autocast. In float32 an AdamW updates the weights themselves. In bfloat16, which has 8
bits of precision (to a weight of 1 it can add nothing below 0.004, so a learning rate of 3e-6 would
be lost), a finer copy, the master, is updated, and the weights are what bfloat16 shows of it:

* one process: CompactAdamW, which keeps 8 more bits of each weight (training/compact.py);
* several: the shards are the masters, in float32, and FSDP2 casts them as it puts a layer together.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hub.config import Config
from hub.device import limit_threads
from hub.errors import InputError
from model import Qwen2_5_VL
from training import parallel
from training.compact import CompactAdamW, off_the_grid
from training.options import TrainOptions


class Diverged(InputError):
    """The gradient is not finite."""


def forward_dtype(options: TrainOptions) -> torch.dtype:
    """Returns the dtype of the weights in forward passes: auto is bfloat16 on a GPU."""
    name = options.dtype
    if name == "auto":
        name = "bfloat16" if parallel.training_device(options.device).type == "cuda" else "float32"
    return getattr(torch, name)


def load_for_training(options: TrainOptions, *, frozen: bool = False) -> Qwen2_5_VL:
    """Returns the starting model on this process's device, or this process's shards of it.

    The vision tower is frozen and stays on the host, as the folder has it: training is on text. A
    `frozen` model (the reference) has no gradients. Alone on a GPU it waits on the host, for
    `visiting`.
    """
    device, dtype = parallel.training_device(options.device), forward_dtype(options)
    config = Config.from_pretrained(options.model)
    limit_threads(config)
    with torch.device("meta"):  # names and shapes, without memory
        model = Qwen2_5_VL(config)
    model.requires_grad_(not frozen)
    if model.visual is not None:
        model.visual.requires_grad_(False)
    for layer in model.model.layers:
        layer.checkpointed = recomputes_layers(options, config)

    several = parallel.world_size() > 1
    if several:
        mesh = parallel.make_mesh(device)
        parallel.shard(model, mesh, dtype)

    def place(name: str, tensor: Tensor) -> Tensor:
        if name.startswith("visual."):
            return tensor
        if not several:
            return tensor.to(device="cpu" if frozen else device, dtype=dtype)
        if frozen:
            return parallel.own_rows(tensor.to(dtype), mesh)
        master = tensor.to(device).float()
        if dtype == tensor.dtype == torch.bfloat16 and not options.resume:
            seed = zlib.crc32(f"{options.seed}/{name}".encode())
            master = off_the_grid(master, torch.Generator(device).manual_seed(seed))
        return parallel.own_rows(master, mesh)

    model.load_weights(options.model, place)
    return model.eval()


def recomputes_layers(options: TrainOptions, config: Config) -> bool:
    """Returns whether the backward pass computes each layer anew (`DecoderLayer`).

    auto: for all but models as small as the micro one, whose activations fit anywhere. It costs one
    more forward pass of each layer.
    """
    if options.checkpointing == "auto":
        return not config.is_small
    return options.checkpointing == "on"


@contextmanager
def visiting(model: Qwen2_5_VL, device: torch.device) -> Iterator[None]:
    """Brings the weights of the reference to the device, and drops them there afterwards.

    One in shards is there already. It is only put back into shards: without a backward pass its
    embedding and head would stay whole.
    """
    if parallel.world_size() > 1:
        yield
        model.reshard()
        return
    home = {name: weight.data for name, weight in model.decoder_weights().items()}
    there = {name: tensor.to(device) for name, tensor in home.items()}
    model.load_state_dict(there, assign=True, strict=False)
    del there
    try:
        yield
    finally:
        model.load_state_dict(home, assign=True, strict=False)


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights that are trained, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def make_optimizer(model: Qwen2_5_VL, options: TrainOptions) -> torch.optim.Optimizer:
    """Returns AdamW over the weights that are trained, with all of its states made."""
    weights = list(trained_weights(model).values())
    settings = {
        "lr": options.learning_rate,
        "betas": (options.beta1, options.beta2),
        "weight_decay": options.weight_decay,
    }
    if weights[0].dtype == torch.bfloat16:
        states_on = torch.device("cpu") if options.states_on == "host" else None
        return CompactAdamW(weights, **settings, states_on=states_on, seed=options.seed)
    # fused: one pass over the weights. torch's default makes temporary tensors as large as all of
    # them on a GPU; on a CPU it passes over them once for each operation, 4 times as long in all.
    # Small models gain nothing by it.
    kind = weights[0].device.type
    fused = kind == "cuda" or (kind == "cpu" and not model.config.is_small)
    optimizer = torch.optim.AdamW(weights, **settings, fused=fused)
    # AdamW would make its states in its first step. A checkpoint is loaded into them before it.
    for weight in weights:
        optimizer.state[weight] = {
            "step": torch.zeros((), device=weight.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
    return optimizer


def named_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns all of the optimiser's states, as "NAME OF THE WEIGHT.KEY"."""
    states = {}
    for name, weight in trained_weights(model).items():
        for key, tensor in optimizer.state[weight].items():
            states[f"{name}.{key}"] = tensor
    return states


def optimizer_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float
) -> float:
    """Makes one optimiser step and clears the gradient. Returns its norm before clipping.

    Where no backward pass has run (in GRPO without a KL term: every advantage is 0) no weight has a
    gradient. AdamW passes over such weights, so neither weights nor moments change, nor does weight
    decay act; the norm is 0.0. A gradient of zeros is something else: the moments decay, and the
    weights still move by what is left of them.

    Raises Diverged if the norm is not finite, before any weight is changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # One norm over all weights together: clipping shortens the gradient and keeps its direction.
    if isinstance(optimizer, CompactAdamW):
        norm = optimizer.clip(max_grad_norm)
    else:
        norm = parallel.full(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if not norm.isfinite():
        raise Diverged(
            f"the gradient's norm is {norm.item()}: training has diverged; "
            "try a lower --learning-rate"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


def update_remedies(options: TrainOptions) -> list[str]:
    """Returns what would save most of an update's memory, the first two that are left."""
    remedies = []
    if options.checkpointing == "off":
        remedies.append("--checkpointing on")
    compact = parallel.world_size() == 1 and forward_dtype(options) == torch.bfloat16
    if compact and options.states_on != "host":
        remedies.append("--states-on host")
    # A row that is longer than a pack gets one of its own, so both must be short.
    return [*remedies, "more GPUs", "a lower --pack-tokens with shorter rows"][:2]
