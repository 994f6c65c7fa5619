"""Runs and evaluations of the micro world, each made once and found again by its name.

    Dataset   a file of questions: a shipped one, or one that is written here from others
    Run       one of our commands with its seed, data and options, from a starting model
    Cell      a model's figures on a test set
    Probe     what a script of micro/ finds in a model: stopping.py, decisions.py

A run's name says what it is: where it starts from, the command, and the options that are not the
defaults, as in `0-base+sft+grpo,kl_coef=0.01` (seed 0). The name is that of its folder. So claims
that need the same run share it, what is finished is not run again, and what was interrupted goes
on. A name knows nothing of the code: after a change of it that matters, delete the folders of the
runs that it changes, or their cells/ alone, where only what is asked of the models has changed.
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean

import torch
from torch.backends.cpu import get_cpu_capability

from evaluate import accuracy, summarise
from hub.options import MICRO_BASE, MICRO_DATA, ROOT
from micro.failures import FAILURES, failure, parse_form
from micro.reproduce import LIMIT
from training.checkpoint import find_checkpoints
from training.journal import append_records, git_commit, read_records, write_json

Options = tuple[tuple[str, object], ...]  # names as in a command's options, and values

# Minutes on one idle core (AMD EPYC): of a step, and of a cell of 500 greedy answers.
STEP_MINUTES = {"sft.py": 0.7 / 80, "grpo.py": 2.5 / 200}
DEFAULT_STEPS = {"sft.py": 80, "grpo.py": 200}
PRETRAIN_MINUTES = 21.0  # of two cores together, for a model of the shipped width
SHIPPED_WIDTH = 128
DISTILL_MINUTES = 0.7
CELL_MINUTES = 0.07
PROBE_MINUTES = 0.4
SMOKE_PROBES = 20  # chains


class Failed(Exception):
    """A command has ended with an error; the message says which, and where its output is."""


@dataclass(frozen=True)
class Place:
    """Where the runs are, and whether they are real.

    `smoke` shortens everything, to see whether the machinery works: two steps a run, 20 questions a
    cell, and the shipped base in the place of every other. The figures then mean nothing.
    """

    out: Path
    smoke: bool = False


def spell(options: Options) -> str:
    """Returns the options as a part of a name: `,kl_coef=0.01,answer_only`."""
    words = ""
    for name, value in options:
        words += f",{name}" if value is True else f",{name}={value}"
    return words


def arguments(options: Options) -> list[str]:
    """Returns the options as a command's arguments. True and False are flags."""
    words = []
    for name, value in options:
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


@dataclass(frozen=True)
class Dataset:
    """A file of questions, known by its name. Without `write` it is a shipped one.

    write(place) returns the records of one that is made here, once its `needs` are there.
    """

    name: str
    write: Callable[[Place], list[dict]] | None = field(default=None, compare=False)
    needs: tuple["Run", ...] = field(default=(), compare=False)

    def path(self, place: Place) -> Path:
        folder = MICRO_DATA if self.write is None else place.out / "data"
        return folder / f"{self.name}.jsonl"

    def make(self, place: Place) -> Path:
        """Writes the file if it is not there; returns its path."""
        path = self.path(place)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            records = self.write(place)
            # Two runs may write it at the same time, each the same: the last one stays.
            temporary = path.with_suffix(f".{time.monotonic_ns()}.tmp")
            append_records(temporary, records)
            temporary.replace(path)
        return path


