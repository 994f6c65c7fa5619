"""Registers, spills and shared memory of our Triton kernels on an H100 (sm_90), with no GPU: Triton compiles ahead of
time, and ptxas says what it takes. So the tile sizes were picked; `bench.py attention` and `logprob` will judge them.

    python benchmarks/kernel_resources.py             # what was tried
    python benchmarks/kernel_resources.py --chosen    # what is used

A multiprocessor has 65,536 registers (255 a thread at most) and 227 KiB of shared memory. Spilled bytes, per thread,
are memory traffic, harmless outside the inner loop. "waits": the tensor cores' products run one by one (ptxas C7515).
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

import kernels.attention  # noqa: E402
from kernels import logprob  # noqa: E402

attention = sys.modules["kernels.attention"]  # `kernels.attention` is the function

POINTERS = {"targets": "*i64", "masked": "*u8", "parts": "*fp32", "target_logits": "*fp32", "lse": "*fp32",
            "upstream": "*fp32", "scale": "fp32", "scale2": "fp32", "delta": "*fp32", "part": "*fp32",
            "lengths": "*i64",
            "cu_seqlens": "*i32", "key_lengths": "*i32"}
MATRICES = ("hidden", "weight", "out", "a", "b", "rest", "q", "k", "v", "d_out", "dq", "dk", "dv")


def compile_kernel(kernel, element: str, constants: dict, options: dict, contiguous: tuple[str, ...] = ()):
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
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


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


def configurations(element: str, sizes: dict):
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


def attention_configurations(only_chosen: bool):
    """(name, kernel, constants, options) of the 7B's causal attention (28 heads on 4, D = 128), the ViT's (D = 80)."""
    for D in (128, 80):
        D1, D2 = attention.columns(D)
        common = {"HEADS": 28, "GROUP": 7 if D == 128 else 1, "D1": D1, "D2": D2, "FLOAT": triton.language.float32}
        for kind in ("forward", "query", "key"):
            tried = [attention.blocks(D, 4096, kind, torch.bfloat16), attention.blocks(D, 64, kind, torch.bfloat16)]
            if not only_chosen:
                tried += [{"BM": BM, "BN": BN, "num_warps": w, "num_stages": 2} for BM, BN, w in
                          ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 8), (64, 64, 4), (32, 64, 4))]
            for sizes in tried:
                kernel = getattr(attention, f"_{kind}_kernel")
                yield f"attention {kind}, {D}", kernel, {**common, "CAUSAL": D == 128, "PACKED": True, "RAGGED": False}, sizes
        if D == 128:
            yield f"attention decode, {D}", attention._decode_kernel, {**common, "SPLITS": 4}, {
                "BM": 16, "BN": 64, "num_warps": 4, "num_stages": 3}


def print_row(name: str, element: str, tile: str, options: dict, r: dict) -> None:
    """One kernel's line."""
    resident = min(65536 // (r["registers"] * 32 * options["num_warps"]), 232448 // (r["shared"] + 1024))
    print(f"{name:<24}{element:<6}{tile:<17}{options['num_warps']:>6}{options['num_stages']:>8}{r['registers']:>11}"
          f"{r['spilled']:>9}{r['shared'] / 1024:>8.1f}{resident:>8}{r['copies']:>14}{'  waits' * r['waits']}",
          flush=True)


def main(only_chosen: bool) -> None:
    chosen = logprob.tile_sizes(torch.bfloat16, 8192)
    tried = [("bf16", chosen), ("fp32", logprob.READ_SIZES)]
    if not only_chosen:
        tried += [("bf16", logprob.tile_sizes(torch.bfloat16, 64)), ("fp32", logprob.tile_sizes(torch.float32, 8192)),
                  ("bf16", chosen | {"num_stages": 3}), ("bf16", chosen | {"BV": 128, "num_warps": 4}),
                  ("bf16", chosen | {"BV": 128})]
    print(f"{'kernel':<24}{'type':<6}{'tile':<17}{'warps':>6}{'stages':>8}{'registers':>11}{'spilled':>9}{'KiB':>8}"
          f"{'per SM':>8}{'async copies':>14}   triton {triton.__version__}")
    for element, sizes in tried:
        options = {key: sizes[key] for key in ("num_warps", "num_stages")}
        for name, kernel, constants, contiguous in configurations(element, sizes):
            tile = f"{sizes['BN']} x {sizes['BV']}" + f" x {sizes['BK']}" * (sizes is not logprob.READ_SIZES)
            print_row(name, element, tile, options, resources(compile_kernel(kernel, element, constants, options,
                                                                             contiguous)))
    for name, kernel, constants, sizes in attention_configurations(only_chosen):
        options = {key: sizes[key] for key in ("num_warps", "num_stages")}
        constants |= {key: sizes[key] for key in ("BM", "BN")}
        print_row(name, "bf16", f"{sizes['BM']} x {sizes['BN']}", options,
                  resources(compile_kernel(kernel, "bf16", constants, options)))


if __name__ == "__main__":
    main("--chosen" in sys.argv)
