"""A training run: the options that both stages share, the run folder, checkpoints, exact resume.

A run is a function of its options. Data order and sampling seeds are computed from (seed, step), so
no random state outlives a step, and a checkpoint needs no more than the weights, the optimiser's
state, and the number of steps done.
"""

import json
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from data.prompts import STYLES
from hub.device import DTYPES
from hub.errors import InputError, read_json
from hub.options import MICRO_BASE, option
from hub.weights import copy_side_files, weight_files
from model import Qwen2_5_VL
from training.journal import append_records, check_same, make_config, read_records, write_config

JOURNALS = ("metrics.jsonl", "samples.jsonl")
# checkpoint.old is complete where a crash came while checkpoint was replaced, checkpoint.tmp never.
CHECKPOINTS = ("checkpoint", "checkpoint.old", "checkpoint.tmp")


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
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to this norm", low=0.0)
    pack_tokens: int = option(
        4096, "tokens of one forward pass; changes memory, not results (but for rounding)", low=1
    )
    save_every: int = option(20, "steps between checkpoints; 0 is at the end only", low=0)
    seed: int = option(0, "seed of the data order and of sampling", low=0)
    device: str = option("auto", "auto, cpu or cuda")
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


class Run:
    """A run folder, runs/NAME.

        config.json     options, checksums of the data and of the starting weights, commit, versions
        metrics.jsonl   one record per step
        samples.jsonl   GRPO only: the responses that were sampled
        checkpoint/     what --resume goes on from
        model/          a model folder like the one that training started from

    `Run(options)` only checks, `begin` is the first to write. In between a command reads its data
    and loads its model: if either is bad, the folder is still as it was.

    step: the number of steps already done. The training loop counts it up.
    """

    def __init__(self, options: TrainOptions):
        """Raises InputError if the folder holds what would be lost, or what --resume cannot go on
        from: no checkpoint, or a run with other options, other data or another starting model."""
        self.options = options
        self.folder = Path(options.out)
        self.step = 0
        start = Path(options.model).resolve()
        if not start.is_dir():
            hint = "grpo.py starts from what sft.py has trained"
            raise InputError(f"--model {options.model}: no such folder ({hint})")
        if not options.out:
            raise InputError("--out is empty")
        if self.folder.resolve() in (start, *start.parents):
            raise InputError(f"--out {options.out} holds the model that training starts from")
        if not options.resume:
            self.check_unused()
        # The starting weights count too: in GRPO they are the reference of the KL penalty.
        inputs = [options.data, *weight_files(Path(options.model))]
        self.config = make_config(asdict(options), inputs)
        if options.resume:
            check_same(self.folder, self.folder / "config.json", self.config)
            self.step = self.read_step()

    def check_unused(self) -> None:
        """Raises InputError unless the folder is free, or holds a run that may be replaced."""
        names = ("config.json", "model", *JOURNALS, *CHECKPOINTS)
        if not any((self.folder / name).exists() for name in names):
            return
        config_path = self.folder / "config.json"
        # A model folder has a config.json as well, but there are no options in it.
        if not config_path.exists() or "options" not in read_json(config_path):
            raise InputError(f"{self.folder} holds something that is no run: use another --out")
        if self.find_checkpoint() is not None and not self.options.overwrite:
            raise InputError(
                f"{self.folder} holds a run: use --resume, --overwrite, or another --out"
            )

    def find_checkpoint(self) -> Path | None:
        """Returns the newest complete checkpoint; None if there is none."""
        for name in ("checkpoint", "checkpoint.old"):
            if (self.folder / name).exists():
                return self.folder / name
        return None

    def read_step(self) -> int:
        """Returns the number of steps that the checkpoint holds."""
        checkpoint = self.find_checkpoint()
        if checkpoint is None:
            raise InputError(f"{self.folder}: there is no checkpoint to resume from")
        step = read_json(checkpoint / "state.json").get("step")
        if not isinstance(step, int):
            raise InputError(f"{checkpoint / 'state.json'}: field 'step' is missing or malformed")
        return step

    def begin(self) -> None:
        """Makes the folder ready. What a run without --resume replaces is deleted here."""
        if self.options.resume:
            for name in JOURNALS:
                self.drop_later_steps(self.folder / name)
        else:
            for name in ("model", *CHECKPOINTS):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in JOURNALS:
                (self.folder / name).unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_config(self.folder / "config.json", self.config)
        # The tokenizer and its like, now: when the weights are saved, hours later, the folder that
        # training started from may be gone.
        (self.folder / "model").mkdir(exist_ok=True)
        copy_side_files(self.options.model, self.folder / "model")

    def drop_later_steps(self, path: Path) -> None:
        """Cuts a journal off behind the last step that the checkpoint holds."""
        if not path.exists():
            return
        kept = 0
        for record, end in read_records(path, ("step",)):
            if record["step"] > self.step:
                break
            kept = end
        os.truncate(path, kept)

    def log(self, name: str, *records: dict) -> None:
        """Appends records to metrics.jsonl or samples.jsonl."""
        append_records(self.folder / name, records)

    def save(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, *, last: bool) -> None:
        """Writes model/ and checkpoint/, every `save_every` steps and at the end."""
        due = self.options.save_every and self.step % self.options.save_every == 0
        if not due and not last:
            return
        # The model first: if this is interrupted, the older checkpoint makes it again.
        dtype = getattr(torch, model.config.torch_dtype)  # that of the starting model's files
        model.save_pretrained(self.folder / "model", dtype=dtype)
        self.save_checkpoint(model, optimizer)

    def save_checkpoint(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Replaces the checkpoint: at any moment checkpoint/ or checkpoint.old/ is complete."""
        final, old, new = (self.folder / name for name in CHECKPOINTS)
        # 1. The new one, under a name that is never read.
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save_file(dict(model.state_dict()), new / "weights.safetensors")
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
        (new / "state.json").write_text(json.dumps({"step": self.step}))
        # 2. The one before steps aside. If there is none, a crash may have left checkpoint.old as
        #    the only one, which has to stay until the new one is in place.
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        # 3. The new one takes its place.
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Sets weights and optimiser state to what they were after `self.step` steps.

        Raises InputError if a file is missing or was cut short. Other errors are passed on: running
        out of memory, for one, says nothing against a checkpoint, and nobody should delete it.
        """
        checkpoint = self.find_checkpoint()
        weights_path = checkpoint / "weights.safetensors"
        optimizer_path = checkpoint / "optimizer.pt"
        # A safetensors file begins with its length, and torch.save's zip archive ends with its
        # table of contents. So opening them finds a cut one, without reading the tensors.
        try:
            with safe_open(weights_path, framework="pt"), zipfile.ZipFile(optimizer_path):
                pass
        except (OSError, SafetensorError, zipfile.BadZipFile) as error:
            raise InputError(f"{checkpoint}: damaged ({error})") from None
        model.load_state_dict(load_file(weights_path))
        state = torch.load(optimizer_path, weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state)