@dataclass(frozen=True)
class Run:
    """A command with options. `start` is the run whose model it starts from."""

    script: str
    seed: int
    start: "Run | None" = None
    data: Dataset | None = None
    options: Options = ()

    @property
    def name(self) -> str:
        stage = "base" if self.is_base else Path(self.script).stem
        data = f",data={self.data.name}" if self.data else ""
        own = stage + data + spell(self.options)
        return f"{self.start.name}+{own}" if self.start else f"{self.seed}-{own}"

    @property
    def is_base(self) -> bool:
        return self.start is None

    @property
    def is_shipped(self) -> bool:
        """Is it the base of micro/base, which is pretrain.py's of seed 0?"""
        return self.is_base and self.seed == 0 and not self.options

    @property
    def needs(self) -> tuple["Run", ...]:
        before = (self.start,) if self.start else ()
        return before + (self.data.needs if self.data else ())

    @property
    def cores(self) -> int:
        """Pre-training works in two processes: their number decides the weights."""
        return 2 if self.is_base else 1

    @property
    def steps(self) -> int:
        return dict(self.options).get("max_steps", DEFAULT_STEPS.get(self.script, 0))

    @property
    def minutes(self) -> float:
        """An estimate: minutes on one idle core, of a base on two."""
        options = dict(self.options)
        if self.is_shipped:
            return 0.0
        if self.is_base:
            width = options.get("width", SHIPPED_WIDTH)
            return PRETRAIN_MINUTES / self.cores * max(0.6, (width / SHIPPED_WIDTH) ** 1.3)
        if self.script not in STEP_MINUTES:
            return DISTILL_MINUTES
        # With a KL term all responses are run, through two models.
        heavier = 1.6 if options.get("kl_coef") else 1.0
        return self.steps * STEP_MINUTES[self.script] * heavier

    @property
    def line(self) -> tuple["Run", ...]:
        """All runs that this one stands on, and itself; without what is shipped."""
        before = [run for need in self.needs for run in need.line]
        return (*before, self) if not self.is_shipped else ()

    def folder(self, place: Place) -> Path:
        return place.out / self.name

    def source(self, place: Place) -> str:
        """Returns what made it: commit, version of torch, date, machine."""
        done = json.loads((self.folder(place) / "done.json").read_text())
        commit = (done["commit"] or "no git")[:7]
        return f"{commit}, torch {done['torch']}, {done['date']}, {done['machine']}"

    def model(self, place: Place) -> Path:
        return MICRO_BASE if self.is_shipped else self.folder(place) / "model"

    def done(self, place: Place) -> bool:
        return self.is_shipped or (self.folder(place) / "done.json").exists()

    def command(self, place: Place) -> list[str]:
        """Returns the command, with --resume where it has something to go on from."""
        folder = self.folder(place)
        words = [sys.executable, str(ROOT / self.script), "--seed", str(self.seed)]
        words += arguments(self.options)
        if self.is_base:
            return [*words, "--out", str(folder / "model")]
        words += ["--model", str(self.start.model(place))]
        if self.data:
            words += ["--data", str(self.data.make(place))]
        if self.script == "tools/distill.py":
            begun = (folder / "distilled.samples.jsonl").exists()
            words += ["--out", str(folder / "distilled.jsonl")]
            words += ["--limit", "20"] if place.smoke else []
        else:
            begun = bool(find_checkpoints(folder / "checkpoint"))
            words += ["--out", str(folder)]
            words += ["--max-steps", "2"] if place.smoke else []
        return [*words, "--resume" if begun else "--overwrite"]

    def make(self, place: Place) -> None:
        """Runs the command, or what is left of it, with its output in log.txt."""
        folder = self.folder(place)
        with locked(folder / "lock") as lock:
            if self.done(place):
                return
            started = time.monotonic()
            commit = git_commit()  # of the code that runs, not of what is committed meanwhile
            if self.is_base and place.smoke:
                shutil.copytree(MICRO_BASE, folder / "model", dirs_exist_ok=True)
            else:
                call(self.command(place), folder / "log.txt", lock)
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            minutes = round((time.monotonic() - started) / 60, 2)
            write_json(folder / "done.json", provenance(commit) | {"minutes": minutes})


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Holds a lock, which is a file, and makes its folder.

    Yields the file's descriptor. A command inherits it: if we are killed and it is not, the next
    one who wants the lock waits until the command has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def call(words: list[str], log: Path, lock: int) -> None:
    """Runs a command with its output at the end of a file. Raises Failed if it fails."""
    with open(log, "a") as file:
        print("$", *words, file=file, flush=True)
        done = subprocess.run(words, stdout=file, stderr=file, pass_fds=(lock,))
    if done.returncode:
        raise Failed(f"exit code {done.returncode}; see {log}")


def provenance(commit: str | None) -> dict:
    """Returns what a result is to be read with: commit, date, version of torch, machine."""
    return {
        "commit": commit,
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {get_cpu_capability()}",
    }


@dataclass(frozen=True)
class Cell:
    """A model's answers to a test set, summed up; `options` are evaluate.py's."""

    run: Run
    test: Dataset
    options: Options = ()

    @property
    def needs(self) -> tuple[Run, ...]:
        return (self.run, *self.test.needs)

    def path(self, place: Place) -> Path:
        return self.run.folder(place) / "cells" / f"{self.test.name}{spell(self.options)}.json"

    def done(self, place: Place) -> bool:
        return self.path(place).exists()

    def read(self, place: Place) -> dict:
        return json.loads(self.path(place).read_text())


