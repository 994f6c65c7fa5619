"""Several processes, one per GPU, as torchrun starts them: who computes what, and what they share.

    torchrun --nproc_per_node 8 grpo.py --recipe paper ...

Every rank has all of the data, knows the whole batch, and runs its share of the packs. Weights,
gradients and moments are cut into as many shards as there are ranks (FSDP2: ZeRO stage 3, arXiv
1910.02054): a layer is put together just before it runs, and its gradient is summed over the ranks
and cut up again behind it. On one process, without torchrun, all functions here do next to nothing.

The two rules that everything else follows:

1. A forward or backward pass is a collective: all ranks must run equally many, in the same order.
   `deal` sees to it. A rank with nothing left runs a pack without targets, whose gradient is zero.
2. Gradients are summed, not averaged: each rank's loss is its part of the whole batch's loss.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hub.device import pick_device
from hub.errors import InputError
from hub.ranks import local_rank, rank, world_size
from model import Qwen2_5_VL

# A rank that has sampled its share waits for the others, whose responses may be longer.
PATIENCE = timedelta(hours=2)


# --- The processes ---


def is_first() -> bool:
    """Returns whether this process is the one that writes files and shows progress."""
    return rank() == 0


def training_device(name: str) -> torch.device:
    """Returns the device of --device for this process: of several, each has a GPU of its own.

    Raises InputError where there are fewer GPUs than processes, or where all were to share one.
    """
    if world_size() > 1 and name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {name}: each of several processes has a GPU of its own")
    if name in ("auto", "cuda") and world_size() > 1 and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank() >= count:
            raise InputError(f"torchrun started more processes than there are GPUs: {count}")
        name = f"cuda:{local_rank()}"
    return pick_device(name)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Connects the ranks, for training on devices like this one.

    Raises InputError where torchrun has not started them, and where a collective has failed since
    another rank has gone. (On GPUs a rank may wait in one instead: then torchrun ends it after 30
    seconds, and torchrun's report says why.)
    """
    if world_size() == 1:
        yield
        return
    # Objects and single numbers travel by gloo, between the hosts' memories.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        line = f"WORLD_SIZE is {world_size()}, but the processes cannot be connected: {reason}; "
        raise InputError(line + "start them with torchrun, or unset WORLD_SIZE") from None
    try:
        yield
    except RuntimeError as error:
        # An error of this rank's own is a bug, and keeps its traceback.
        if not lost_another(error):
            raise
        what = "lost another process of this run; --resume goes on from the last checkpoint"
        raise InputError(what) from None
    # Only after a success. After a failure of this rank alone the others are not here, and NCCL
    # would wait for them.
    dist.destroy_process_group()


def lost_another(error: RuntimeError) -> bool:
    """Returns whether a collective has failed since another process has ended."""
    # gloo raises a plain RuntimeError, with what the operating system has said of the connection.
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def barrier() -> None:
    """Waits until all ranks are here, by gloo: no GPU is involved."""
    total([0.0])


# --- What they tell each other ---


def total(values: list[float]) -> list[float]:
    """Returns the sums of the ranks' values."""
    if world_size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def any_rank(flag: bool) -> bool:
    """Returns whether the flag is set on any rank."""
    return total([float(flag)])[0] > 0


def exchange(mine: dict) -> dict:
    """Returns all ranks' entries together, whose keys are different, in the order of the ranks."""
    if world_size() == 1:
        return mine
    parts: list[dict] = [{}] * world_size()
    dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def tensors_of_first(make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns what make() returns on the first process, on all of them, which all must call it.

    Where make() raises InputError, all raise it.
    """
    if world_size() == 1:
        return make()
    tensors, outline = {}, [None]
    if is_first():
        try:
            tensors = make()
            outline = [{name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}]
        except InputError as error:
            outline = [error]
    dist.broadcast_object_list(outline)
    if isinstance(outline[0], InputError):
        raise outline[0]
    for name, (shape, dtype) in outline[0].items():
        if not is_first():
            tensors[name] = torch.empty(shape, dtype=dtype)
        dist.broadcast(tensors[name], src=0)
    return tensors


def deal(items: Sequence, idle: object) -> list:
    """Returns this rank's share of the items (packs): every world_size-th, and `idle` in place of
    one where it has fewer than others, so that all ranks have equally many."""
    mine = list(items[rank() :: world_size()])
    most = -(-len(items) // world_size())
    return mine + [idle] * (most - len(mine))


# --- A model in shards ---


def make_mesh(device: torch.device) -> DeviceMesh:
    """Returns the ranks as torch's distributed tensors know them."""
    return init_device_mesh(device.type, (world_size(),))


def shard(model: Qwen2_5_VL, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Cuts a model (on the meta device) into shards that compute in `dtype`.

    A decoder layer is put together for its pass alone; embedding, norm and head, as the root's,
    from the forward pass to the end of the backward pass. The vision tower, which training never
    runs, is left as it is. Gradients are summed over the ranks in float32.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    tower = set() if model.visual is None else set(model.visual.parameters())
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=tower)
        # A division by the number of ranks, and its undoing, would cost bits.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def own_rows(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Returns a tensor that every rank has as one that is sharded, without sending anything."""
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def full(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor that may be sharded. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a tensor that may be sharded: the memory itself, no copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the whole of every weight, in `dtype`, one at a time.

    All ranks must go through it to its end. The shards are cast before they travel: in bfloat16
    half the bytes do.
    """
    if world_size() > 1:
        model.reshard()  # after a pass without gradients the root's weights are still whole
    for name, weight in model.named_parameters():
        yield name, full(weight.detach().to(dtype))


def gather(model: Qwen2_5_VL, dtype: torch.dtype) -> Qwen2_5_VL:
    """Returns the model to sample from. On one process that is the model itself.

    Of a model in shards it is a plain copy in `dtype`, without the vision tower (training is on
    text), that lives for one rollout: putting every layer together for every token would take far
    longer. All ranks must call it.
    """
    if world_size() == 1:
        return model
    with torch.device("meta"):
        copy = Qwen2_5_VL(replace(model.config, vision=None))
    ours = copy.state_dict()
    weights = {name: whole for name, whole in whole_weights(model, dtype) if name in ours}
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False).eval()
