"""Parity with transformers on real text: logits, greedy continuations, and the loss of SFT.

    python benchmarks/parity.py DIR --data gsm8k/test.jsonl --peer PEER/bin/python

The text is the file's questions and worked responses, one behind the other, up to --tokens. The
continuations are of its first questions in the chat template, token by token the likeliest; the
loss is that of its first examples as training sees them: ours of packs through sft.py, theirs the
cross-entropy of one row at a time. Needs a file whose records have responses, such as GSM8K. The
peer's environment is made as for check_weights.py, whose bounds hold here, too.

Where a continuation differs, what follows cannot be compared any more. So the place of the first
difference is shown, with the distance between the two highest logits there: if it is of the size of
rounding (1e-4), both programs saw a tie.
"""

import json
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.agreement import ask_for_logits, compare_logits, machine, peak_bytes  # noqa: E402
from benchmarks.common import ask_peer  # noqa: E402
from data import (  # noqa: E402
    Example,
    ImageConfig,
    Prompt,
    Row,
    Tokenizer,
    encode_example,
    format_prompt,
    make_pack,
    make_prompt,
    make_row,
    plan_packs,
    read_examples,
)
from data.completions import SamplingParams  # noqa: E402
from hub.config import Config  # noqa: E402
from hub.device import DEVICE_HELP, limit_threads, pick_device  # noqa: E402
from hub.errors import InputError  # noqa: E402
from hub.options import option, parse_options, run_command  # noqa: E402
from model import Qwen2_5_VL  # noqa: E402
from sample import Sampler  # noqa: E402
from sft import sft_loss  # noqa: E402
from training.journal import git_commit  # noqa: E402


@dataclass
class ParityOptions:
    """Compares with transformers on a file of worked questions."""

    folder: str = option(None, "model folder", positional=True)
    data: str | None = option(None, "questions with worked responses")
    peer: str = option(sys.executable, "Python of an environment with transformers")
    tokens: int = option(2000, "of the text", low=2)
    questions: int = option(50, "that are continued", low=1)
    new_tokens: int = option(128, "of a continuation, at most", low=1)
    examples: int = option(20, "of SFT", low=1)
    pack_tokens: int = option(2048, "of our packs", low=1)
    peer_batch: int = option(10, "questions that transformers continues at a time", low=1)
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option("float32", "of the weights", choices=("float32", "bfloat16"))
    json: str | None = option(None, "a file for all figures")


