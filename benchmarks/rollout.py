"""Side-by-side measurements. Peers run in an environment of their own; --peer names its Python.

    python bench.py rollout --peer PEER/bin/python                       # micro/base against transformers' generate
    python bench.py rollout --peer PEER/bin/python --shape 0.5b          # random weights in a real model's shapes
    python bench.py rollout --shape 7b --device cuda --dtype bfloat16 --prompts 1 --samples 1       # against the roof
    python bench.py attention                                            # Triton kernels against SDPA's; needs a GPU
    python bench.py logprob --peer PEER/bin/python                       # log-probs against Liger's; needs a GPU
    python bench.py rewards --peer PEER/bin/python                       # tests/answers.txt through us and math-verify

Set up the peers with `python -m venv PEER && PEER/bin/pip install torch transformers math-verify[antlr4_13_2]`, for
logprob also liger-kernel.
Machines are noisy: what counts are ratios within a run.
"""
import contextlib
import gc
import json
import platform
import random
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from itertools import cycle
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from answers import equivalence
from data import ImageConfig, InputError, Prompt, Tokenizer, format_prompt, make_prompt, read_examples
from kernels import attention, logprob
from kernels.attention import attention_decode_triton, attention_triton, visible
from model import Config, Qwen2_5_VL, copy_side_files
from sample import Completion, Sampler, SamplingParams
from training import MICRO_BASE, MICRO_DATA, git_commit, option, parse_options, pick_device, run_command

ROOT = Path(__file__).parent
ANSWERS = ROOT / "tests" / "answers.txt"
QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
        "torch_dtype": "float32"}
