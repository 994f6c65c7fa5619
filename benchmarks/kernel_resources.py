"""What our Triton kernels take of an H100 (sm_90), with no GPU: Triton compiles ahead of time, ptxas says what a program
takes, and the disassembly what its inner loop is made of. So the tile sizes were picked; `make gpu` will judge them.

    python benchmarks/kernel_resources.py             # what was tried
    python benchmarks/kernel_resources.py --chosen    # what is used
    python benchmarks/kernel_resources.py --fits      # whether it fits into other GPUs: a line each, else exit 1

A multiprocessor has 65,536 registers (255 a thread at most) and 227 KiB of shared memory. "spilled": bytes per thread
that do not fit into registers, "in loops": how many instructions of the inner loops with products read or write them;
elsewhere they do no harm. "copies": asynchronous ones, behind which it computes. "waits": the tensor cores' products run one by one (ptxas C7515).

"products" and "issue" are cycles of one turn of the leanest inner loop: of the tensor cores (m64nNk16 takes N / 2, if
shared memory keeps up, which it does from N = 64 on), and of the four schedulers that issue an instruction of a warp each
cycle. Perfectly overlapped, the longer of the two counts; not at all overlapped, their sum.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import kernels.attention_triton  # noqa: E402
from kernels import logprob_triton as logprob  # noqa: E402

attention = kernels.attention_triton  # `kernels.attention` is the function
SHARED = {80: 166_912, 86: 101_376, 90: 232_448}  # bytes a program may have: A100; RTX 30, and 40 and 50 too; H100
ELEMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
POINTERS = {"targets": "*i64", "masked": "*u8", "parts": "*fp32", "target_logits": "*fp32", "lse": "*fp32",
            "upstream": "*fp32", "scale": "fp32", "scale2": "fp32", "delta": "*fp32", "part": "*fp32",
            "lengths": "*i64", "cu_seqlens": "*i32", "key_lengths": "*i32"}
MATRICES = ("hidden", "weight", "out", "a", "b", "rest", "q", "k", "v", "d_out", "dq", "dk", "dv")


def compile_kernel(kernel, element: str, constants: dict, options: dict, contiguous: tuple[str, ...] = (),
                   arch: int = 90):
    """`kernel` for tensors of `element`. Sizes and strides are multiples of 16, as Qwen2.5's; `contiguous` ones 1."""
    names = kernel.arg_names
    signature, attributes, values = {}, {}, dict(constants)
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in contiguous:
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = POINTERS.get(name, f"*{element}" if name in MATRICES else "i32")
            if signature[name] != "fp32" and name not in ("TILES", *attention.NUMBERS):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(k),): v for k, v in values.items()},
                       attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled) -> dict:
    """Of one program, from ptxas' report on its PTX."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source, "-o", source.with_suffix(".cubin")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {"registers": int(re.search(r"Used (\d+) registers", text)[1]), "waits": "C7515" in text,
            "spilled": int(re.search(r"(\d+) bytes spill stores", text)[1]), "shared": compiled.metadata.shared,
            "copies": compiled.asm["ptx"].count("cp.async.c")}


def inner_loops(compiled) -> list[list[str]]:
    """The instructions of each loop with products that holds no other such loop."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    loops = []  # from a label to the branch back to it
    for i, line in enumerate(lines):
        if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and labels[m[1]] < i:
            if any("HGMMA" in body for body in lines[labels[m[1]]:i]):
                loops.append((labels[m[1]], i))
    return [[line for line in lines[a:b] if "/*" in line] for a, b in loops
            if not any(a <= c and d < b for c, d in loops)]


def cycles(loop: list[str], warps: int) -> tuple[int, int]:
    """Of the tensor cores, and of the schedulers."""
    widths = [int(m[1]) for line in loop if (m := re.search(r"HGMMA\.64x(\d+)x16", line))]
    return sum(widths) // 2 * warps // 4, len(loop) * warps // 4


def logprob_configurations(element: str, sizes: dict):
    """(name, kernel, constants, names of strides that are 1) of a whole training step in products of these sizes."""
    common = {"EVEN": True, "FLOAT": triton.language.float32, "GROUP": sizes["GROUP"], "BK": sizes["BK"]}
    softmax = {**common, "BN": sizes["BN"], "BV": sizes["BV"], "MASK": True, "NEVER": logprob.NEVER,
               "PRODUCT": sizes is not logprob.READ_SIZES}
    yield "statistics", logprob._statistics_kernel, softmax, ()
    yield "logit gradients", logprob._gradient_kernel, softmax, ()
    if softmax["PRODUCT"]:
        matmul = {**common, "BM": sizes["BN"], "BN": sizes["BV"]}
        summed = {**matmul, "ADD": True, "REST": element == "bf16"}
        yield "hidden's gradient", logprob._matmul_kernel, summed, ("a_column",)
        yield "weight's gradient", logprob._matmul_kernel, {**matmul, "ADD": False, "REST": False}, ("a_row",)


