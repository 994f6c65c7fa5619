"""What both training loops share: options, the run folder, the optimiser, checkpoints and exact resume, metrics.

A run is a function of its options: data order and sampling seeds are computed from (seed, step), so no random state
outlives a step, and a checkpoint needs no more than weights, optimiser state and the number of steps done.
"""
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from hub.errors import InputError, read_json
from hub.options import MICRO_BASE, option
from hub.weights import copy_side_files
from model import Qwen2_5_VL
from training.journal import checksum, git_commit



@dataclass
class TrainOptions:
    """Options that both training commands have."""
    model: str = option(str(MICRO_BASE), "model folder to start from")
    data: str = option("", "training data")
    out: str = option("", "run folder")
    resume: bool = option(False, "go on from the run folder's checkpoint")
    overwrite: bool = option(False, "replace a run that the folder holds")
    skip_bad_lines: bool = option(False, "leave bad records out of the data, say how many they are, and go on")
    prompt_style: str = option("direct", "how a question is asked", choices=("direct", "train", "mcq", "math"))
    epochs: int = option(1, "passes over the data", low=1)
    max_steps: int | None = option(None, "stop after so many optimiser steps", low=1)
    learning_rate: float = option(1e-5, "peak learning rate", low=0.0)
    weight_decay: float = option(0.0, "of AdamW", low=0.0)
    beta1: float = option(0.9, "of AdamW", low=0.0, high=0.999999)
    beta2: float = option(0.999, "of AdamW", low=0.0, high=0.999999)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", low=0.0)
    micro_batch_size: int = option(32, "sequences per forward pass; changes memory, not the gradient", low=1)
    save_every: int = option(20, "steps between checkpoints; 0 is at the end only", low=0)
    seed: int = option(0, "of data order and sampling", low=0)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "of the forward pass; weights are float32. auto: bfloat16 on a GPU",
                        choices=("auto", "float32", "bfloat16"))


class Run:
    """runs/NAME: config.json, metrics.jsonl, samples.jsonl, checkpoint/, model/."""

    def __init__(self, options: TrainOptions):
        """Makes the folder, or with --resume takes it up again. `self.step` is the number of steps already done."""
        self.options, self.folder, self.step = options, Path(options.out), 0
        if not options.out:
            raise InputError("--out is empty")
        if self.folder.resolve() in (Path(options.model).resolve(), *Path(options.model).resolve().parents):
            raise InputError(f"--out {options.out} holds the model that training starts from: it would be overwritten")
        data = checksum(options.data) if Path(options.data).is_file() else None
        config = {"options": asdict(options), "data_crc32": data, "commit": git_commit(),
                  "python": sys.version.split()[0], "torch": torch.__version__}
        if options.resume:
            self.resume(config)
        else:
            self.create(config)

    def create(self, config: dict) -> None:
        if (self.folder / "config.json").exists():
            if "options" not in read_json(self.folder / "config.json"):
                raise InputError(f"{self.folder} holds something that is no run: use another --out")
            if (self.folder / "checkpoint").exists() and not self.options.overwrite:
                raise InputError(f"{self.folder} holds a run: use --resume, --overwrite, or another --out")
            for name in ("checkpoint", "checkpoint.old", "model"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        elif any((self.folder / name).exists() for name in ("checkpoint", "model", "metrics.jsonl", "samples.jsonl")):
            raise InputError(f"{self.folder} holds something that is no run: use another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def resume(self, config: dict) -> None:
        """Finds the checkpoint and drops the metrics of steps that it does not hold."""
        old = read_json(self.folder / "config.json")
        before, now = old.get("options", {}), config["options"]
        if not isinstance(before, dict):
            raise InputError(f"{self.folder / 'config.json'}: field 'options' must be an object")
        free = ("resume", "overwrite", "save_every", "out", "device", "micro_batch_size")  # may differ
        changed = [f"--{k.replace('_', '-')} was {before.get(k)!r}" for k in now
                   if k not in free and before.get(k) != now[k]]
        if changed:
            raise InputError(f"{self.folder}: cannot resume with other options: {'; '.join(changed)}")
        if old.get("data_crc32", config["data_crc32"]) != config["data_crc32"]:
            raise InputError(f"{self.folder}: cannot resume: {self.options.data} has changed since")
        candidates = [self.folder / "checkpoint", self.folder / "checkpoint.old"]
        self.checkpoint = next(filter(Path.exists, candidates), None)
        if self.checkpoint is None:
            raise InputError(f"{self.folder}: there is no checkpoint to resume from")
        self.step = read_json(self.checkpoint / "state.json").get("step")
        if type(self.step) is not int:
            raise InputError(f"{self.checkpoint / 'state.json'}: field 'step' is missing or malformed")
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.folder / name).exists():
                self.keep_steps(self.folder / name)

    def keep_steps(self, path: Path) -> None:
        """Drops what a records file holds beyond the checkpoint."""
        try:
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(f"{path}: damaged: not a step's record in every line") from None
        path.write_text("".join(kept))

    def log(self, name: str, *records: dict) -> None:
        """Appends records to metrics.jsonl or samples.jsonl."""
        with open(self.folder / name, "a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def save_checkpoint(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Replaces checkpoint/ as a whole: at any moment either it or checkpoint.old is complete."""
        new, final, old = (self.folder / n for n in ("checkpoint.tmp", "checkpoint", "checkpoint.old"))
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        safetensors.torch.save_file(dict(model.state_dict()), new / "weights.safetensors")
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
        (new / "state.json").write_text(json.dumps({"step": self.step}))
        if final.exists():  # else an interrupted replacement left checkpoint.old as the only one
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        new.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Weights and optimiser state as they were after `self.step` steps."""
        try:
            model.load_state_dict(safetensors.torch.load_file(self.checkpoint / "weights.safetensors"))
            state = torch.load(self.checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
            optimizer.load_state_dict(state)
        except Exception as error:  # on damaged files the readers raise almost anything
            raise InputError(f"{self.checkpoint}: damaged ({str(error).splitlines()[0]})") from None

    def save_model(self, model: Qwen2_5_VL) -> None:
        """Writes model/: a model folder like the one the run started from, in its dtype."""
        model.save_pretrained(self.folder / "model", dtype=getattr(torch, model.config.torch_dtype))
        copy_side_files(self.options.model, self.folder / "model")

    def save(self, model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, *, last: bool) -> None:
        """Checkpoint and model folder, every `save_every` steps and at the end."""
        if last or self.options.save_every and self.step % self.options.save_every == 0:
            if not all(p.isfinite().all() for p in model.parameters()):
                raise InputError(f"step {self.step}: weights are not finite: training has diverged; nothing is saved")
            self.save_model(model)  # first: what is interrupted here is done again after --resume
            self.save_checkpoint(model, optimizer)