SHAPES = {  # of the decoders of Qwen2.5-0.5B, Qwen2.5-VL-3B and Qwen2.5-VL-7B
    "0.5b": QWEN | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                    "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True},
    "3b": QWEN | {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
                  "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": QWEN | {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                  "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False}}


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


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Qwen2_5_VL:
    """A decoder with random weights."""
    with torch.device("meta"):
        model = Qwen2_5_VL(Config.from_dict(SHAPES[shape])).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02, generator=generator)
    return model.eval()


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


def ask_peer(python: str, script: str, job: object) -> list[dict]:
    """Runs one of benchmarks/ in the peer's environment with the job on stdin; the JSON objects that it prints."""
    try:
        done = subprocess.run([python, str(ROOT / "benchmarks" / script)], input=json.dumps(job), capture_output=True,
                              text=True, check=True)
    except OSError as error:
        raise InputError(f"--peer {python}: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"--peer {python}: {(error.stderr.strip() or 'failed').splitlines()[-1]}") from None
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


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


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
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
    if device.type == "cuda":
        torch.cuda.synchronize()


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


# --- Rewards ----------------------------------------------------------------------------------------------------------

@dataclass
class RewardsOptions:
    """Are two answers the same? Accuracy and speed on the development table, and time on hostile strings."""
    peer: str | None = option(None, "Python of an environment with math-verify")
    hostile: int = option(20_000, "random and hostile strings that are compared", low=1)
    seed: int = option(0, "of these strings", low=0)
    json: bool = option(False, "the last line is one JSON object with everything")


def answer_blocks(path: Path = ANSWERS) -> list[dict[str, list[str]]]:
    """The table's blocks: the spellings by their mark (= ! ~; the file says what these mean)."""
    blocks = []
    for part in path.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in part.splitlines() if line and not line.startswith("#")]
        if lines:
            blocks.append({mark: [line[2:] for line in lines if line[0] == mark] for mark in "=!~"})
    return blocks


def labelled_pairs(blocks: list[dict[str, list[str]]]) -> list[tuple[str, str, bool]]:
    """Truth, answer, and whether they are the same: every line of a block against its first."""
    return [(block["="][0], answer, same) for block in blocks
            for answers, same in ((block["="][1:] + block["~"], True), (block["!"], False)) for answer in answers]


PIECES = r"""\frac{ \frac \sqrt \sqrt[ { } ( ) [ ] \{ \} ^ _ ^{ ! | \pm \cup \infty pi \pi e i x y n 1 2 9 10 99
    1e99 999999999 0. 3.14 , ; = < >= + - * / \sin \log \ln \binom \text{cm} cm % ° \circ
    \begin{pmatrix} & \\ \end{pmatrix} or and $ ** sin log_ \lfloor \rfloor ² ½ √ a b k m factorial
    million \overline{3} \mathbb{R} é \boxed{ ≤""".split() + [" "]


def hostile_strings(count: int, seed: int, answers: list[str]) -> list[tuple[str, str]]:
    """Pairs of one that a policy might come up with (noise, pieces of maths at random or over and over, a real answer
    with pieces replaced) and mostly a real answer."""
    g = random.Random(seed)

    def one() -> str:
        kind = g.random()
        if kind < 0.2:
            return "".join(g.choices(string.printable, k=g.randint(0, 60)))
        if kind < 0.5:
            return "".join(g.choices(PIECES, k=g.randint(0, 40)))
        if kind < 0.6:
            return "".join(g.choices(PIECES, k=g.randint(40, 200)))[:512]
        if kind < 0.8:
            return ("".join(g.choices(PIECES, k=g.randint(1, 3))) * 512)[:g.randint(1, 512)]
        text = list(g.choice(answers))
        for _ in range(g.randint(0, 4)):
            text[g.randrange(len(text))] = g.choice(PIECES)
        return "".join(text)
    return [(one(), one() if g.random() < 0.1 else g.choice(answers)) for _ in range(count)]


def score(name: str, verdicts: list[bool], pairs: list[tuple[str, str, bool]], seconds: float) -> dict:
    """Prints, and returns, how often the verdicts are right."""
    false_accepts = sum(verdict and not same for verdict, (_, _, same) in zip(verdicts, pairs))
    right = sum(verdict == same for verdict, (_, _, same) in zip(verdicts, pairs))
    print(f"{name:<24}{right:>6} of {len(pairs)} right   {false_accepts:>4} false accepts   "
          f"{1e6 * seconds / len(pairs):>10,.1f} us a pair", flush=True)
    return {"right": right, "false_accepts": false_accepts, "seconds": seconds}


def time_hostile(o: RewardsOptions, answers: list[str]) -> dict:
    """Processor time of a comparison. What took over 10 ms is asked again, its parsed answers forgotten: now and then
    the machine or Python's garbage collector takes such a time for itself."""
    def seconds(pair: tuple[str, str]) -> float:
        started = time.thread_time()
        equivalence.is_equivalent(*pair)
        return time.thread_time() - started

    pairs = hostile_strings(o.hostile, o.seed, answers)
    gc.collect()
    gc.freeze()  # nobody else has a million pairs for the collector to walk over
    times = list(map(seconds, pairs))
    gc.unfreeze()
    again = []
    for pair in [pair for pair, t in zip(pairs, times) if t > 0.01]:
        equivalence.parse_answer.cache_clear()
        equivalence.parse_truth.cache_clear()
        again.append(seconds(pair))
    times.sort()
    found = {"strings": len(times), "median_us": 1e6 * times[len(times) // 2],
             "p99_us": 1e6 * times[len(times) * 99 // 100], "max_ms": 1e3 * times[-1], "over_10_ms": len(again),
             "of_these_max_ms_again": 1e3 * max(again, default=0.0)}
    print(f"{found['strings']:,} hostile strings: median {found['median_us']:.1f} us, 99% up to "
          f"{found['p99_us']:.0f} us, longest {found['max_ms']:.1f} ms; {len(again)} over 10 ms, which again take up "
          f"to {found['of_these_max_ms_again']:.2f} ms")
    return found


def rewards(o: RewardsOptions) -> dict:
    """Prints and returns both parts."""
    blocks = answer_blocks()
    pairs = labelled_pairs(blocks)
    equivalence.parse_answer.cache_clear()
    equivalence.parse_truth.cache_clear()
    started = time.perf_counter()
    verdicts = [equivalence.is_equivalent(answer, truth) for truth, answer, _ in pairs]
    result = {"pairs": len(pairs), "ours": score("x-reasoner", verdicts, pairs, time.perf_counter() - started)}
    if o.peer:
        peer, = ask_peer(o.peer, "math_verify_pairs.py", [pair[:2] for pair in pairs])
        forms = [score(f"math-verify {peer['version']} {form}", peer[form]["verdicts"], pairs, peer[form]["seconds"])
                 for form in ("plain", "latex")]
        best = max(forms, key=lambda form: form["right"])
        result |= {"math_verify": best | {"version": peer["version"]},
                   "ratio": best["seconds"] / result["ours"]["seconds"]}
        print(f"speed against its better way: {result['ratio']:.0f} x")
    result["hostile"] = time_hostile(o, [line for block in blocks for lines in block.values() for line in lines])
    return result | {"date": str(date.today()), "commit": git_commit(), "machine": platform.platform()}


# --- Attention --------------------------------------------------------------------------------------------------------

@dataclass
class AttentionOptions:
    """The Triton kernels against SDPA's back ends: milliseconds, and the share of what the device can do. Needs a GPU;
    on a CPU two small shapes through torch's paths, to see that the command runs."""
    only: str | None = option(None, "shapes whose name has this in it")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("bfloat16", "of q, k and v", choices=("float32", "float16", "bfloat16"))
    json: bool = option(False, "the last line is one JSON object with everything")


@dataclass
class AttentionShape:
    """B rows of T queries and S keys, or one row of segments of `segment` tokens; H heads on K, of width D."""
    name: str
    B: int
    T: int
    S: int
    H: int
    K: int
    D: int
    causal: bool
    segment: int | None = None

    def flops(self) -> float:
        """Of the forward pass: two products; the backward pass has five."""
        T, S, rows = (self.segment, self.segment, self.T / self.segment) if self.segment else (self.T, self.S, self.B)
        pairs = T * S - T * (T - 1) / 2 if self.causal else T * S
        return 4 * rows * self.H * self.D * pairs


GPU_SHAPES = [
    *(AttentionShape(f"7B causal {T}", 16384 // T, T, T, 28, 4, 128, True) for T in (4096, 8192, 16384)),
    AttentionShape("7B packed, 512 each", 1, 16384, 16384, 28, 4, 128, True, segment=512),
    *(AttentionShape(f"ViT windows {T}", 1, T, T, 16, 16, 80, False, segment=64) for T in (1024, 4096, 16384)),
    *(AttentionShape(f"ViT full {T}", 1, T, T, 16, 16, 80, False) for T in (1024, 4096, 16384)),
    *(AttentionShape(f"7B decode {B} x {S}", B, 1, S, 28, 4, 128, True)
      for B, S in ((1, 4096), (16, 4096), (128, 2048)))]
CPU_SHAPES = [AttentionShape("causal 64", 1, 64, 64, 4, 2, 32, True),
              AttentionShape("windows 256", 1, 256, 256, 2, 2, 16, False, segment=64)]


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of runs for a quarter of a second, after three to warm up."""
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
    """Of one of so many calls, on the GPU alone: it sleeps while the host queues them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def peak_bytes(run: Callable[[], object], device: torch.device, *, less: int) -> int | None:
    """Memory on a GPU beyond what was there before and `less`, the gradients; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before - less


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large product."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device).to(dtype)
    return 2e3 * n**3 / milliseconds(lambda: a @ a, device)


def competitors(shape: AttentionShape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable]:
    """Functions of (q, k, v) by name. SDPA gets segments, here all of one length, as a batch, which is its best case,
    and also with a mask; keys and values of a group are not copied."""
    B, T, S, H, K, n = shape.B, shape.T, shape.S, shape.H, shape.K, shape.segment
    lengths = torch.full((B,), S, device=q.device)
    cu_seqlens = torch.arange(0, T + 1, n, device=q.device) if n else None

    def sdpa(q, k, v, mask=None):
        if n and mask is None:
            q, k, v = (x.view(T // n, n, *x.shape[2:]) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal = shape.causal and T > 1 and mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)

    def backend(kind):
        def run(q, k, v):
            with sdpa_kernel([kind]):
                return sdpa(q, k, v)
        return run

    borders = None
    if n and H == K:  # SDPA's fast back ends take a mask, or groups, not both
        borders = visible(T, S, causal=shape.causal, key_lengths=None, cu_seqlens=cu_seqlens, device=q.device)

    if q.device.type == "cuda" and T == 1:
        found = {"triton": lambda q, k, v: attention_decode_triton(q, k, v, lengths, scale=None)}
    elif q.device.type == "cuda":
        found = {"triton": lambda q, k, v: attention_triton(q, k, v, causal=shape.causal, cu_seqlens=cu_seqlens)}
    else:
        found = {"ours": lambda q, k, v: attention(q, k, v, causal=shape.causal, cu_seqlens=cu_seqlens)}
    if q.device.type == "cuda":
        found |= {"flash": backend(SDPBackend.FLASH_ATTENTION), "cudnn": backend(SDPBackend.CUDNN_ATTENTION)}
    if borders is not None:
        found["masked sdpa"] = lambda q, k, v: sdpa(q, k, v, borders)
    return found | {"sdpa": sdpa}


def time_attention(shape: AttentionShape, device: torch.device, dtype: torch.dtype, ceilings: dict) -> dict:
    """By competitor: ms of forward, and but for decoding of forward + backward; TFLOP/s or GB/s, and its share; peak
    memory beyond inputs and gradients."""
    B, T, S, H, K, D = shape.B, shape.T, shape.S, shape.H, shape.K, shape.D
    decode, result = T == 1, {}
    q, k, v = (torch.randn(size, device=device).to(dtype) for size in ((B, T, H, D), (B, S, K, D), (B, S, K, D)))
    if decode:  # as a KV cache lies
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    upstream = torch.randn_like(q)
    caches = cycle([(k, v)])
    if decode and device.type == "cuda":  # several, by turns: more than the L2 cache holds, as between two steps
        caches = cycle([(k.clone(), v.clone()) for _ in range(-(-2**28 // (k.nbytes + v.nbytes)))])
    for name, function in competitors(shape, q, k, v).items():
        leaves = [x.detach().requires_grad_(not decode) for x in (q, k, v)]

        def backward(out):
            return torch.autograd.grad(out, leaves, upstream.view(out.shape))

        try:
            forward = milliseconds(lambda: function(q, *next(caches)) if decode else function(*leaves), device)
            both = None if decode else milliseconds(lambda: backward(function(*leaves)), device)
        except RuntimeError as error:  # a back end that does not take this shape
            print(f"{shape.name:<22}{name:<14}{str(error).splitlines()[0][:70]}")
            continue
        if decode:
            rate, ceiling = (k.nbytes + v.nbytes) / forward / 1e6, ceilings["copy"] / 1e9
        else:
            rate, ceiling = shape.flops() / forward / 1e9, ceilings["matmul"] / 1e12
        extra = peak_bytes(lambda: function(*leaves) if decode else backward(function(*leaves)), device,
                           less=0 if decode else q.nbytes + k.nbytes + v.nbytes)
        result[name] = {"forward_ms": forward, "forward_backward_ms": both, "rate": rate, "share": rate / ceiling,
                        "extra_bytes": extra}
        print(f"{shape.name:<22}{name:<14}{forward:>9.3f} ms{rate:>9.1f} {'GB/s' if decode else 'TFLOP/s'} "
              f"({100 * rate / ceiling:.0f}%)" + ("" if decode else f"   forward + backward {both:.3f} ms")
              + (f"   {extra / 1e9:.3f} GB" if device.type == "cuda" else ""), flush=True)
    return result


def attention_bench(o: AttentionOptions) -> dict:
    """Prints and returns all shapes."""
    device, dtype = pick_device(o.device), getattr(torch, o.dtype)
    ceilings = {"copy": copy_bandwidth(device), "matmul": matmul_flops(device, dtype)}
    print(f"ceilings: copy {ceilings['copy'] / 1e9:,.0f} GB/s, product {ceilings['matmul'] / 1e12:,.1f} TFLOP/s")
    shapes = [s for s in (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES) if (o.only or "") in s.name]
    if not shapes:
        raise InputError(f"--only {o.only}: no such shape")
    result = {"ceilings": ceilings, "shapes": {s.name: time_attention(s, device, dtype, ceilings) for s in shapes}}
    return result | {"date": str(date.today()), "commit": git_commit(), "torch": torch.__version__, "dtype": o.dtype,
                     "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.platform()}


# --- Log-probs --------------------------------------------------------------------------------------------------------

@dataclass
class LogprobOptions:
    """Log-probs straight from hidden states, forward and backward: time, rate, and memory beyond inputs and gradients.
    On a CPU a small shape through the PyTorch paths, to see that the command runs."""
    tokens: int | None = option(None, "tokens; default 8192, on a CPU 256", low=1)
    shape: str = option("7b", "head of this model; on a CPU a small one", choices=SHAPES)
    peer: str | None = option(None, "Python of an environment with liger-kernel")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("bfloat16", "of hidden states and head", choices=("float32", "float16", "bfloat16"))
    json: bool = option(False, "the last line is one JSON object with everything")


def logprob_contenders(on_gpu: bool) -> dict[str, Callable]:
    """Functions of (hidden, weight, targets) by name: log-probs, or the sum of them for those that can only that."""
    found = {"reference": lambda *x: logprob.token_log_probs_reference(*x)[0],
             "torch, chunked": lambda *x: logprob.token_log_probs_torch(*x)[0]}
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        found["linear_cross_entropy"] = lambda *x: -F.linear_cross_entropy(*x, reduction="sum", options=options)
    if on_gpu:
        found |= {products: lambda *x, products=products: logprob.token_log_probs_triton(*x, products=products)[0]
                  for products in ("triton", "cublas")}
    return found


def time_logprob(function: Callable, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict:
    """Milliseconds of a forward pass that only scores, and of one with its backward pass; and the peak of memory."""
    device = hidden.device
    upstream = torch.linspace(-1, 1, len(hidden), device=device)

    def step():
        out = function(hidden, weight, targets)
        return torch.autograd.grad(out, (hidden, weight), upstream.to(out.dtype) if out.dim() else None)

    with torch.no_grad():
        forward = milliseconds(lambda: function(hidden, weight, targets), device)
    result = {"forward_ms": forward, "forward_backward_ms": milliseconds(step, device)}
    return result | {"extra_bytes": peak_bytes(step, device, less=hidden.nbytes + weight.nbytes)}


def logprob_bench(o: LogprobOptions) -> dict:
    """Prints and returns all contenders. The rate counts the three products that are needed, not those done again."""
    device, dtype = pick_device(o.device), getattr(torch, o.dtype)
    on_gpu = device.type == "cuda"
    N = o.tokens or (8192 if on_gpu else 256)
    C, V = (SHAPES[o.shape]["hidden_size"], SHAPES[o.shape]["vocab_size"]) if on_gpu else (64, 4000)
    hidden = torch.randn(N, C, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, C, device=device) * C**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device)
    ceiling, result = matmul_flops(device, dtype), {}
    print(f"{N} tokens, head {V} x {C}, {o.dtype}; ceiling: product {ceiling / 1e12:,.1f} TFLOP/s")
    for name, function in logprob_contenders(on_gpu).items():
        try:
            result[name] = time_logprob(function, hidden, weight, targets)
        except torch.cuda.OutOfMemoryError:
            print(f"{name:<22}does not fit")
    if o.peer:
        del hidden, weight
        torch.cuda.empty_cache()
        job = {"tokens": N, "width": C, "vocabulary": V, "dtype": o.dtype}
        result |= {r.pop("name"): r for r in ask_peer(o.peer, "liger_cross_entropy.py", job)}
    for name, r in result.items():
        r["rate"] = 6e3 * N * V * C / r["forward_backward_ms"]
        r["share"] = r["rate"] / ceiling
        memory = f"   {r['extra_bytes'] / 1e9:.3f} GB beyond inputs and gradients" if on_gpu else ""
        print(f"{name:<22}forward {r['forward_ms']:>9.3f} ms   forward + backward {r['forward_backward_ms']:>9.3f} ms"
              f"{r['rate'] / 1e12:>8.1f} TFLOP/s ({100 * r['share']:.0f}%){memory}", flush=True)
    about = {"tokens": N, "width": C, "vocabulary": V, "dtype": o.dtype, "ceiling": ceiling}
    return {"ways": result, **about, "date": str(date.today()), "commit": git_commit(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if on_gpu else platform.platform()}


BENCHES = {"rollout": (RolloutOptions, rollout), "rewards": (RewardsOptions, rewards),
           "attention": (AttentionOptions, attention_bench), "logprob": (LogprobOptions, logprob_bench)}


def main(argv: list[str]) -> None:
    names = ", ".join(BENCHES)
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nBenches: {names}. Each has --help.")
        return
    if not argv or argv[0] not in BENCHES:
        raise InputError(f"name one of: {names}")
    options_class, bench = BENCHES[argv[0]]
    options = parse_options(options_class, argv[1:])
    result = bench(options)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
