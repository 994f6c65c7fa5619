"""Checkpoints: what a run needs to go on, in a folder that is either whole or not there.

    checkpoint/step-000120/     what torch.distributed.checkpoint (DCP) writes, a file per process
        .metadata               which tensor, or shard of one, lies where in them
        state.json              the number of steps, and the length of every file

One format for every number of processes: what N have written, M can read. `.metadata` is a pickle,
which can run any code when it is read: go on from checkpoints of your own. To share, there is the
run's model/.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from hub.disk import put_in_place, sync
from hub.errors import InputError, read_json
from training.optimizer import named_states, trained_weights
from training.parallel import barrier, is_first, rank, world_size

State = dict[str, Tensor]  # each may be a plain tensor or a DTensor, in shards


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
    """Removes all checkpoints but the last `keep`."""
    for old in find_checkpoints(folder)[keep:]:
        shutil.rmtree(old)


# --- Reading ---


def read_step(checkpoint: Path) -> int:
    """Returns the number of steps that a checkpoint holds."""
    step = read_json(checkpoint / "state.json").get("step")
    if not isinstance(step, int):
        raise InputError(f"{checkpoint / 'state.json'}: field 'step' is missing or malformed")
    return step


def load_checkpoint(checkpoint: Path, state: State) -> None:
    """Sets the tensors of `state`, in place, to what a checkpoint holds.

    Raises InputError if a file is missing or was cut short, or if the checkpoint has other tensors.
    Other errors are passed on: running out of memory, for one, says nothing against a checkpoint,
    and nobody should delete it.
    """
    check_whole(checkpoint)
    reader = FileSystemReader(checkpoint)
    check_same_tensors(checkpoint, reader.read_metadata(), state)
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


def check_same_tensors(checkpoint: Path, metadata: Metadata, state: State) -> None:
    """Raises InputError unless a checkpoint has the same tensors as `state`.

    They differ where the optimiser does: a single process in bfloat16 has a CompactAdamW, several
    have AdamW on float32 shards.
    """
    saved = {}
    for name, entry in metadata.state_dict_metadata.items():
        saved[name] = (tuple(entry.size), entry.properties.dtype)
    ours = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    differing = sorted(
        name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name)
    )
    if differing:
        raise InputError(
            f"{checkpoint}: was written by another optimiser or in another precision "
            f"({len(differing)} tensors differ, the first is {differing[0]}): go on with the same "
            "--dtype and, in bfloat16, on one process if it was one, else on several"
        )


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
