"""The Triton kernels as the compiler takes them, which refuses what the interpreter lets pass.

No GPU is needed. Each kernel is compiled once: for an H100, whose tensor cores are programmed in
their own way, or for the GPUs with the least shared memory, if it needs most of that.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels.triton_or_none import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kernel_resources.py"


def rows(capability, *kernels):
    """The table's rows, without the kernels' names: tile and numbers as words."""
    command = [sys.executable, str(SCRIPT), capability, "--only", *kernels]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()[1:]
    assert [line[7:32].rstrip() for line in lines] == list(kernels)
    return [line[32:].split() for line in lines]


def test_what_is_used_compiles_for_an_h100():
    """16-bit operands are copied asynchronously, and what is summed stays in registers."""
    attention = rows("90", "bf16 key 128", "bf16 decode 128", "bf16 forward 80, short")
    for row in attention:
        in_loops, kib, copies = row[6], row[7], row[-1]
        assert int(in_loops) < 20 and float(kib) < 227 and int(copies) > 0, row


def test_what_is_used_fits_into_other_gpus():
    """The command fails if a kernel needs more than their 99 KiB of shared memory."""
    kernels = ("bf16 forward 128", "bf16 query 128", "bf16 statistics", "bf16 logit gradients")
    for row in rows("86", *kernels):
        assert float(row[7]) <= 99, row


def test_adamw_takes_registers_alone():
    """It only reads and writes: nothing is spilled, and nothing goes through shared memory."""
    (row,) = rows("90", "bf16 AdamW")
    registers, spilled, kib = int(row[2]), int(row[3]), float(row[5])
    assert registers <= 64 and spilled == 0 and kib == 0, row
