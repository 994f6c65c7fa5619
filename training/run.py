"""A training run: its folder, its steps, exact resume.

A run is a function of its options. Data order and sampling seeds are computed from (seed, step), so
no random state outlives a step, and a checkpoint needs no more than the weights, the optimiser's
state, and the number of steps done. Every process has a `Run`; the first one writes.
"""

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from data.sequences import batches, num_steps
from hub.config import Config
from hub.disk import follow_links, sync
from hub.errors import InputError, read_json
from hub.weights import copy_side_files, model_files, write_model
from kernels.triton_or_none import wanted_kernels
from model import Qwen2_5_VL
from training import checkpoint
from training.journal import (
    append_records,
    changed_options,
    check_same,
    make_config,
    read_records,
    recorded_options,
    write_json,
)
from training.optimizer import Diverged, forward_dtype
from training.options import TrainOptions, disk_needed
from training.parallel import any_rank, barrier, is_first, whole_weights, world_size

JOURNALS = ("metrics.jsonl", "samples.jsonl")
FILES = ("config.json", "diverged.json", "rows.npz", *JOURNALS)
FOLDERS = ("checkpoint", "model", "best")

# The run folders that this process has locked, and a descriptor of each that is never closed: the
# system gives a lock back when its process ends, by kill -9 too.
LOCKS: dict[Path, int] = {}


