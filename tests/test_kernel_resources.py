"""The Triton kernels as the compiler takes them, which refuses what the interpreter lets pass. No GPU is needed."""
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.triton_or_none import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kernel_resources.py"


def lines(option):
    done = subprocess.run([sys.executable, str(SCRIPT), option], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_what_is_used_compiles_for_an_h100():
    """16-bit operands are copied asynchronously, and what is summed stays in registers."""
    rows = [line for line in lines("--chosen") if " bf16 " in line]
    assert len(rows) == 17 and "waits" not in "".join(rows[:4])
    for row in rows:
        in_loops, kib, programs, copies = row[row.index(" bf16 ") + 45:].split()[2:6]
        assert int(in_loops) < 20 and float(kib) < 227 and int(programs) >= 1 and int(copies) > 0, row


def test_what_is_used_fits_into_other_gpus():
    """An A100 has 163 KiB of shared memory for a program, most others 99: the command fails if a kernel needs more."""
    rows = lines("--fits")
    assert len(rows) == 3 * (17 + 19) and {row.split()[0] for row in rows} == {"sm_80", "sm_86", "sm_90"}
