"""What our Triton kernels take of a GPU, with no GPU at hand: Triton compiles ahead of time, and
ptxas says what a program takes.

    python benchmarks/kernel_resources.py                       # all; exit 1 if one does not fit
    python benchmarks/kernel_resources.py 90                    # for compute capability 9.0 alone
    python benchmarks/kernel_resources.py --only "bf16 key 128" "fp32 key 128"

A thread has 255 registers at most. "spilled": bytes per thread that do not fit into them. "in
loops": how many instructions of the innermost loops with products read or write those; elsewhere
they do no harm. "KiB": shared memory. "copies": asynchronous ones, behind which it computes.
"""

# ruff: noqa: E402 (paths and the environment are set between the imports)

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels import adamw_triton, attention_triton, decode_triton, layers_triton, logprob_triton

# Shared memory that a program may have, in KiB: A100; RTX 30, 40 (8.9) and 50; H100.
SHARED = {"80": 163, "86": 99, "90": 227}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEADS = {128: (28, 7), 80: (16, 1)}  # head dim: query heads and group of the 7B's decoder and ViT
# The types of the kernels' arguments that are not matrices of the model's dtype, nor int32.
TYPES = {
    "beta2": "fp32",
    "clip_factor": "*fp32",
    "cu_seqlens": "*i32",
    "delta": "*fp32",
    "dk": "*fp32",
    "dv": "*fp32",
    "eps": "fp32",
    "keep": "fp32",
    "key_lengths": "*i64",
    "logits": "*fp32",
    "low": "*i8",
    "lse": "*fp32",
    "masked": "*u8",
    "noise": "*i32",
    "part": "*fp32",
    "rate1": "fp32",
    "rate2": "fp32",
    "root": "fp32",
    "scale": "fp32",
    "scales": "*fp32",
    "statistics": "*fp32",
    "step_size": "fp32",
    "target_logits": "*fp32",
    "targets": "*i64",
    "upstream": "*fp32",
    "weight_sums": "*fp32",
}
MATRICES = ("q", "k", "v", "out", "d_out", "dq", "gradients")
MATRICES += ("x", "dx", "weight", "cos", "sin", "gate", "up", "d_gate", "d_up")
MATRICES += ("grad", "exp_avg", "exp_avg_sq")


class Job(NamedTuple):
    """A kernel as it is used."""

    name: str  # what --only takes, e.g. "bf16 key 128"
    kernel: object
    constants: dict  # the constexpr arguments, and the compiler's options

    @property
    def tile(self) -> str:
        """Returns the tile's sizes, e.g. "128 x 64"."""
        names = ("BM", "BN", "BV", "BLOCK")
        sizes = (self.constants[name] for name in names if name in self.constants)
        return " x ".join(map(str, sizes))


