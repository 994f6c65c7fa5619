"""Where a model runs, and in which precision."""

import torch

from hub.config import Config
from hub.errors import InputError

DTYPES = ("auto", "float32", "bfloat16")
DTYPE_HELP = "of the weights; auto is the folder's, but float32 on a CPU without bfloat16"


def pick_device(name: str) -> torch.device:
    """Returns the device of --device; auto is a GPU if there is one.

    Raises InputError where it is neither a CPU nor a GPU of NVIDIA's or AMD's, or is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu or cuda, not {name}")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        # CUDA graphs and kernels run on the current device, whatever device their tensors are on.
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device, on_disk: str) -> torch.dtype:
    """Returns the dtype that a model is loaded in, for --dtype and the dtype of its folder.

    auto is the folder's on a GPU. On a CPU it is float32, unless the folder's is bfloat16 and the
    processor has instructions for it. Without them bfloat16 is slow: on a CPU with AVX2, the 0.5B
    model wrote 9.9 tokens/s in it and 37 in float32 (16 samples behind a prompt of 287 tokens).
    """
    if name == "auto":
        name = on_disk
        if device.type == "cpu" and not (on_disk == "bfloat16" and cpu_computes_bfloat16()):
            name = "float32"
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
    if config.hidden_size <= 256:
        torch.set_num_threads(1)
