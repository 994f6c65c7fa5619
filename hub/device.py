"""Where a model runs, in which precision, and what is said when its memory is full."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hub.config import Config
from hub.errors import InputError

DTYPES = ("auto", "float32", "bfloat16")
DEVICE_HELP = "auto, cpu, cuda (cuda:1, ...) or mps"
DTYPE_HELP = "of the weights; auto is the folder's, but float32 on a CPU without bfloat16"


def pick_device(name: str) -> torch.device:
    """Returns the device of --device; auto is a GPU of NVIDIA's or AMD's if there is one.

    Raises InputError for an unknown one, or one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device must be auto, cpu, cuda or mps, not {name}")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # torch's may have a thousand letters
        raise InputError(f"--device {name}: {reason}") from None
    if device.type == "cuda":
        # CUDA graphs and kernels run on the current device, whatever device their tensors are on.
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device, on_disk: str) -> torch.dtype:
    """Returns the dtype that a model is loaded in, for --dtype and the dtype of its folder.

    auto is the folder's on a GPU, but float32 on Apple's. On a CPU it is float32, unless the
    folder's is bfloat16 and the processor has instructions for it. Without them bfloat16 is slow:
    on a CPU with AVX2, the 0.5B model wrote 9.9 tokens/s in it and 37 in float32 (16 samples behind
    a prompt of 287 tokens).
    """
    if name == "auto":
        on_cpu = device.type == "cpu" and on_disk == "bfloat16" and cpu_computes_bfloat16()
        name = on_disk if device.type == "cuda" or on_cpu else "float32"
    return getattr(torch, name)


def cpu_computes_bfloat16() -> bool:
    """Returns whether the processor has instructions for bfloat16, as far as this torch can say."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        is_supported = getattr(torch.cpu, name, None)  # not every version of torch has it
        if is_supported is not None and is_supported():
            return True
    return False


def limit_threads(config: Config) -> None:
    """Uses one CPU thread for models as small as the micro one.

    Their matrix products are over before a second thread has begun; and on a busy machine, threads
    that wait for one another are many times slower (docs/log.md).
    """
    if config.is_small:
        torch.set_num_threads(1)


def prepare(config: Config, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the dtype for a model that is only sampled from, by --device and
    --dtype, and limits the threads for it."""
    limit_threads(config)
    picked = pick_device(device)
    return picked, pick_dtype(dtype, picked, config.torch_dtype)


# --- Memory ---


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that are free on a GPU of NVIDIA's or AMD's; None for any other device.

    What torch has set aside without using it is given back first.
    """
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def in_gib(size: int) -> str:
    """Returns a number of bytes in GiB, for people to read."""
    return f"{size / 2**30:.1f} GiB"


@contextmanager
def memory_phase(phase: str, *remedies: str) -> Iterator[None]:
    """Says in one line in which phase the memory has run out, and what would help most.

    Raises InputError instead of torch.OutOfMemoryError, or of what the driver, Apple's GPUs and a
    CPU's allocator say in ways of their own. Phase and remedies are nouns: "the rollout", "a lower
    --max-batch".
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("out of memory", "can't allocate memory")):
            raise
        shortage = describe_shortage(str(error))
        line = f"out of memory in {phase}{shortage}; what helps: {', '.join(remedies)}"
        raise InputError(line) from None


def describe_shortage(message: str) -> str:
    """Returns the sizes that torch's message has, as the middle of a sentence; "" without them."""
    size = r"([\d.]+ \w+)"
    asked = re.search(f"Tried to allocate {size}", message)
    card = re.search(rf"GPU (\d+) has a total capacity of {size} of which {size} is free", message)
    if asked is None:
        return ""
    if card is None:
        return f": {asked[1]} were asked for"
    return f": {asked[1]} were asked for, {card[3]} of the {card[2]} of GPU {card[1]} are free"
