"""What the benches share: shapes of real models, timers, the peers' processes."""

import ctypes
import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

import torch

from hub.config import Config
from hub.errors import InputError
from hub.weights import copy_side_files, write_model
from model import Qwen2_5_VL
from training.journal import git_commit

HERE = Path(__file__).resolve().parent


QWEN = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "torch_dtype": "float32",
}
# The decoders of Qwen2.5-0.5B, Qwen2.5-VL-3B and Qwen2.5-VL-7B, and one to try the benches with.
SHAPES = {
    "tiny": QWEN
    | {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 2048,
        "tie_word_embeddings": True,
    },
    "0.5b": QWEN
    | {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "3b": QWEN
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": QWEN
    | {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Qwen2_5_VL:
    """Returns a decoder of one of SHAPES, with random weights."""
    with torch.device("meta"):
        model = Qwen2_5_VL(Config.from_dict(SHAPES[shape])).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    return model.eval()


def write_decoder(source: str, folder: str) -> None:
    """Writes the decoder of a model folder as one of a text-only Qwen2.5.

    On text it computes the same, and no side spends time on positions of images.
    """
    model = Qwen2_5_VL.from_pretrained(source, dtype=None)
    config = replace(model.config, vision=None, mrope_section=None, image_token_id=None)
    write_model(Path(folder), config, model.decoder_weights(), None)
    copy_side_files(source, folder)


def ask_peer(python: str, script: str, job: object) -> list[dict]:
    """Runs a script of benchmarks/ in the peer's environment, with the job on stdin.

    Returns the JSON objects that it prints. Raises InputError if it cannot run or fails.
    """
    try:
        done = subprocess.run(
            [python, str(HERE / script)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=True,
        )
    except OSError as error:
        raise InputError(f"--peer {python}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        complaint = (error.stderr.strip() or "failed").splitlines()[-1]
        if error.returncode < 0:  # as by a system whose memory is full
            complaint = f"was ended by signal {-error.returncode}"
        raise InputError(f"--peer {python}: {complaint}") from None
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def alternate(rounds: int, peer: bool) -> Iterator[str]:
    """Yields whose turn it is: ours and theirs in each round, and the other way round in every
    second one, so that what else the machine does hits both alike. Without a peer, ours."""
    for number in range(rounds):
        turn = ["ours", "theirs"] if peer else ["ours"]
        yield from reversed(turn) if number % 2 else turn


def give_memory_back() -> None:
    """Hands freed memory to the system, so that the peer's process has it; glibc would keep it."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def step_figures(turns: list[dict], tokens: float) -> dict:
    """Returns the median over the steps of all turns: seconds by the clock, and tokens in one of
    them; and "busy", the seconds of processor time, which other programs disturb less."""
    seconds = [second for turn in turns for second in turn["seconds"]]
    busy = [second for turn in turns for second in turn["busy"]]
    return {
        "seconds": median(seconds),
        "busy": median(busy),
        "tokens_per_second": tokens / median(seconds),
        "all": seconds,
    }


def about(threads: int) -> dict:
    """Returns what figures of a CPU are to be read with: date, commit, machine."""
    return {
        "date": str(date.today()),
        "commit": git_commit(),
        "machine": platform.platform(),
        "threads": threads,
        "torch": torch.__version__,
        "device": "cpu",
    }


def copy_bandwidth(device: torch.device) -> float:
    """Returns the bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.ones(2**28, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the median time of the runs of a quarter of a second, after three to warm up."""
    for _ in range(3):
        run()
    if device.type == "cuda":
        calls = max(1, min(20, int(20 / gpu_milliseconds(run, 1))))
        return sorted(gpu_milliseconds(run, calls) for _ in range(9))[4]
    times = []
    while sum(times) < 0.25 or len(times) < 5:
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 1e3 * sorted(times)[len(times) // 2]


def gpu_milliseconds(run: Callable[[], object], calls: int) -> float:
    """Returns the GPU's time for one of so many calls: it sleeps while they are queued."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def peak_bytes(run: Callable[[], object], device: torch.device, *, less: int) -> int | None:
    """Returns the peak of a GPU's memory beyond what it held before and `less` (the gradients).

    None on a CPU.
    """
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before - less


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the operations per second of a large product."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device).to(dtype)
    return 2e3 * n**3 / milliseconds(lambda: a @ a, device)
