"""Tokens per second of the rollout engine, beside transformers' generate.

    python benchmarks/rollout.py --peer PEER/bin/python                 # micro/base
    python benchmarks/rollout.py --peer PEER/bin/python --shape 0.5b    # random weights, real shape
    python benchmarks/rollout.py --shape 7b --device cuda --dtype bfloat16 --prompts 1 --samples 1

The peer's environment is made by `python -m venv PEER && PEER/bin/pip install torch transformers`.
Machines are noisy: what counts are ratios within a run. The share of the roof is printed too: how
fast decoding would be if it took the time of reading weights and cache. (The time of the prompts is
in our speed, not in the roof.)
"""

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

from benchmarks.common import SHAPES, ask_peer, copy_bandwidth, random_model
from data import ImageConfig, Prompt, Tokenizer, format_prompt, make_prompt, read_examples
from hub.device import DEVICE_HELP, pick_device
from hub.errors import InputError
from hub.options import MICRO_BASE, MICRO_DATA, option, parse_options, run_command
from hub.weights import copy_side_files
from model import Qwen2_5_VL
from sample import Sampler, SamplingParams
from training.journal import git_commit


@dataclass
class RolloutOptions:
    """Tokens per second of the rollout engine, with forced full lengths and with natural ones."""

    model: str = option(str(MICRO_BASE), "model folder")
    shape: str | None = option(None, "random weights in this shape; full lengths", choices=SHAPES)
    data: str = option(str(MICRO_DATA / "rl.jsonl"), "questions to be asked")
    prompts: int = option(64, "how many of them", low=1)
    prompt_tokens: int | None = option(None, "random prompts of so many tokens instead", low=1)
    samples: int = option(8, "responses to each", low=1)
    new_tokens: int = option(128, "tokens of a full-length response", low=1)
    natural_tokens: int = option(256, "limit of a natural response", low=1)
    natural_temperature: float = option(2.0, "at which lengths vary widely", low=0.0)
    slots: int = option(256, "sequences that we sample at a time", low=1)
    peer: str | None = option(None, "Python of an environment with transformers")
    peer_batches: list[str] = option(["64", "128", "256", "512"], "its batch sizes")
    peer_caches: list[str] = option(["dynamic"], "its caches: dynamic, static")
    repeats: int = option(3, "of every measurement; the best one counts, on both sides", low=1)
    threads: int = option(2, "of the CPU", low=1)
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option("float32", "of weights and cache", choices=("float32", "bfloat16"))
    json: bool = option(False, "the last line is one JSON object")


def make_prompts(options: RolloutOptions, tokenizer: Tokenizer) -> list[Prompt]:
    """Returns the first questions of --data, or random ids."""
    if options.prompt_tokens:
        generator = torch.Generator().manual_seed(0)
        size = (options.prompts, options.prompt_tokens)
        ids = torch.randint(tokenizer.endoftext, size, generator=generator)
        return [Prompt(row) for row in ids.tolist()]
    prompts = []
    for example in read_examples(options.data):
        text = format_prompt(example, "direct")
        prompts.append(make_prompt(text, [], tokenizer, ImageConfig()))
        if len(prompts) == options.prompts:
            return prompts
    raise InputError(f"{options.data}: has {len(prompts)} questions only")


class Bench:
    """The model, the prompts, and both ways to sample."""

    def __init__(self, options: RolloutOptions):
        self.options = options
        self.device, dtype = pick_device(options.device), getattr(torch, options.dtype)
        self.tokenizer = Tokenizer.from_pretrained(options.model)
        if options.shape:
            self.model = random_model(options.shape, self.device, dtype)
        else:
            self.model = Qwen2_5_VL.from_pretrained(options.model, device=self.device, dtype=dtype)
        self.prompts = make_prompts(options, self.tokenizer)
        self.endless = self.make_sampler(stop_ids=())  # every response has its full length
        # The micro tokenizer's stop ids are nothing special to a random model of another shape.
        self.sampler = self.endless if options.shape else self.make_sampler(stop_ids=None)

    def make_sampler(self, stop_ids: tuple | None) -> Sampler:
        sampler = Sampler(
            self.model, self.tokenizer, max_batch=self.options.slots, stop_ids=stop_ids
        )
        if self.options.shape:  # any id may come: the micro tokenizer knows few of them
            sampler.masked_ids = sampler.masked_ids[:0]
        return sampler

    def ours(self, sampler: Sampler, params: SamplingParams) -> tuple[list[list[int]], dict]:
        """Returns the last repeat's ids, and the figures."""
        seconds, lengths = [], []
        for _ in range(self.options.repeats):
            started = time.perf_counter()
            groups = sampler.generate(self.prompts, params)
            seconds.append(time.perf_counter() - started)
            ids = [completion.ids for group in groups for completion in group]
            lengths.append([len(row) for row in ids])
        return ids, figures(seconds, lengths)

    def theirs(
        self, folder: str, sampler: Sampler, params: SamplingParams
    ) -> tuple[list[list[int]], dict]:
        """Returns transformers' ids, and its figures at its best batch size and cache."""
        options = self.options
        job = {
            "model": folder,
            "prompts": [prompt.ids for prompt in self.prompts],
            "samples": params.n,
            "new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "stop_ids": sorted(sampler.stop_ids),
            "suppressed_ids": sampler.masked_ids.tolist(),
            "pad_id": self.tokenizer.endoftext,
            "batches": [int(size) for size in options.peer_batches],
            "caches": options.peer_caches,
            "repeats": options.repeats,
            "threads": options.threads,
            "device": str(self.device),
            "dtype": options.dtype,
        }
        tried = []
        for result in ask_peer(options.peer, "transformers_generate.py", job):
            measured = figures(result["seconds"], result["lengths"])
            tried.append((measured["tokens_per_second"], measured, result))
        _, measured, best = max(tried, key=lambda one: one[0])
        measured["by_batch"] = {f"{r['cache']} {r['batch']}": speed for speed, _, r in tried}
        measured["transformers"] = best["transformers"]
        return best["ids"], measured

    def roof(self) -> float:
        """Returns the tokens per second at which a step takes as long as to read its memory: the
        weights with the head, and the keys and values of all sequences, half grown."""
        config, options = self.model.config, self.options
        batch = min(options.slots, options.prompts * options.samples)
        context = fmean(len(prompt.ids) for prompt in self.prompts) + options.new_tokens / 2
        weights = sum(weight.numel() for weight in self.model.model.layers.parameters())
        weights += self.model.head_weight.numel()
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        elements = weights + batch * context * per_token
        return batch * copy_bandwidth(self.device) / (elements * self.model.head_weight.itemsize)