class Run:
    """A run folder, runs/NAME, and the loop over the steps.

        config.json     options, checksums of the data and of the starting weights, commit, versions
        metrics.jsonl   one record per step
        samples.jsonl   GRPO only: the responses that were sampled
        rows.npz        SFT only: its data, tokenised (training/rows.py)
        checkpoint/     what --resume goes on from: for this run alone (training/checkpoint.py)
        model/          a model folder like the one that training started from
        best/           with --eval-every: the same, of the step with the best validation
        diverged.json   where training has diverged: the batch that did it

    `Run(options)` only checks, `begin` is the first to write. In between a command reads its data
    and loads its model: if either is bad, the folder is still as it was.

    step: the number of steps done. records: their metrics, as in metrics.jsonl. warmup_steps: what
    was given to `begin` at the run's first start.
    """

    def __init__(self, options: TrainOptions):
        """Raises InputError if the folder holds what would be lost, or what --resume cannot go on
        from: no checkpoint, or a run with other options, other data or another starting model."""
        wanted_kernels()  # a bad value is said before anything is replaced
        self.options = options
        self.folder = Path(options.out)
        self.step = 0
        self.records: list[dict] = []
        if options.gpus is not None:
            raise InputError("--gpus is for --plan; torchrun starts training on several GPUs")
        Config.from_pretrained(options.model)  # says what is wrong with the folder
        start = follow_links(options.model)
        if not options.out:
            raise InputError("--out is empty")
        if follow_links(self.folder) in (start, *start.parents):
            raise InputError(f"--out {options.out} holds the model that training starts from")
        if not self.place().is_dir():
            raise InputError(f"--out {options.out}: {self.place()} is a file, not a folder")
        if not options.resume:
            self.check_unused()
        # The starting model counts too: in GRPO it is the reference of the KL penalty.
        inputs = [options.data, *model_files(Path(options.model))]
        self.config = make_config(recorded_options(options, forward_dtype(options)), inputs)
        if options.resume:
            check_same(self.folder, self.folder / "config.json", self.config)
            self.step = checkpoint.read_step(self.find_checkpoint())

    def place(self) -> Path:
        """Returns the run folder, behind symbolic links; where it is yet to be made, the nearest
        of the folders around it that is there."""
        place = follow_links(self.folder)
        while not place.exists():
            place = place.parent
        return place

    def check_unused(self) -> None:
        """Raises InputError unless the folder is free, or holds a run that may be replaced."""
        if not any((self.folder / name).exists() for name in (*FILES, *FOLDERS)):
            return
        config_path = self.folder / "config.json"
        # A model folder has a config.json as well, but there are no options in it.
        if not config_path.exists() or "options" not in read_json(config_path):
            raise InputError(f"{self.folder} holds something that is no run: use another --out")
        # A finished run may have lost its checkpoint, which is large; its models count as well.
        models = [self.folder / name / "model.safetensors" for name in ("model", "best")]
        held = checkpoint.find_checkpoints(self.folder / "checkpoint") or any(
            path.exists() for path in models
        )
        if held and not self.options.overwrite:
            raise InputError(
                f"{self.folder} holds a run: use --resume, --overwrite, or another --out"
            )

    def find_checkpoint(self) -> Path:
        """Returns the newest checkpoint. Raises InputError if there is none."""
        found = checkpoint.find_checkpoints(self.folder / "checkpoint")
        if not found:
            raise InputError(f"{self.folder}: there is no checkpoint to resume from")
        return found[0]

    # --- The beginning ---

    def begin(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, warmup_steps=0) -> None:
        """Makes the folder ready. With --resume, sets model and optimiser to what they were after
        `self.step` steps; without, what the run replaces is deleted here.

        Raises InputError where the disk has no room for what the run will write.
        """
        self.model, self.optimizer = model, optimizer
        # 1. Once all processes have found the folder fit, the first one may write.
        barrier()
        state = checkpoint.training_state(model, optimizer)
        if is_first():
            self.check_disk(model, state)
            self.lock()
        # 2. Load before anything is changed: a checkpoint may be damaged.
        if self.options.resume:
            try:
                checkpoint.load_checkpoint(self.find_checkpoint(), state)
            except InputError as error:
                older = checkpoint.find_checkpoints(self.folder / "checkpoint")[1:]
                hint = f"; without it --resume goes on from {older[0].name}" if older else ""
                raise InputError(f"{error}{hint}") from None
        if is_first():
            self.make_folder(warmup_steps)
        barrier()
        # 3. What the steps before have measured.
        self.warmup_steps = read_json(self.folder / "config.json")["warmup_steps"]
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            self.records = [record for record, _ in read_records(metrics, ("step",))]

    def lock(self) -> None:
        """Makes the folder if need be, and keeps other processes from training in it.

        Raises InputError if one does, or has done so since this one looked.
        """
        folder = follow_links(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder not in LOCKS:
            LOCKS[folder] = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.folder}: another process is training in it") from None
        except OSError:
            pass  # not every file system has locks
        if not self.options.resume:
            self.check_unused()
        elif checkpoint.read_step(self.find_checkpoint()) != self.step:
            raise InputError(f"{self.folder}: another process has gone on from step {self.step}")

    def make_folder(self, warmup_steps: int) -> None:
        """Writes config.json, and clears away what a new run replaces, or what an interrupted one
        did after its last checkpoint."""
        config_path = self.folder / "config.json"
        if self.options.resume:
            for name in JOURNALS:
                self.drop_later_steps(self.folder / name)
            checkpoint.remove_old(self.folder / "checkpoint", self.options.keep)
            write_json(config_path, self.resumed_config(read_json(config_path)))
        else:
            for name in FOLDERS:
                # Of a link the link alone goes: what it points to may be another run's.
                if (self.folder / name).is_symlink():
                    (self.folder / name).unlink()
                shutil.rmtree(self.folder / name, ignore_errors=True)
            # config.json last: by it the folder is known as a run's, if this is interrupted.
            for name in reversed(FILES):
                (self.folder / name).unlink(missing_ok=True)
            processes = {"processes": world_size(), "warmup_steps": warmup_steps}
            write_json(config_path, self.config | processes)
        # The tokenizer and its like, now: when the weights are saved, hours later, the folder that
        # training started from may be gone.
        (self.folder / "model").mkdir(exist_ok=True)
        copy_side_files(self.options.model, self.folder / "model")

    def resumed_config(self, before: dict) -> dict:
        """Returns a run's config with one more entry in its list "resumed": from which step, by
        which version, and with which options other than at the first start."""
        entry = {
            "step": self.step,
            "options": changed_options(before, self.config),
            "commit": self.config["commit"],
            "torch": self.config["torch"],
            "processes": world_size(),
        }
        return before | {"resumed": [*before.get("resumed", []), entry]}

    def drop_later_steps(self, path: Path) -> None:
        """Cuts a journal off behind the last step that the checkpoint holds."""
        if not path.exists():
            return
        kept = last = 0
        try:
            for record, end in read_records(path, ("step",)):
                if record["step"] > self.step:
                    break
                kept, last = end, record["step"]
        except InputError:
            # Damage behind the checkpoint's step, as after a power failure, is cut off as well.
            if last < self.step:
                raise
        os.truncate(path, kept)

    def check_disk(self, model: Qwen2_5_VL, state: checkpoint.State) -> None:
        """Raises InputError where there is no room for the checkpoints and models of a run.

        While a new one is written, those before are still there.
        """
        options = self.options
        needed = disk_needed(options, *checkpoint.sizes(model, state))
        # What is there already is replaced, or is part of it; but --keep 0 leaves old checkpoints.
        for name in FOLDERS:
            if name == "checkpoint" and options.keep == 0 and options.resume:
                continue
            for path in (self.folder / name).rglob("*"):
                needed -= path.stat().st_size
        free = shutil.disk_usage(self.place()).free
        if needed > free:
            helpful = "--save-every 0, or for a new run --keep 0 (no checkpoints) or another --out"
            raise InputError(
                f"--out {options.out}: checkpoints and models need {needed / 1e9:.3f} GB more, and "
                f"{self.place()} has {free / 1e9:.3f} GB free; what helps: {helpful}"
            )

    # --- The steps ---

    def steps(
        self, num_items: int, size: int, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields (epoch, numbers of the batch's items) for each step that is yet to be done, and
        saves the run every `save_every` steps and at the end.

        The body of the loop takes the step and calls `finish_step`. The end is after --epochs,
        after --max-steps, or as soon as `stop()` is true between two steps. At a SIGTERM (a cluster
        wants its machine back) the step is finished, the run is saved, and the exit code is 143.
        """
        options = self.options
        total = num_steps(num_items, size, options.epochs, options.max_steps)
        stream = batches(num_items, size, options.seed, first_step=self.step)
        stopped = False
        finished = self.step >= total or stop()
        if finished:
            if is_first():
                print(f"{self.folder}: all of {self.step} steps are done", file=sys.stderr)
            # model/ may be lost, or of a later step than the checkpoint.
            with self.explaining_full_disk():
                self.write_model(self.folder / "model")
        bar = tqdm(
            initial=self.step,
            total=total,
            desc=self.folder.name,
            unit="step",
            disable=not is_first(),
        )
        with bar, sigterm_noted() as sigterm:
            while not finished and not stopped:
                self.started = time.perf_counter()
                self.epoch, chosen = next(stream)
                yield self.epoch, chosen
                bar.set_postfix(self.postfix(), refresh=False)
                bar.update()
                finished = self.step >= total or stop()
                # A signal may reach one process a step before another: they agree here.
                stopped = any_rank(bool(sigterm))
                due = options.save_every and self.step % options.save_every == 0
                if due or finished or stopped:
                    self.save()
        if stopped and not finished:
            if is_first():
                print(
                    f"stopped by SIGTERM after step {self.step}: {self.way_on()}", file=sys.stderr
                )
            sys.exit(143)  # 128 + the number of the signal, as a shell says it

    def seconds(self) -> float:
        """Returns the seconds since the current step has begun."""
        return time.perf_counter() - self.started

    def finish_step(self, metrics: dict, samples: Iterable[dict] = ()) -> None:
        """Counts a step, and logs its metrics and samples.

        tokens_per_second and seconds are added. Seconds of validation do not count in them.
        """
        self.step += 1
        seconds = self.seconds() - metrics.get("eval_seconds", 0.0)
        speed = {"tokens_per_second": metrics["tokens"] / seconds, "seconds": seconds}
        record = {"step": self.step, "epoch": self.epoch, **metrics, **speed}
        self.records.append(record)
        self.log("samples.jsonl", *samples)
        self.log("metrics.jsonl", record)

    def postfix(self) -> dict[str, str]:
        """Returns what the progress bar shows beside steps and time left."""
        name = "reward" if "reward" in self.records[-1] else "loss"
        tokens = sum(record["tokens"] for record in self.records)
        return {name: f"{self.records[-1][name]:.3f}", "tokens": tqdm.format_sizeof(tokens)}

    def log(self, name: str, *records: dict) -> None:
        """Appends records to metrics.jsonl or samples.jsonl."""
        if is_first() and records:
            append_records(self.folder / name, records)

    @contextmanager
    def explaining_divergence(self, ids: list[str], learning_rate: float) -> Iterator[None]:
        """Where the gradient of the step inside is not finite, writes diverged.json, with the ids
        of the batch's examples, and raises an InputError that names it. Nothing is saved."""
        try:
            yield
        except Diverged as error:
            path = self.folder / "diverged.json"
            step = {"step": self.step + 1, "ids": ids, "learning_rate": learning_rate}
            if is_first():
                write_json(path, step | {"message": str(error)})
            raise InputError(f"step {self.step + 1}: {error}; its batch is in {path}") from None

    # --- Saving ---

    def save(self) -> None:
        """Writes model/ and, but for --keep 0, checkpoint/. All processes must call it.

        Raises InputError where the disk is full or fails.
        """
        with self.explaining_full_disk():
            self.write()

    def way_on(self) -> str:
        """Returns how a run goes on that has stopped here."""
        if checkpoint.find_checkpoints(self.folder / "checkpoint"):
            return "--resume goes on from the last checkpoint"
        return "there is no checkpoint to go on from"

    @contextmanager
    def explaining_full_disk(self) -> Iterator[None]:
        """Raises InputError instead of what comes of a disk that is full or fails."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            # torch's archives say of a full disk that they are at an "unexpected pos".
            if isinstance(error, RuntimeError) and "unexpected pos" not in str(error):
                raise
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise InputError(
                f"{self.folder}: step {self.step} cannot be saved ({reason}); is the disk full? "
                f"{self.way_on()}"
            ) from None

    def write(self) -> None:
        # The model first: if this is interrupted, the older checkpoint makes it again. And no
        # checkpoint is on the disk before what was logged up to it.
        self.write_model(self.folder / "model")
        for name in JOURNALS:
            if is_first() and (self.folder / name).exists():
                sync(self.folder / name)
        if self.options.keep > 0:
            state = checkpoint.training_state(self.model, self.optimizer)
            folder = self.folder / "checkpoint"
            checkpoint.save_checkpoint(folder, self.step, state, self.options.keep)

    def write_model(self, folder: Path) -> None:
        """Writes the model as it is now, in the precision of the starting model's files.

        All processes take part in putting the weights together; the first one keeps them, on the
        host, and writes.
        """
        dtype = getattr(torch, self.model.config.torch_dtype)
        whole = {}
        for name, weight in whole_weights(self.model, dtype):
            if is_first():
                whole[name] = weight.cpu()
        if is_first():
            write_model(folder, self.model.config, whole, dtype)
        barrier()


@contextmanager
def sigterm_noted() -> Iterator[list]:
    """Yields a list that is empty until a SIGTERM comes, which does nothing else meanwhile."""
    noted = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