def read_data(options: ParityOptions) -> list[Example]:
    """Returns the file's first examples, as many as any of the three comparisons needs."""
    if options.data is None:
        raise InputError("--data is missing")
    examples = []
    for example in read_examples(options.data):
        if example.response is None:
            raise InputError(f"{example.where}: field 'response' is missing")
        examples.append(example)
        # A question and its response are 60 tokens or more; few texts need more examples.
        if len(examples) >= max(options.questions, options.examples, options.tokens // 20):
            break
    if len(examples) < max(options.questions, options.examples):
        raise InputError(f"{options.data}: has {len(examples)} examples only")
    return examples


def text_ids(examples: list[Example], tokenizer: Tokenizer, limit: int) -> list[int]:
    """Returns the first ids of all questions and responses, one behind the other."""
    text = "\n\n".join(f"{example.question}\n{example.response}" for example in examples)
    ids = tokenizer.encode(text)
    if len(ids) < limit:
        raise InputError(f"the text has {len(ids)} tokens only")
    return ids[:limit]


def make_rows(examples: list[Example], tokenizer: Tokenizer) -> list[Row]:
    """Returns the examples as sft.py makes them."""
    rows = []
    for example in examples:
        ids, mask = encode_example(example, tokenizer, style="train", max_length=4096)
        rows.append(make_row(ids, mask, example.id))
    return rows


# --- Our side ---


def our_losses(model: Qwen2_5_VL, rows: list[Row], pack_tokens: int) -> tuple[float, list[float]]:
    """Returns the batch's loss as a training step measures it, in packs; and that of each row."""
    device = model.head_weight.device
    num_tokens = sum(int(row.scored.sum()) for row in rows)
    batch = 0.0
    for chosen in plan_packs(rows, pack_tokens):
        pack = make_pack([rows[i] for i in chosen]).to(device)
        batch += sft_loss(model, pack).item() / num_tokens
    each = [
        sft_loss(model, make_pack([row]).to(device)).item() / int(row.scored.sum()) for row in rows
    ]
    return batch, each


def first_difference(
    model: Qwen2_5_VL, prompt: Prompt, ours: list[int], theirs: list[int]
) -> dict | None:
    """Returns where two continuations part, and how far the two highest logits are from one
    another there (by a run without a cache); None if they are equal."""
    if ours == theirs:
        return None
    same = 0
    while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
        same += 1
    ids = torch.tensor([prompt.ids + ours[:same]], device=model.head_weight.device)
    best = model.logits(model(ids)[0, -1]).topk(2)
    return {
        "place": same,
        "ours": ours[same : same + 1],
        "theirs": theirs[same : same + 1],
        "likeliest": best.indices.tolist(),
        "gap": (best.values[0] - best.values[1]).item(),
    }


# --- Both sides ---


@torch.no_grad()
def measure(options: ParityOptions) -> dict:
    """Runs our side, then theirs, and returns all figures."""
    # 1. What both get.
    config = Config.from_pretrained(options.folder)
    limit_threads(config)
    device, dtype = pick_device(options.device), getattr(torch, options.dtype)
    tokenizer = Tokenizer.from_pretrained(options.folder)
    examples = read_data(options)
    ids = text_ids(examples, tokenizer, options.tokens)
    rows = make_rows(examples[: options.examples], tokenizer)
    prompts = [
        make_prompt(format_prompt(example, "direct"), [], tokenizer, ImageConfig())
        for example in examples[: options.questions]
    ]

    # 2. Our side.
    model = Qwen2_5_VL.from_pretrained(options.folder, device=device, dtype=dtype)
    hidden = model(torch.tensor([ids], device=device))[0]
    logits = torch.cat([model.logits(part).float().cpu() for part in hidden.split(256)])
    batch_loss, losses = our_losses(model, rows, options.pack_tokens)
    sampler = Sampler(model, tokenizer)
    started = time.perf_counter()
    groups = sampler.generate(prompts, SamplingParams(options.new_tokens, 0.0), progress=True)
    our_seconds = time.perf_counter() - started
    ours = [group[0].ids for group in groups]
    del sampler, model

    # 3. Their side: logits and losses in one process, continuations in another.
    figures, their_losses, about = compare_forward(options, device, ids, rows, logits)
    theirs, their_seconds = continue_theirs(options, device, prompts, tokenizer, config)

    # 4. Where continuations part, our model is asked once more.
    model = Qwen2_5_VL.from_pretrained(options.folder, device=device, dtype=dtype)
    parted = {}
    for i, (prompt, one, other) in enumerate(zip(prompts, ours, theirs)):
        difference = first_difference(model, prompt, one, other)
        if difference is not None:
            parted[examples[i].id] = difference
    counts = [int(row.scored.sum()) for row in rows]
    their_batch = sum(loss * n for loss, n in zip(their_losses, counts)) / sum(counts)
    return {
        "about": {
            "model": Path(options.folder).resolve().name,
            "data": Path(options.data).name,
            "date": str(date.today()),
            "commit": git_commit(),
            "machine": machine(device),
            "dtype": options.dtype,
            "torch": torch.__version__,
            **about,
        },
        "logits": {"tokens": len(ids)} | figures,
        "loss": {
            "examples": len(rows),
            "scored_tokens": sum(counts),
            "ours": batch_loss,
            "transformers": their_batch,
            "max_diff_of_an_example": max(abs(a - b) for a, b in zip(losses, their_losses)),
        },
        "greedy": {
            "questions": len(prompts),
            "equal": len(prompts) - len(parted),
            "tokens": sum(map(len, ours)),
            "seconds": {
                "ours": our_seconds,
                f"transformers in batches of {options.peer_batch}": their_seconds,
            },
            "parted": parted,
        },
        "peak_bytes": peak_bytes(device),
    }


def compare_forward(
    options: ParityOptions, device: torch.device, ids: list[int], rows: list[Row], logits: Tensor
) -> tuple[dict, list[float], dict]:
    """Returns how far our logits are from transformers', its losses, and its versions."""
    inputs = {"text.ids": torch.tensor(ids)}
    for i, row in enumerate(rows):
        inputs[f"{i:04d}.ids"], inputs[f"{i:04d}.scored"] = row.ids.long(), row.scored
    asked = ask_for_logits(
        options.peer, options.folder, inputs, device=str(device), dtype=options.dtype
    )
    with asked as (theirs, file):
        if theirs["loading"]:
            raise InputError(f"{options.folder}: transformers lacks {theirs['loading'][0]}")
        found = compare_logits(logits, file.get_tensor("text"))
    losses = [theirs["losses"][f"{i:04d}"] for i in range(len(rows))]
    return found, losses, {"transformers": theirs["transformers"]}


def continue_theirs(
    options: ParityOptions,
    device: torch.device,
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    config: Config,
) -> tuple[list[list[int]], float]:
    """Returns transformers' continuations, padded on the left in their batches, and its seconds."""
    job = {
        "model": options.folder,
        "prompts": [prompt.ids for prompt in prompts],
        "samples": 1,
        "new_tokens": options.new_tokens,
        "temperature": 0.0,
        "stop_ids": list(tokenizer.stop_ids),
        "suppressed_ids": tokenizer.never_sampled(config.vocab_size).tolist(),
        "pad_id": tokenizer.endoftext,
        "batches": [options.peer_batch],
        "caches": ["dynamic"],
        "repeats": 1,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "dtype": options.dtype,
    }
    [result] = ask_peer(options.peer, "transformers_generate.py", job)
    return result["ids"], result["seconds"][0]


def print_figures(figures: dict) -> None:
    logits, loss, greedy = figures["logits"], figures["loss"], figures["greedy"]
    print(f"logits     {logits['tokens']:,} tokens: max |diff| {logits['max_diff']:.2g}", end=", ")
    print(f"mean KL {logits['mean_kl']:.2g} nats, likeliest token the same at {logits['top1']:.2%}")
    print(f"SFT loss   {loss['examples']} examples, {loss['scored_tokens']:,} tokens", end=": ")
    print(f"ours {loss['ours']:.6f}, transformers {loss['transformers']:.6f}", end="; ")
    print(f"of an example at most {loss['max_diff_of_an_example']:.2g} apart")
    print(
        f"greedy     {greedy['equal']} of {greedy['questions']} equal, {greedy['tokens']:,} tokens"
    )
    for name, where in greedy["parted"].items():
        print(f"  {name}: part at token {where['place']}, top-2 gap {where['gap']:.2g}")


def main(argv: list[str]) -> None:
    options = parse_options(ParityOptions, argv)
    figures = measure(options)
    print_figures(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
