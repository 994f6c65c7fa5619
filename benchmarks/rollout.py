"""Tokens per second of the rollout engine, beside transformers' generate.

    python benchmarks/rollout.py --peer PEER/bin/python                       # micro/base against transformers' generate
    python benchmarks/rollout.py --peer PEER/bin/python --shape 0.5b          # random weights in a real model's shapes
    python benchmarks/rollout.py --shape 7b --device cuda --dtype bfloat16 --prompts 1 --samples 1       # against the roof

A peer runs in an environment of its own; --peer names its Python. Set it up with
`python -m venv PEER && PEER/bin/pip install torch transformers`.
Machines are noisy: what counts are ratios within a run.
"""
import contextlib
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import SHAPES, ask_peer, copy_bandwidth, random_model  # noqa: E402
from data import (ImageConfig, InputError, Prompt, Tokenizer, format_prompt, make_prompt,  # noqa: E402
                  read_examples)
from hub.options import MICRO_BASE, MICRO_DATA, option, parse_options, pick_device, run_command  # noqa: E402
from hub.weights import copy_side_files  # noqa: E402
from model import Qwen2_5_VL  # noqa: E402
from sample import Completion, Sampler, SamplingParams  # noqa: E402
from training.journal import git_commit  # noqa: E402



@dataclass
class RolloutOptions:
    """Tokens per second of the rollout engine, with forced full lengths and with natural ones."""
    model: str = option(str(MICRO_BASE), "model folder")
    shape: str | None = option(None, "random weights in this shape instead, and full lengths only", choices=SHAPES)
    data: str = option(str(MICRO_DATA / "rl.jsonl"), "questions to be asked")
    prompts: int = option(64, "how many of them", low=1)
    prompt_tokens: int | None = option(None, "random prompts of so many tokens instead of questions", low=1)
    samples: int = option(8, "responses to each", low=1)
    new_tokens: int = option(128, "tokens of a full-length response", low=1)
    natural_tokens: int = option(256, "limit of a natural response", low=1)
    natural_temperature: float = option(2.0, "at which lengths vary widely", low=0.0)
    slots: int = option(256, "sequences that we sample at a time", low=1)
    peer: str | None = option(None, "Python of an environment with transformers")
    peer_batches: list[str] = option(["64", "128", "256", "512"], "batch sizes that it tries; its best one counts")
    peer_caches: list[str] = option(["dynamic"], "its caches: dynamic, static")
    repeats: int = option(3, "of every measurement; the best one counts, on both sides", low=1)
    threads: int = option(2, "of the CPU", low=1)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("float32", "of weights and cache", choices=("float32", "bfloat16"))
    json: bool = option(False, "the last line is one JSON object")


def make_sampler(o: RolloutOptions) -> Sampler:
    device, dtype = pick_device(o.device), getattr(torch, o.dtype)
    tokenizer = Tokenizer.from_pretrained(o.model)
    model = random_model(o.shape, device, dtype) if o.shape else Qwen2_5_VL.from_pretrained(o.model, device=device,
                                                                                            dtype=dtype)
    sampler = Sampler(model, tokenizer, max_batch=o.slots)
    if o.shape:  # any id may come: the micro tokenizer has no say in these vocabularies
        sampler.masked_ids = sampler.masked_ids[:0]
    return sampler


def make_prompts(o: RolloutOptions, tokenizer: Tokenizer) -> list[Prompt]:
    if o.prompt_tokens:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(tokenizer.endoftext, (o.prompts, o.prompt_tokens), generator=generator)
        return [Prompt(row) for row in ids.tolist()]
    examples = [example for example, _ in zip(read_examples(o.data), range(o.prompts))]
    if len(examples) < o.prompts:
        raise InputError(f"{o.data}: has {len(examples)} questions only")
    return [make_prompt(format_prompt(e, "direct"), [], tokenizer, ImageConfig()) for e in examples]


@contextlib.contextmanager
def without_stops(sampler: Sampler):
    """Inside, every response has its full length."""
    stop_ids, sampler.stop_ids = sampler.stop_ids, sampler.stop_ids[:0]
    try:
        yield
    finally:
        sampler.stop_ids = stop_ids


def ours(sampler: Sampler, prompts: list[Prompt], params: SamplingParams,
         repeats: int) -> tuple[list[list[Completion]], dict]:
    """The last completions, and what was measured."""
    runs = []
    for _ in range(repeats):
        started = time.perf_counter()
        groups = sampler.generate(prompts, params)
        runs.append((time.perf_counter() - started, [len(c.ids) for group in groups for c in group]))
    return groups, figures(runs)


def figures(runs: list[tuple[float, list[int]]]) -> dict:
    """Of repeats (seconds, lengths): the best one's tokens per second, and all of them."""
    speeds = [sum(lengths) / seconds for seconds, lengths in runs]
    lengths = [length for _, run in runs for length in run]
    return {"tokens_per_second": max(speeds), "all": speeds, "mean_length": fmean(lengths), "longest": max(lengths)}


