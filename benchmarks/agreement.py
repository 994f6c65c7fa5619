"""How far a model's outputs are from transformers': the measures, the bounds, and who computes.

What benchmarks/check_weights.py and parity.py share. transformers runs in a process of its own
(transformers_forward.py), so that its memory is given back, and in any environment that has it.
"""

import importlib.util
import platform
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.common import ask_peer

# The bounds; check_weights.py's docstring says why.
MAX_LOGIT = 0.002  # float32
MAX_KL, MIN_TOP1 = 0.005, 0.9  # bfloat16
MAX_LOSS = {"float32": 1e-4, "bfloat16": 0.02}
MAX_PATCH = 0.02


def compare_logits(ours: Tensor, theirs: Tensor) -> dict:
    """Returns how far logits [T, V] are from transformers': the largest difference, the mean of
    KL(theirs || ours) in nats, and at which share of the places the likeliest token is the same."""
    largest, kl, equal = 0.0, 0.0, 0
    for mine, other in zip(ours.split(64), theirs.split(64)):
        largest = max(largest, (mine - other).abs().max().item())
        log_p, log_q = other.double().log_softmax(-1), mine.double().log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        equal += (mine.argmax(-1) == other.argmax(-1)).sum().item()
    return {"max_diff": largest, "mean_kl": kl / len(ours), "top1": equal / len(ours)}


def find_faults(differences: dict, dtype: str) -> list[str]:
    """Returns what is beyond the bounds, as text."""
    faults = []
    for name in ("text", "picture"):
        if name not in differences:
            continue
        found = differences[name]
        if dtype == "float32" and not found["max_diff"] <= MAX_LOGIT:
            faults.append(f"logits of the {name} differ by up to {found['max_diff']:.2g}")
        if dtype != "float32" and not found["mean_kl"] <= MAX_KL:
            faults.append(f"logits of the {name} have a mean KL of {found['mean_kl']:.2g} nats")
        if dtype != "float32" and found["top1"] < MIN_TOP1:
            faults.append(f"likeliest tokens of the {name} agree at {found['top1']:.0%} only")
    if not differences["loss"] <= MAX_LOSS[dtype]:
        faults.append(f"the SFT loss differs by {differences['loss']:.2g}")
    if differences.get("patches", 0.0) > MAX_PATCH:
        faults.append(f"the picture's patches differ by up to {differences['patches']:.2g}")
    if not differences.get("tokens_equal", True):
        faults.append("the text has other ids")
    if not differences.get("chat_equal", True):
        faults.append("the conversation has other ids")
    return faults


def what_was_compared(differences: dict) -> list[str]:
    """Returns the names of what the verdict is about."""
    names = {
        "text": "logits of a text",
        "picture": "logits of a picture",
        "loss": "an SFT loss",
        "tokens_equal": "ids",
        "chat_equal": "the chat template",
        "patches": "the picture's patches",
    }
    return [words for name, words in names.items() if name in differences]


# --- Who computes ---


def find_peer(peer: str) -> str | None:
    """Returns the Python to run transformers with, None if there is none."""
    if peer == "none":
        return None
    if peer == "auto":
        return sys.executable if importlib.util.find_spec("transformers") else None
    return peer


@contextmanager
def ask_for_logits(
    peer: str,
    folder: str,
    inputs: dict[str, Tensor],
    *,
    device: str,
    dtype: str,
    text: str = "",
    chat: Sequence[dict] = (),
    picture: Image.Image | None = None,
) -> Iterator[tuple[dict, safe_open]]:
    """Yields transformers' report and the open file of its logits: see transformers_forward.py."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = {name: str(Path(temporary) / name) for name in ("inputs", "outputs", "picture.png")}
        save_file(inputs, paths["inputs"])
        if picture is not None:
            picture.save(paths["picture.png"])
        job = {
            "model": folder,
            "inputs": paths["inputs"],
            "outputs": paths["outputs"],
            "text": text,
            "chat": list(chat),
            "picture": paths["picture.png"] if picture is not None else None,
            "threads": torch.get_num_threads(),
            "device": device,
            "dtype": dtype,
        }
        [report] = ask_peer(peer, "transformers_forward.py", job)
        with safe_open(paths["outputs"], framework="pt") as file:
            yield report, file


def machine(device: torch.device) -> str:
    """Returns the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{device.type} ({platform.machine()}, {capability}, {threads} threads)"


def peak_bytes(device: torch.device) -> int:
    """Returns the peak of a GPU's memory, or else of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
