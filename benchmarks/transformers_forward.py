"""The peer of benchmarks/check_weights.py and parity.py: transformers' logits, losses and inputs.

Runs in an environment of its own, with torch and transformers (4.56 or newer). Reads one JSON
object (`Job`) from stdin, writes the logits to a file, and prints one object with all else. The
weights leave the memory with this process.
"""

import inspect
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


@dataclass
class Job:
    """What is to be computed."""

    model: str  # model folder
    inputs: str  # a safetensors file: NAME.ids [T] of each run; see `run`
    outputs: str  # where the logits shall go: NAME [T, V] of each run that has no NAME.scored
    text: str  # to be tokenised
    picture: str | None  # an image file, to be cut into patches
    chat: list[dict]  # a conversation, to be rendered by the folder's own template
    threads: int
    device: str
    dtype: str


def load(job: Job) -> tuple[torch.nn.Module, list[str]]:
    """Returns the model, and the tensors that it did not find, or not in this shape.

    transformers fills such gaps with random numbers, and then there is nothing to compare.
    """
    has_vision = hasattr(AutoConfig.from_pretrained(job.model), "vision_config")
    kind = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    dtype = getattr(torch, job.dtype)
    model, info = kind.from_pretrained(job.model, dtype=dtype, output_loading_info=True)
    wrong = [str(key) for what in ("missing_keys", "mismatched_keys") for key in info[what]]
    return model.to(job.device).eval(), wrong


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Returns the logits [T, V] of a run, or where it has NAME.scored [T] the mean loss there.

    A run may have an image, as NAME.patches [P, 1176] and NAME.grid [1, 3].
    """
    ids = inputs[f"{name}.ids"][None]
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if f"{name}.grid" in inputs:
        arguments["pixel_values"] = inputs[f"{name}.patches"]
        arguments["image_grid_thw"] = inputs[f"{name}.grid"]
        # Version 5 wants to be told which tokens are an image's, and else has other positions.
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            arguments["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if f"{name}.scored" in inputs:
        labels = ids.masked_fill(~inputs[f"{name}.scored"][None], -100)
        return model(**arguments, labels=labels).loss
    return model(**arguments).logits[0].float()


def tokens(job: Job) -> list[int]:
    """Returns the text's ids by transformers' own tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    return tokenizer(job.text, add_special_tokens=False).input_ids


def chat(job: Job) -> list[int]:
    """Returns the conversation's ids by the folder's own template; an image is one token there."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    older = Path(job.model) / "chat_template.json"  # a file that was the processor's
    if not tokenizer.chat_template and older.exists():
        tokenizer.chat_template = json.loads(older.read_text(encoding="utf-8"))["chat_template"]
    rendered = tokenizer.apply_chat_template(job.chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def patches(job: Job) -> torch.Tensor:
    """Returns the picture's patches [P, 1176] by the folder's own processor."""
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(job.model, use_fast=False)
    made = processor(images=[Image.open(job.picture)], return_tensors="pt")
    return made["pixel_values"].float().contiguous()


def attempt(make, job: Job):
    """Returns make(job), or where that fails the reason: folders lack files that classes want."""
    try:
        return make(job)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:80]


def peak_bytes(device: str) -> int:
    """Returns the peak of a GPU's memory, or else of this process's."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Reads a job from standard input, does it, and prints the figures as JSON."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    job = Job(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    # Else the patches' convolution would round to ten bits on a GPU, though all is float32.
    torch.backends.cudnn.allow_tf32 = False
    started = time.perf_counter()
    model, wrong = load(job)
    result = {"load_seconds": time.perf_counter() - started, "loading": wrong, "losses": {}}

    # 1. All runs. Logits go to a file, in float32.
    inputs = {name: tensor.to(job.device) for name, tensor in load_file(job.inputs).items()}
    outputs = {}
    started = time.perf_counter()
    for name in sorted(key.removesuffix(".ids") for key in inputs if key.endswith(".ids")):
        value = run(model, inputs, name).cpu()
        if value.dim() == 0:
            result["losses"][name] = value.item()
        else:
            outputs[name] = value.contiguous()
    result["run_seconds"] = time.perf_counter() - started

    # 2. What transformers would have given to the model: ids and patches, or why there are none.
    result["tokens"], result["chat"] = attempt(tokens, job), attempt(chat, job)
    result["patches"] = None
    if job.picture is not None:
        made = attempt(patches, job)
        if isinstance(made, str):
            result["patches"] = made
        else:
            outputs["patches"] = made
    save_file(outputs, job.outputs)
    result["peak_bytes"] = peak_bytes(job.device)
    result["transformers"], result["torch"] = transformers.__version__, torch.__version__
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