def attention_configurations(element: str, only_chosen: bool):
    """(name, kernel, constants, sizes) of the 7B's causal attention (28 heads on 4, D = 128), the ViT's (D = 80)."""
    for D in (128, 80):
        D1, D2 = attention.columns(D)
        common = {"HEADS": 28, "GROUP": 7 if D == 128 else 1, "D1": D1, "D2": D2, "FLOAT": triton.language.float32}
        for kind in ("forward", "query", "key"):
            tried = [attention.blocks(D, longest, kind, ELEMENTS[element]) for longest in (4096, 64)]
            if not only_chosen:
                tried += [{"BM": BM, "BN": BN, "num_warps": w, "num_stages": 2} for BM, BN, w in
                          ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 8), (64, 64, 4), (32, 128, 8))]
            for sizes in tried:
                yield f"attention {kind}, {D}", getattr(attention, f"_{kind}_kernel"), {
                    **common, "CAUSAL": D == 128, "PACKED": True, "RAGGED": False}, sizes
        if D == 128:
            yield f"attention decode, {D}", attention._decode_kernel, {**common, "SPLITS": 4}, {
                "BM": 16, **attention.decode_blocks(ELEMENTS[element])}


def configurations(element: str, shared: int, only_chosen: bool):
    """(name, kernel, constants, tile, compiler's options, names of strides that are 1) of everything."""
    chosen = logprob.tile_sizes(ELEMENTS[element], 8192, shared)
    tried = [chosen] if element == "bf16" else [logprob.READ_SIZES, chosen]
    if not only_chosen and element == "bf16":
        tried += [logprob.tile_sizes(torch.bfloat16, 64, shared), chosen | {"num_stages": 3},
                  chosen | {"BV": 128, "num_warps": 4}, chosen | {"BV": 128}]
    for sizes in tried:
        for name, kernel, constants, contiguous in logprob_configurations(element, sizes):
            tile = f"{sizes['BN']} x {sizes['BV']}" + f" x {sizes['BK']}" * (sizes is not logprob.READ_SIZES)
            yield name, kernel, constants, tile, sizes, contiguous
    for name, kernel, constants, sizes in attention_configurations(element, only_chosen):
        constants |= {key: sizes[key] for key in ("BM", "BN")}
        yield name, kernel, constants, f"{sizes['BM']} x {sizes['BN']}", sizes, ()


def print_row(name: str, element: str, tile: str, warps: int, stages: int, compiled) -> None:
    """One kernel's line."""
    r = resources(compiled)
    resident = min(65536 // (r["registers"] * 32 * warps), 232448 // (r["shared"] + 1024))
    loops = inner_loops(compiled)
    local = sum("LDL" in line or "STL" in line for loop in loops for line in loop)
    products, issue = cycles(min(loops, key=len), warps) if loops else ("", "")
    print(f"{name:<23}{element:<6}{tile:<15}{warps:>6}{stages:>8}{r['registers']:>11}{r['spilled']:>9}{local:>10}"
          f"{r['shared'] / 1024:>7.1f}{resident:>8}{r['copies']:>8}{products:>10}{issue:>7}{'  waits' * r['waits']}", flush=True)


def show(only_chosen: bool) -> None:
    """The table."""
    print(f"{'kernel':<23}{'type':<6}{'tile':<15}{'warps':>6}{'stages':>8}{'registers':>11}{'spilled':>9}{'in loops':>10}"
          f"{'KiB':>7}{'per SM':>8}{'copies':>8}{'products':>10}{'issue':>7}   triton {triton.__version__}")
    for element in ELEMENTS:
        for name, kernel, constants, tile, sizes, contiguous in configurations(element, SHARED[90], only_chosen):
            options = {key: sizes[key] for key in ("num_warps", "num_stages")}
            compiled = compile_kernel(kernel, element, constants, options, contiguous)
            print_row(name, element, tile, *options.values(), compiled)


def check() -> int:
    """Compiles what is used for every kind of GPU; how many kernels do not fit."""
    too_large = 0
    for arch, shared in SHARED.items():
        for element in ELEMENTS:
            for name, kernel, constants, tile, sizes, contiguous in configurations(element, shared, True):
                options = {key: sizes[key] for key in ("num_warps", "num_stages")}
                taken = compile_kernel(kernel, element, constants, options, contiguous, arch).metadata.shared
                print(f"sm_{arch} {name} {element} {tile}: {taken} of {shared} bytes", flush=True)
                too_large += taken > shared
    return too_large


if __name__ == "__main__":
    if "--fits" in sys.argv:
        sys.exit(1 if check() else 0)
    show("--chosen" in sys.argv)
