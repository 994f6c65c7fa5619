"""Kills training runs by kill -9 at random moments, and checks that nothing is lost.

    python tests/kill_nine.py --command sft --moments 20               # on the micro world, minutes
    python tests/kill_nine.py --command grpo --moments 20 --processes 2

A run saves after every step. Half of the moments are drawn from all of a run's time, the others
from the fraction of a second in which a checkpoint is written. At each moment the checkpoint of the
last step, or of the one before it, must be whole; and a run that goes on from there must end with
the very bits of one that was never killed: weights, moments, metrics and samples.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hub.options import MICRO_BASE, option, parse_options, run_command  # noqa: E402
from training.checkpoint import check_whole, find_checkpoints, quietly, read_step  # noqa: E402

# A base model is hardly ever right. So that it has something to learn in a few steps, GRPO rewards
# responses of odd length here.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import COMMAND as command
from hub.options import run_command
command.accuracy_reward = lambda response, *_, **__: float(len(response) % 2)
run_command(command.main)
"""
MICRO_RUN = {
    "sft": ["--max-steps", "6", "--batch-size", "8"],
    "grpo": ["--max-steps", "5", "--questions-per-step", "3", "--group-size", "4"]
    + ["--max-new-tokens", "32", "--updates-per-rollout", "2"],
}
TIMES = ("seconds", "tokens_per_second")  # how the names of metrics end that no two runs share


@dataclass
class KillOptions:
    """Kills training runs by kill -9 at random moments, and checks that nothing is lost."""

    command: str = option("sft", "the stage", choices=("sft", "grpo"))
    moments: int = option(20, "runs to kill", low=1)
    processes: int = option(1, "processes of each run, by torchrun if more than one", low=1)
    seed: int = option(0, "seed of the moments", low=0)


# --- A run, and its end ---


def start(command: str, argv: list[str], processes: int = 1) -> subprocess.Popen:
    """Starts a training run."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--no-python"]
        launcher += [f"--nproc_per_node={processes}", sys.executable]
    return subprocess.Popen(
        [*launcher, "-c", PROGRAM.replace("COMMAND", command), *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for a run, which must end well."""
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    found = []
    for child in map(int, children):
        found += [child, *descendants(child)]
    return found


def kill(process: subprocess.Popen) -> None:
    """kill -9, for the process and those that it has started."""
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


def wait_until(process: subprocess.Popen, happened) -> None:
    """Waits for something, or for the end of the process."""
    while not happened() and process.poll() is None:
        time.sleep(0.001)


# --- What must be so ---


def read_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, by name."""
    reader = FileSystemReader(find_checkpoints(Path(run) / "checkpoint")[0])
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    with quietly():
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def steps_logged(run: Path) -> int:
    """Whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def steps_saved(run: Path) -> int:
    """Steps in the newest checkpoint, which must be whole; 0 if there is none."""
    found = find_checkpoints(run / "checkpoint")
    if not found:
        return 0
    check_whole(found[0])
    assert read_checkpoint(run)
    return read_step(found[0])


def timeless_metrics(run: Path) -> list[dict]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in record.items() if not name.endswith(TIMES)}
        for record in records
    ]


def assert_same_end(run: Path, other: Path) -> None:
    """Two runs have ended with the same bits."""
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (other / weights).read_bytes()
    tensors, others = read_checkpoint(run), read_checkpoint(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert timeless_metrics(run) == timeless_metrics(other)
    if (run / "samples.jsonl").exists():
        assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


# --- Moment by moment ---


def check(command: str, argv: list[str], folder: Path, moments: int, processes=1, seed=0) -> None:
    """Runs a command to its end once; then kills and resumes it once for every moment.

    `argv` has all options but --out and --save-every.
    """
    whole, killed = folder / "whole", folder / "killed"
    argv = [*argv, "--save-every", "1", "--out"]
    process = start(command, [*argv, str(whole)], processes)
    wait_until(process, (whole / "config.json").exists)
    started = time.perf_counter()
    finish(process)
    seconds = time.perf_counter() - started
    steps = steps_logged(whole)
    assert steps_saved(whole) == steps > 1

    for moment in range(moments):
        draw = random.Random(f"{seed}/{moment}")
        shutil.rmtree(killed, ignore_errors=True)
        process = start(command, [*argv, str(killed)], processes)
        if moment % 2 == 0:
            wait_until(process, (killed / "config.json").exists)
            time.sleep(draw.uniform(0, seconds))
        else:
            step = draw.randint(1, steps)
            wait_until(process, (killed / f"checkpoint/step-{step:06d}.tmp").exists)
            time.sleep(draw.uniform(0, 0.04))
        kill(process)

        logged, saved = steps_logged(killed), steps_saved(killed)
        assert logged - 1 <= saved <= logged, (logged, saved)
        # While none is saved there is nothing to go on from, and nothing to lose.
        # Before the first checkpoint was whole, its model may be there: it is to be replaced.
        resume = ["--resume"] if saved else ["--overwrite"]
        left = [path.name for path in killed.rglob("*.tmp")]
        finish(start(command, [*argv, str(killed), *resume], processes))
        assert_same_end(killed, whole)
        print(f"moment {moment}: {logged} steps logged, {saved} saved, left {left}: same bits")


def main(argv: list[str]) -> None:
    options = parse_options(KillOptions, argv)
    run = ["--model", str(MICRO_BASE), "--device", "cpu", *MICRO_RUN[options.command]]
    with tempfile.TemporaryDirectory() as folder:
        check(options.command, run, Path(folder), options.moments, options.processes, options.seed)
    print(f"{options.command}, {options.processes} processes: {options.moments} moments passed")


if __name__ == "__main__":
    run_command(main)