def theirs(o: RolloutOptions, folder: str, sampler: Sampler, prompts: list[Prompt], params: SamplingParams, *,
           stops: bool, batches: list[int]) -> tuple[list[list[int]], dict]:
    """transformers' last ids, and its figures at its best batch size and cache."""
    tokenizer = sampler.tokenizer
    job = {"model": folder, "prompts": [p.ids for p in prompts], "samples": params.n,
           "new_tokens": params.max_new_tokens, "temperature": params.temperature,
           "stop_ids": sorted(tokenizer.stop_ids) if stops else [], "suppressed_ids": sampler.masked_ids.tolist(),
           "pad_id": tokenizer.endoftext, "batches": batches, "caches": o.peer_caches, "repeats": o.repeats,
           "threads": o.threads, "device": str(sampler.device), "dtype": o.dtype}
    results = ask_peer(o.peer, "transformers_generate.py", job)
    best, by_batch = None, {}
    for r in results:
        r["figures"] = figures(list(zip(r["seconds"], r["lengths"])))
        by_batch[f"{r['cache']} {r['batch']}"] = r["figures"]["tokens_per_second"]
        if best is None or r["figures"]["tokens_per_second"] > best["figures"]["tokens_per_second"]:
            best = r
    return best["ids"], best["figures"] | {"by_batch": by_batch, "transformers": best["transformers"]}


def bytes_per_step(sampler: Sampler, batch: int, context: float) -> float:
    """What a decoding step must read: the decoder's weights with the head, and the cache of `batch` sequences."""
    config, size = sampler.model.config, sampler.model.head_weight.element_size()
    weights = sum(p.numel() for p in sampler.model.model.layers.parameters()) + sampler.model.head_weight.numel()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return size * (weights + batch * context * per_token)


def rollout(o: RolloutOptions) -> dict:
    """Measures, prints line by line, and returns everything."""
    if not all(b.isdigit() and int(b) for b in o.peer_batches):
        raise InputError(f"--peer-batches must be numbers, not {' '.join(o.peer_batches)}")
    batches = [int(b) for b in o.peer_batches]
    torch.set_num_threads(o.threads)
    sampler, result = make_sampler(o), {}
    prompts = make_prompts(o, sampler.tokenizer)
    full = SamplingParams(o.new_tokens, 1.0, n=o.samples)
    natural = SamplingParams(o.natural_tokens, o.natural_temperature, n=o.samples)
    greedy = SamplingParams(o.new_tokens, 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = o.model
        if o.shape and o.peer:
            folder = temporary
            sampler.model.save_pretrained(folder)
            copy_side_files(o.model, folder)
        sampler.generate(prompts[:2], replace(full, max_new_tokens=4))  # warms up
        for mode, params in [("full", full)] + ([] if o.shape else [("natural", natural)]):
            stops = mode == "natural"
            with contextlib.nullcontext() if stops else without_stops(sampler):
                _, mine = ours(sampler, prompts, params, o.repeats)
            result[mode] = {"ours": mine}
            print_line(mode, "ours", mine)
            if o.peer:
                _, peer = theirs(o, folder, sampler, prompts, params, stops=stops, batches=batches)
                result[mode] |= {"transformers": peer, "ratio": mine["tokens_per_second"] / peer["tokens_per_second"]}
                print_line(mode, "transformers", peer)
                print(f"{mode:<10}ratio {result[mode]['ratio']:.2f}")
        if o.peer:
            mine, _ = ours(sampler, prompts, greedy, 1)
            ids, _ = theirs(replace(o, repeats=1), folder, sampler, prompts, greedy, stops=True, batches=batches[-1:])
            result["greedy_equal"] = sum(group[0].ids == other for group, other in zip(mine, ids))
            print(f"greedy outputs equal: {result['greedy_equal']} of {len(prompts)}")
    if o.shape:
        batch = min(o.slots, o.prompts * o.samples)
        context = fmean(len(p.ids) for p in prompts) + o.new_tokens / 2
        roof = copy_bandwidth(sampler.device) / bytes_per_step(sampler, batch, context) * batch
        result["share_of_roof"] = result["full"]["ours"]["tokens_per_second"] / roof
        print(f"bandwidth roof {roof:,.1f} tokens/s (batch {batch}, mean context {context:.0f}): reached "
              f"{100 * result['share_of_roof']:.0f}%")
    about = {"date": str(date.today()), "commit": git_commit(), "machine": platform.platform(), "threads": o.threads,
             "torch": torch.__version__, "device": str(sampler.device)}
    return result | about


def print_line(mode: str, name: str, f: dict) -> None:
    others = "".join(f"  {k}: {v:,.0f}" for k, v in f.get("by_batch", {}).items())
    print(f"{mode:<10}{name:<14}{f['tokens_per_second']:>12,.1f} tokens/s   length mean {f['mean_length']:.1f}, "
          f"longest {f['longest']}   ({' '.join(f'{s:,.0f}' for s in f['all'])}){others}", flush=True)


def main(argv: list[str]) -> None:
    options = parse_options(RolloutOptions, argv)
    result = rollout(options)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
