"""The peer of benchmarks/rollout.py: transformers' `generate` at its best.

Runs in an environment of its own, with torch and transformers only. Reads one JSON object (`Job`)
from stdin, and prints one per cache and batch size: seconds and new tokens of each repeat, and the
ids of the last one.
"""

import json
import sys
import time
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


@dataclass
class Job:
    """What is to be measured."""

    model: str  # model folder
    prompts: list[list[int]]
    samples: int  # per prompt
    new_tokens: int  # at most; exactly, where stop_ids is empty
    temperature: float  # 0: greedy
    stop_ids: list[int]
    suppressed_ids: list[int]
    pad_id: int
    batches: list[int]  # sizes to be tried
    caches: list[str]  # dynamic, static
    repeats: int
    threads: int
    device: str
    dtype: str


def options_of(job: Job, cache: str) -> dict:
    """Returns generate's options."""
    options = {
        "max_new_tokens": job.new_tokens,
        "eos_token_id": job.stop_ids or None,
        "pad_token_id": job.pad_id,
        "suppress_tokens": job.suppressed_ids or None,
        "repetition_penalty": 1.0,
        "cache_implementation": None if cache == "dynamic" else cache,
        "do_sample": job.temperature > 0,
    }
    if job.temperature > 0:
        options |= {"temperature": job.temperature, "top_k": 0, "top_p": 1.0}
    return options


def generate(model, job: Job, batch: int, cache: str) -> tuple[list[list[int]], float]:
    """Returns the new ids of all samples, in the order of the prompts, and the seconds."""
    options = options_of(job, cache)
    # Prompts of like length go together, so that little is padded.
    rows = sorted(
        range(len(job.prompts) * job.samples), key=lambda i: len(job.prompts[i // job.samples])
    )
    new_ids = {}
    started = time.perf_counter()
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        prompts = [job.prompts[i // job.samples] for i in chosen]
        # On the left: the new tokens must follow the prompt.
        width = max(map(len, prompts))
        padded = [[job.pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        sequences = model.generate(
            input_ids=torch.tensor(padded, device=job.device),
            attention_mask=torch.tensor(mask, device=job.device),
            **options,
        )
        new_ids |= dict(zip(chosen, sequences[:, width:].tolist()))
    seconds = time.perf_counter() - started
    return [cut(new_ids[i], job.stop_ids) for i in sorted(new_ids)], seconds


def cut(ids: list[int], stop_ids: list[int]) -> list[int]:
    """Returns the ids up to the first stop; what follows in a batch is padding."""
    for i, token in enumerate(ids):
        if token in stop_ids:
            return ids[: i + 1]
    return ids


def main() -> None:
    """Reads a job from standard input, does it, and prints the figures as JSON."""
    transformers.utils.logging.set_verbosity_error()
    job = Job(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    has_vision = hasattr(AutoConfig.from_pretrained(job.model), "vision_config")
    kind = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    model = kind.from_pretrained(job.model, dtype=getattr(torch, job.dtype)).to(job.device).eval()
    model.generation_config = transformers.GenerationConfig()  # no penalties from the folder
    for cache in job.caches:
        for batch in job.batches:
            runs = [generate(model, job, batch, cache) for _ in range(job.repeats)]
            result = {
                "cache": cache,
                "batch": batch,
                "seconds": [seconds for _, seconds in runs],
                "lengths": [[len(ids) for ids in completions] for completions, _ in runs],
                "ids": runs[-1][0],
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
