"""The peer of `bench.py rollout`: transformers' `generate` at its best. Runs in an environment of its own, which needs
torch and transformers only; reads one JSON object (see `Job`) on stdin, and prints one per line: of every batch size and
cache, the seconds and new tokens of each repeat, and the ids of the last one."""
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
    model: str                  # model folder
    prompts: list[list[int]]
    samples: int                # per prompt
    new_tokens: int             # at most; exactly, where stop_ids is empty
    temperature: float          # 0: greedy
    stop_ids: list[int]
    suppressed_ids: list[int]
    pad_id: int
    batches: list[int]          # sizes to be tried
    caches: list[str]           # dynamic, static
    repeats: int
    threads: int
    device: str
    dtype: str


def generate(model, job: Job, batch: int, cache: str) -> tuple[list[list[int]], float]:
    """All samples, prompts of like length together and padded on the left; new ids in the order of the prompts."""
    rows = sorted(range(len(job.prompts) * job.samples), key=lambda i: len(job.prompts[i // job.samples]))
    out, started = {}, time.perf_counter()
    for start in range(0, len(rows), batch):
        chosen = rows[start:start + batch]
        prompts = [job.prompts[i // job.samples] for i in chosen]
        T = max(map(len, prompts))
        ids = torch.tensor([[job.pad_id] * (T - len(p)) + p for p in prompts], device=job.device)
        mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts], device=job.device)
        sampling = {"do_sample": True, "temperature": job.temperature, "top_k": 0, "top_p": 1.0}
        sequences = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=job.new_tokens, eos_token_id=job.stop_ids or None,
            pad_token_id=job.pad_id, suppress_tokens=job.suppressed_ids or None, repetition_penalty=1.0,
            cache_implementation=None if cache == "dynamic" else cache,
            **(sampling if job.temperature else {"do_sample": False}))
        out |= dict(zip(chosen, sequences[:, T:].tolist()))
    seconds = time.perf_counter() - started
    for i, ids in out.items():
        stops = [t for t, token in enumerate(ids) if token in job.stop_ids]
        out[i] = ids[:stops[0] + 1] if stops else ids
    return [out[i] for i in sorted(out)], seconds


def main() -> None:
    """Reads the job, and prints a line per batch size and cache."""
    transformers.utils.logging.set_verbosity_error()
    job = Job(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    vision = hasattr(AutoConfig.from_pretrained(job.model), "vision_config")
    model = (AutoModelForImageTextToText if vision else AutoModelForCausalLM).from_pretrained(
        job.model, dtype=getattr(torch, job.dtype)).to(job.device).eval()
    model.generation_config = transformers.GenerationConfig()  # no penalties or defaults from the folder
    for cache in job.caches:
        for batch in job.batches:
            runs = [generate(model, job, batch, cache) for _ in range(job.repeats)]
            print(json.dumps({"cache": cache, "batch": batch, "seconds": [s for _, s in runs],
                              "lengths": [[len(ids) for ids in group] for group, _ in runs], "ids": runs[-1][0],
                              "transformers": transformers.__version__, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