def jobs() -> Iterator[Job]:
    """Yields every kernel as the 7B uses it: its causal attention over packs and a cache, its ViT's
    windows and full attention, its log-probs, what stands between its products, its optimiser."""
    for dtype in DTYPES:
        for D, (heads, group) in HEADS.items():
            shape = torch.empty(1, heads, D), torch.empty(1, heads // group, D)
            constants = attention_triton.head_constants(*shape) | {"CAUSAL": D == 128}
            # Short segments (windows) have other tiles. In float32 all have the same.
            lengths = {"": False, ", short": True} if dtype == "bf16" else {"": False}
            for kind in ("forward", "query", "key"):
                kernel = getattr(attention_triton, f"_{kind}_kernel")
                for text, short in lengths.items():
                    sizes = attention_triton.blocks(short, kind, DTYPES[dtype])
                    yield Job(f"{dtype} {kind} {D}{text}", kernel, constants | sizes)
            if D == 128:
                del constants["CAUSAL"]
                sizes = {"SPLITS": 4, "BM": 16} | decode_triton.decode_blocks(DTYPES[dtype])
                yield Job(f"{dtype} decode 128", decode_triton._decode_kernel, constants | sizes)
                sizes = {"D": 128, "WIDTH": 128, "SPLITS": 4, "SPLIT_TILE": 4, "num_warps": 4}
                yield Job(f"{dtype} combine 128", decode_triton._combine_kernel, sizes)
        constants = logprob_triton.TILE | {"LOWEST": logprob_triton.LOWEST}
        yield Job(f"{dtype} statistics", logprob_triton._statistics_kernel, constants)
        yield Job(f"{dtype} logit gradients", logprob_triton._gradient_kernel, constants)
        yield from jobs_between_products(dtype)
    constants = adamw_triton.TILE | {"CLIPPED": True}
    yield Job("bf16 AdamW", adamw_triton._adamw_kernel, constants)


def jobs_between_products(dtype: str) -> Iterator[Job]:
    """Yields the kernels of RMSNorm, RoPE and SwiGLU as the 7B's decoder uses them."""
    norm = {"C": 3584, "WIDTH": 4096, "num_warps": layers_triton.warps(4096), **layers_triton.EXACT}
    yield Job(f"{dtype} norm", layers_triton._rms_norm_kernel, norm)
    yield Job(f"{dtype} norm, backward", layers_triton._rms_norm_backward_kernel, norm)
    turn = {"HEADS": 28, "D": 128, "HEAD_TILE": 32, "HALF_TILE": 64, "num_warps": 4}
    turn |= layers_triton.EXACT
    for backward in (False, True):
        name = f"{dtype} rope" + (", backward" if backward else "")
        yield Job(name, layers_triton._rope_kernel, turn | {"BACKWARD": backward})
    gate = {"ELEMENTS": layers_triton.ELEMENTS, "num_warps": 4, **layers_triton.EXACT}
    yield Job(f"{dtype} swiglu", layers_triton._swiglu_kernel, gate)
    yield Job(f"{dtype} swiglu, backward", layers_triton._swiglu_backward_kernel, gate)


def compile_job(job: Job, capability: str):
    """Returns the compiled kernel. Sizes and strides are multiples of 16, as Qwen2.5's are."""
    signature, attributes, values = {}, {}, {}
    for i, name in enumerate(job.kernel.arg_names):
        if name in job.constants:
            signature[name] = "constexpr"
            values[(i,)] = job.constants[name]
            continue
        signature[name] = f"*{job.name[:4]}" if name in MATRICES else TYPES.get(name, "i32")
        if signature[name] != "fp32" and name not in attention_triton.COUNTS:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=job.kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {name: x for name, x in job.constants.items() if name.startswith(("num_", "enable_"))}
    return triton.compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)


def spills_in_loops(compiled) -> int:
    """Returns how many instructions in the innermost loops with products move spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # A loop is what lies between a label and a branch back to it.
    lines = listing.splitlines()
    labels, loops = {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = i
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels:
            begin = labels[branch[1]]
            if any("MMA" in instruction for instruction in lines[begin:i]):
                loops.append((begin, i))
    moves = 0
    for begin, end in loops:
        outer = any(begin <= a and b < end for a, b in loops)
        if not outer:
            moves += sum("LDL" in line or "STL" in line for line in lines[begin:end])
    return moves


def resources(compiled, capability: str) -> dict:
    """Returns what one program takes, from ptxas' report on its PTX."""
    gpu = f"sm_{capability}" + ("a" if capability == "90" else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [get_ptxas(int(capability)).path, "-v", f"--gpu-name={gpu}", source]
        command += ["-o", source.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "in loops": spills_in_loops(compiled),
        "kib": compiled.metadata.shared / 1024,
        "copies": compiled.asm["ptx"].count("cp.async.c"),
    }


def main() -> int:
    """Prints the table. Returns how many kernels need more shared memory than there is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("capabilities", nargs="*", metavar="CAPABILITY", help="80, 86 or 90")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these kernels")
    options = parser.parse_args()
    print(
        f"{'GPU':<7}{'kernel':<25}{'tile':<11}{'warps':>5}{'registers':>11}{'spilled':>9}"
        f"{'in loops':>10}{'KiB':>7} of{'':<4}{'copies':>7}   triton {triton.__version__}"
    )
    too_large = 0
    for capability in options.capabilities or SHARED:
        for job in jobs():
            if options.only and job.name not in options.only:
                continue
            taken = resources(compile_job(job, capability), capability)
            print(
                f"sm_{capability:<4}{job.name:<25}{job.tile:<11}{job.constants['num_warps']:>5}"
                f"{taken['registers']:>11}{taken['spilled']:>9}{taken['in loops']:>10}"
                f"{taken['kib']:>7.1f} of {SHARED[capability]:<4}{taken['copies']:>6}",
                flush=True,
            )
            too_large += taken["kib"] > SHARED[capability]
    return too_large


if __name__ == "__main__":
    sys.exit(min(1, main()))