@dataclass(frozen=True)
class Probe:
    """What a script finds in a model, on chains that it draws itself."""

    script: str
    run: Run
    cores = 1
    minutes = PROBE_MINUTES

    @property
    def name(self) -> str:
        return f"{self.run.name}: {self.script}"

    @property
    def seed(self) -> int:
        return self.run.seed

    @property
    def needs(self) -> tuple[Run, ...]:
        return (self.run,)

    def path(self, place: Place) -> Path:
        return self.run.folder(place) / "cells" / f"{Path(self.script).stem}.json"

    def done(self, place: Place) -> bool:
        return self.path(place).exists()

    def make(self, place: Place) -> None:
        words = [sys.executable, str(ROOT / self.script), "--model", str(self.run.model(place))]
        words += ["--seed", str(self.run.seed), "--out", str(self.path(place))]
        words += ["--count", str(SMOKE_PROBES)] if place.smoke else []
        with locked(self.path(place).with_suffix(".lock")) as lock:
            if not self.done(place):
                call(words, self.path(place).parent / "log.txt", lock)

    def read(self, place: Place) -> dict:
        (found,) = json.loads(self.path(place).read_text()).values()  # by model; there is one
        return found


@dataclass(frozen=True)
class Evaluation:
    """Cells of one model and the same options: evaluate.py makes them in one go."""

    cells: tuple[Cell, ...]
    cores = 1

    @property
    def name(self) -> str:
        first = self.cells[0]
        tests = " ".join(cell.test.name for cell in self.cells)
        return f"{first.run.name}: {tests}{spell(first.options)}"

    @property
    def seed(self) -> int:
        return self.cells[0].run.seed

    @property
    def needs(self) -> tuple[Run, ...]:
        return tuple(run for cell in self.cells for run in cell.needs)

    @property
    def minutes(self) -> float:
        return len(self.cells) * CELL_MINUTES * dict(self.cells[0].options).get("runs", 1)

    def done(self, place: Place) -> bool:
        return all(cell.done(place) for cell in self.cells)

    def make(self, place: Place) -> None:
        """Runs evaluate.py, sums its records up in a file a cell, and drops them."""
        first = self.cells[0]
        folder = first.path(place).parent
        records = folder / f"{first.path(place).stem}.records.jsonl"
        paths = [str(cell.test.make(place)) for cell in self.cells]
        words = [sys.executable, str(ROOT / "evaluate.py"), *arguments(first.options)]
        words += ["--model", str(first.run.model(place)), "--data", *paths]
        words += ["--out", str(records), "--overwrite"]
        words += ["--limit", "20"] if place.smoke else []
        with locked(records.with_suffix(".lock")) as lock:
            if self.done(place):
                return
            call(words, folder / "log.txt", lock)
            by_file = defaultdict(lambda: defaultdict(list))
            for record, _ in read_records(records, ("file", "id", "correct")):
                by_file[record["file"]][record["id"]].append(record)
            for cell, path in zip(self.cells, paths):
                write_json(cell.path(place), summarise_cell(list(by_file[path].values())))
            for path in folder.glob(f"{records.name}*"):
                path.unlink()


def summarise_cell(questions: list[list[dict]]) -> dict:
    """Returns the figures of a cell, from the records of each question's runs.

    beyond: the same as for all, for the questions beyond the base's reach (k > LIMIT); failures:
    the shares of these that went wrong in each way. endless: the share of all answers that were cut
    at their length. correct: the verdicts by id.
    """
    by_depth = defaultdict(list)
    for records in questions:
        by_depth[int(records[0]["meta"]["depth"])].append(records)
    beyond = [group for k, groups in by_depth.items() if k > LIMIT for group in groups]
    answers = [record for records in questions for record in records]
    figures = summarise(questions)
    return figures | {
        "endless": fmean(record["finish_reason"] == "length" for record in answers),
        "beyond": accuracy(beyond) if beyond else None,
        "failures": count_failures(beyond),
        "by_depth": {
            str(k): accuracy(groups)["accuracy"] for k, groups in sorted(by_depth.items())
        },
        "correct": {
            records[0]["id"]: [int(record["correct"]) for record in records]
            for records in questions
        },
    }


def count_failures(questions: list[list[dict]]) -> dict[str, float]:
    """Returns the share of the answers that went wrong in each way."""
    counts = Counter()
    for record in (record for records in questions for record in records):
        if not record["correct"]:
            question = parse_form(record["meta"]["form"], record["domain"])
            counts[failure(record["response"], question)] += 1
    answers = max(1, sum(len(records) for records in questions))
    return {name: counts[name] / answers for name in FAILURES}


def sources(needs: Iterable[Run | Cell | Probe], place: Place) -> list[str]:
    """Returns what made all the runs that these stand on, each once."""
    runs = {run for need in needs for run in ([need] if isinstance(need, Run) else need.needs)}
    return sorted({one.source(place) for run in runs for one in run.line})
