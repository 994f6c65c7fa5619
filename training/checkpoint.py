"""Checkpoints: what a run needs to go on, in a folder that is either whole or not there.

    checkpoint/step-000120/     what torch.distributed.checkpoint (DCP) writes, a file per process
        .metadata               which tensor, or shard of one, lies where in them
        state.json              the number of steps, and the length of every file

One format for every number of processes: what N have written, M can read. In bfloat16 a single
process has another optimiser than several have; what the other one has written is converted.

`.metadata` is a pickle, which can run any code when it is read: go on from checkpoints of your own.
To share, there is the run's model/.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from hub.disk import put_in_place, sync
from hub.errors import InputError, read_json
from training.compact import chunks, join, split
from training.optimizer import named_states, trained_weights
from training.parallel import barrier, is_first, own_part, rank, world_size

State = dict[str, Tensor]  # each may be a plain tensor or a DTensor, in shards
Dtypes = dict[str, torch.dtype]  # of what an optimiser keeps of each weight, by key
Layout = dict[str, tuple[torch.Size, torch.dtype]]  # of each tensor its whole shape, and its dtype


def training_state(model: nn.Module, optimizer) -> State:
    """Returns the very tensors that training changes: weights and optimiser states, by name.

    The vision tower is frozen, and not among them.
    """
    weights = trained_weights(model)
    state = {f"weights.{name}": weight.detach() for name, weight in weights.items()}
    for name, tensor in named_states(model, optimizer).items():
        state[f"optimizer.{name}"] = tensor
    return state


def sizes(model: nn.Module, state: State) -> tuple[int, int]:
    """Returns the bytes that a checkpoint and model/ take on the disk, of all ranks together."""
    in_checkpoint = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    dtype = getattr(torch, model.config.torch_dtype)
    in_model = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    return in_checkpoint, in_model


def find_checkpoints(folder: Path) -> list[Path]:
    """Returns a run's complete checkpoints, the newest first. Anything with another name in
    `folder` was not finished."""
    steps = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


# --- Writing ---


def save_checkpoint(folder: Path, step: int, state: State, keep: int) -> None:
    """Writes a checkpoint, then removes all but the last `keep`. All processes must call it.

    At any moment the last one that was finished is whole, also after a kill -9 or a power failure:
    a new one is written under another name, and gets its own once all of it is on the disk.
    """
    final = folder / f"step-{step:06d}"
    new = folder / f"{final.name}.tmp"
    # 1. What an interrupted save has left behind goes.
    if is_first():
        for left in folder.glob("*.tmp"):
            shutil.rmtree(left)
        new.mkdir(parents=True)
        sync(folder.parent)
    barrier()
    # 2. Every process writes its shards (and syncs its file).
    with quietly():
        dcp.save(state, storage_writer=FileSystemWriter(new), no_dist=world_size() == 1)
    barrier()
    # 3. The first process writes down what belongs to it, and puts it in place.
    if is_first():
        lengths = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        (new / "state.json").write_text(json.dumps({"step": step, "bytes": lengths}))
        sync(new / "state.json")
        put_in_place(new, final)
        remove_old(folder, keep)
    barrier()


def remove_old(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the last `keep`. The last one stays: --resume needs it."""
    for old in find_checkpoints(folder)[max(1, keep) :]:
        shutil.rmtree(old)


# --- Reading ---


class Reader(FileSystemReader):
    """Reads .metadata once. DCP asks for it in each load, of which a conversion makes hundreds."""

    @cached_property
    def metadata(self) -> Metadata:
        try:
            return super().read_metadata()
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what a pickle of other bytes may raise is anything
            raise InputError(f"{self.path}: damaged (.metadata: {error})") from None

    def read_metadata(self, *_, **__) -> Metadata:
        return self.metadata


def read_step(checkpoint: Path) -> int:
    """Returns the number of steps that a checkpoint holds."""
    step = read_json(checkpoint / "state.json").get("step")
    if not isinstance(step, int):
        raise InputError(f"{checkpoint / 'state.json'}: field 'step' is missing or malformed")
    return step


def load_checkpoint(checkpoint: Path, state: State) -> None:
    """Sets the tensors of `state`, in place, to what a checkpoint holds. All processes must call
    it. What the other of bfloat16's two optimisers has written is converted.

    Raises InputError if a file is missing or was cut short, or if the checkpoint has other tensors.
    Other errors are passed on: running out of memory, for one, says nothing against a checkpoint,
    and nobody should delete it.
    """
    check_whole(checkpoint)
    reader = Reader(checkpoint)
    entries = reader.metadata.state_dict_metadata
    saved = {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}
    ours = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    if saved == ours:
        read(reader, state)
    elif saved == layout(state, COMPACT) and ours == layout(state, FULL):
        load_converted(reader, state, saved=COMPACT, ours=FULL)
    elif saved == layout(state, FULL) and ours == layout(state, COMPACT):
        load_converted(reader, state, saved=FULL, ours=COMPACT)
    else:
        names = saved.keys() | ours.keys()
        differing = sorted(name for name in names if saved.get(name) != ours.get(name))
        raise InputError(
            f"{checkpoint}: is of another model or another version of this program "
            f"({len(differing)} tensors differ, the first is {differing[0]})"
        )