def figures(seconds: list[float], lengths: list[list[int]]) -> dict:
    """Returns the best repeat's tokens per second, all of them, and how long responses were."""
    speeds = [sum(run) / time for run, time in zip(lengths, seconds)]
    flat = [length for run in lengths for length in run]
    return {
        "tokens_per_second": max(speeds),
        "all": speeds,
        "mean_length": fmean(flat),
        "longest": max(flat),
    }


def print_line(mode: str, name: str, measured: dict) -> None:
    repeats = " ".join(f"{speed:,.0f}" for speed in measured["all"])
    by_batch = measured.get("by_batch", {})
    others = "  ".join(f"{key}: {speed:,.0f}" for key, speed in by_batch.items())
    print(f"{mode:<10}{name:<14}{measured['tokens_per_second']:>12,.1f} tokens/s", end="   ")
    print(f"mean length {measured['mean_length']:.1f}   ({repeats})  {others}", flush=True)


def measure(bench: Bench, folder: str) -> dict:
    """Measures all modes, prints them line by line, and returns the figures."""
    options, result = bench.options, {}
    full = SamplingParams(options.new_tokens, 1.0, n=options.samples)
    natural = SamplingParams(options.natural_tokens, options.natural_temperature, n=options.samples)
    modes = {"full": (bench.endless, full)}
    if not options.shape:
        modes["natural"] = (bench.sampler, natural)
    bench.endless.generate(bench.prompts[:2], replace(full, max_new_tokens=4))  # warms up
    for mode, (sampler, params) in modes.items():
        _, ours = bench.ours(sampler, params)
        print_line(mode, "ours", ours)
        result[mode] = {"ours": ours}
        if options.peer:
            _, theirs = bench.theirs(folder, sampler, params)
            ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
            print_line(mode, "transformers", theirs)
            print(f"{mode:<10}ratio {ratio:.2f}")
            result[mode] |= {"transformers": theirs, "ratio": ratio}
    if options.peer:
        greedy = SamplingParams(options.new_tokens, 0.0)
        bench.options = replace(options, repeats=1, peer_batches=options.peer_batches[-1:])
        ours, _ = bench.ours(bench.sampler, greedy)
        theirs, _ = bench.theirs(folder, bench.sampler, greedy)
        result["greedy_equal"] = sum(one == other for one, other in zip(ours, theirs))
        print(f"greedy outputs equal: {result['greedy_equal']} of {len(ours)}")
    return result


def main(argv: list[str]) -> None:
    """Measures both sides in turns, and prints the table."""
    options = parse_options(RolloutOptions, argv)
    if not all(size.isdigit() and int(size) for size in options.peer_batches):
        sizes = " ".join(options.peer_batches)
        raise InputError(f"--peer-batches must be numbers, not {sizes}")
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    with tempfile.TemporaryDirectory() as folder:
        if options.shape and options.peer:  # the peer needs the random weights too
            bench.model.save_pretrained(folder)
            copy_side_files(options.model, folder)
        result = measure(bench, folder if options.shape else options.model)
    roof = bench.roof()
    result["share_of_roof"] = result["full"]["ours"]["tokens_per_second"] / roof
    print(f"bandwidth roof {roof:,.1f} tokens/s: full lengths reach {result['share_of_roof']:.0%}")
    if options.json:
        about = {
            "date": str(date.today()),
            "commit": git_commit(),
            "machine": platform.platform(),
            "threads": options.threads,
            "torch": torch.__version__,
            "device": str(bench.device),
        }
        print(json.dumps(result | about))


if __name__ == "__main__":
    run_command(main)
