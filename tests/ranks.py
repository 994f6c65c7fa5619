"""Runs commands of ours on several processes, as torchrun would, on a CPU (gloo)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(n: int, command: list[str]) -> list[subprocess.Popen]:
    """Starts n ranks of `python COMMAND`."""
    port, processes = free_port(), []
    for rank in range(n):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        if n == 1:
            del env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def run(n: int, command: list[str], *, timeout: float = 300) -> list[tuple[int, str, str]]:
    """Runs n ranks to their end. Returns each one's exit code, stdout and stderr."""
    processes = start(n, command)
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, outputs)]