def read(reader: Reader, state: State) -> None:
    """Fills tensors, each of which the checkpoint has under the same name, shape and dtype."""
    with quietly():
        dcp.load(state, storage_reader=reader, no_dist=world_size() == 1)


def check_whole(checkpoint: Path) -> None:
    """Raises InputError unless every file of a checkpoint is there in its full length."""
    lengths = read_json(checkpoint / "state.json").get("bytes")
    if not isinstance(lengths, dict):
        raise InputError(f"{checkpoint / 'state.json'}: field 'bytes' is missing or malformed")
    for name, length in lengths.items():
        path = checkpoint / name
        if not path.exists():
            raise InputError(f"{checkpoint}: damaged ({name} is missing)")
        found = path.stat().st_size
        if found != length:
            raise InputError(f"{checkpoint}: damaged ({name} has {found} bytes of {length})")


@contextmanager
def quietly() -> Iterator[None]:
    """Raises what goes wrong inside DCP, such as an OSError of a full disk, as it was.

    DCP gathers the errors of all processes in one that is no Exception, which no `except` of ours
    would know. Where this process had none, it raises another's. Its warnings are hidden: on one
    process, that there is only one.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except CheckpointException as error:
        failures = {number: failure for number, (failure, _) in error.failures.items()}
        raise failures.get(rank()) or next(iter(failures.values())) from None


# --- From one optimiser to the other ---

# What AdamW on float32 weights or shards keeps of each weight, and what CompactAdamW keeps.
FULL = dict.fromkeys(("weight", "exp_avg", "exp_avg_sq", "step"), torch.float32)
COMPACT = dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), torch.bfloat16)
COMPACT |= {"low": torch.int8, "step": torch.float32}


def names_of(weight: str, dtypes: Dtypes) -> dict[str, str]:
    """Returns the names in a state of what an optimiser keeps of a weight, by key."""
    names = {key: f"optimizer.{weight}.{key}" for key in dtypes}
    return names | {"weight": f"weights.{weight}"}


def weights_of(state: State) -> list[str]:
    """Returns the names of the weights in a state."""
    return [name.removeprefix("weights.") for name in state if name.startswith("weights.")]


def layout(state: State, dtypes: Dtypes) -> Layout:
    """Returns what an optimiser, FULL or COMPACT, keeps of the weights in `state`."""
    found = {}
    for weight in weights_of(state):
        shape = state[f"weights.{weight}"].shape
        for key, name in names_of(weight, dtypes).items():
            found[name] = (torch.Size() if key == "step" else shape, dtypes[key])
    return found


def load_converted(reader: Reader, state: State, saved: Dtypes, ours: Dtypes) -> None:
    """Sets the tensors of `state`, whose dtypes are `ours`, to what the other optimiser has saved.

    One weight after the other, so that no more than one is there twice.
    """
    for weight in weights_of(state):
        target = {key: state[name] for key, name in names_of(weight, ours).items()}
        # 1. What was saved, on the devices and in the shards that our tensors have.
        source = {}
        for key, dtype in saved.items():
            like = target.get(key, target["weight"])  # we may have no "low"
            source[key] = torch.empty_like(like, dtype=dtype)
        read(reader, {name: source[key] for key, name in names_of(weight, saved).items()})
        # 2. No element needs another one: each process converts its own shards.
        convert(
            {key: own_part(tensor) for key, tensor in source.items()},
            {key: own_part(tensor) for key, tensor in target.items()},
        )


def convert(source: State, target: State) -> None:
    """Sets what one optimiser keeps of a weight to what the other one kept.

    Float32 takes all of the compact bits. The other way everything is rounded to the nearest, the
    second moment too: what is rounded once, and not at each step, does not drift.
    """
    if "low" in source:
        tensors = target["weight"], source["weight"], source["low"]
        for master, high, low in zip(*map(chunks, tensors)):
            master.copy_(join(high, low))
    else:
        tensors = source["weight"], target["weight"], target["low"]
        for master, high, low in zip(*map(chunks, tensors)):
            nearest_high, nearest_low = split(master, 0x80)
            high.copy_(nearest_high)
            low.copy_(nearest_low)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        target[key].copy_(source[key])
