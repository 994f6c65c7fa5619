"""A step of SFT, beside a plain loop of transformers and AdamW over padded rows.

    python benchmarks/sft.py --peer PEER/bin/python                       # micro/base, its decoder
    python benchmarks/sft.py --peer PEER/bin/python --model Qwen2.5-0.5B --data gsm8k.jsonl \\
        --prompt-style train --rows 4 --steps 2 --threads 2 --peer-batches 2 4

The peer's environment is made by `python -m venv PEER && PEER/bin/pip install torch transformers`.
Both sides take the same steps: on the same rows (the first ones of --data), in float32, with AdamW
(fused on both), the same rate and clipping, nothing computed twice in the backward pass. A row's
loss counts on its response alone. Ours packs the rows (`sft.train_step`). The peer sorts them by
length and pads them on the right; of its --peer-batches, which differ in rounding only, the fastest
counts. The losses of the first step are those of the same batch under the same weights, so they
must be equal; those of the last one show that both have learnt the same.

The sides take turns, and each loads the model anew. A turn's first step warms up.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sft  # noqa: E402
from benchmarks.common import about, alternate, ask_peer, step_figures, write_decoder  # noqa: E402
from data import Row, Tokenizer  # noqa: E402
from hub.config import Config  # noqa: E402
from hub.errors import InputError  # noqa: E402
from hub.options import MICRO_BASE, MICRO_DATA, option, parse_options, run_command  # noqa: E402
from training.optimizer import load_for_training, make_optimizer  # noqa: E402


@dataclass
class SFTBenchOptions:
    """Seconds of a step of SFT, of ours and of a plain loop of transformers."""

    model: str = option(str(MICRO_BASE), "model folder")
    data: str = option(str(MICRO_DATA / "sft.jsonl"), "questions with worked responses")
    prompt_style: str = option("direct", "how a question is asked", choices=("direct", "train"))
    rows: int = option(64, "rows of a step, the first ones of --data", low=1)
    max_length: int = option(1024, "longer rows are cut to so many tokens", low=2)
    pack_tokens: int = option(4096, "ours: tokens of a forward pass", low=1)
    steps: int = option(5, "measured in a turn, behind one to warm up", low=1)
    rounds: int = option(4, "in each of which both sides have a turn", low=1)
    learning_rate: float = option(1e-5, "of AdamW", low=0.0)
    peer: str | None = option(None, "Python of an environment with transformers")
    peer_batches: list[str] = option(["16", "32", "64"], "its rows in a forward pass")
    threads: int = option(1, "of the CPU", low=1)
    json: bool = option(False, "the last line is one JSON object")


def ours(rows: list[Row], training: sft.SFTOptions, options: SFTBenchOptions) -> dict:
    """Takes a turn's steps. Returns the seconds of each but the first, and all losses."""
    model = load_for_training(training)
    optimizer = make_optimizer(model, training)
    torch.set_num_threads(options.threads)  # loading sets it to 1 for a small model
    seconds, losses = [], []
    for _ in range(1 + options.steps):
        started = time.perf_counter()
        metrics = sft.train_step(model, optimizer, rows, training.learning_rate, training)
        seconds.append(time.perf_counter() - started)
        losses.append(metrics["loss"])
    return {"seconds": seconds[1:], "losses": losses}


def theirs(rows: list[Row], folder: str, batches: list[int], options: SFTBenchOptions) -> list:
    """Returns the same of the peer's turn, for each of its batch sizes."""
    job = {
        "model": folder,
        "rows": [row.ids.tolist() for row in rows],
        "scored": [row.scored.tolist() for row in rows],
        "batches": batches,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "max_grad_norm": sft.SFTOptions.max_grad_norm,
        "threads": options.threads,
    }
    return ask_peer(options.peer, "transformers_sft.py", job)


def measure(folder: str, options: SFTBenchOptions) -> dict:
    """Lets both sides take their turns. Returns the figures."""
    training = sft.SFTOptions(
        model=folder,
        data=options.data,
        prompt_style=options.prompt_style,
        max_length=options.max_length,
        learning_rate=options.learning_rate,
        pack_tokens=options.pack_tokens,
        device="cpu",
        dtype="float32",
        checkpointing="off",
    )
    rows = sft.load_rows(training, Tokenizer.from_pretrained(folder))[: options.rows]
    if len(rows) < options.rows:
        raise InputError(f"{options.data}: has {len(rows)} rows only")
    tokens = sum(len(row.ids) for row in rows)
    result = {
        "rows": len(rows),
        "tokens": tokens,
        "scored_tokens": sum(int(row.scored.sum()) for row in rows),
        "longest": max(len(row.ids) for row in rows),
    }

    # The peer's first turn tries all batch sizes, the others the one that was fastest.
    batches = [int(size) for size in options.peer_batches]
    our_turns, their_turns = [], []
    for side in alternate(options.rounds, options.peer is not None):
        if side == "ours":
            our_turns.append(ours(rows, training, options))
            continue
        tried = {found["batch"]: found for found in theirs(rows, folder, batches, options)}
        speeds = {batch: step_figures(found["seconds"], tokens) for batch, found in tried.items()}
        if not their_turns:
            result["peer_seconds_by_batch"] = {b: speed["seconds"] for b, speed in speeds.items()}
        batches = [min(speeds, key=lambda batch: speeds[batch]["seconds"])]
        their_turns.append(tried[batches[0]])

    for name, turns in (("ours", our_turns), ("transformers", their_turns)):
        if turns:
            seconds = [second for turn in turns for second in turn["seconds"]]
            result[name] = step_figures(seconds, tokens)
            result[name] |= {"first_loss": turns[0]["losses"][0]}
            result[name] |= {"last_loss": turns[0]["losses"][-1]}
    if their_turns:
        result["transformers"]["batch"] = batches[0]
        result["transformers"]["version"] = their_turns[0]["transformers"]
        result["ratio"] = result["transformers"]["seconds"] / result["ours"]["seconds"]
    return result


def print_table(result: dict, steps: int) -> None:
    """Prints a line for each side."""
    print(f"{result['rows']} rows, {result['tokens']} tokens, {result['scored_tokens']} of them")
    print(f"scored, the longest row {result['longest']}; losses before the first and the last of")
    print(f"{1 + steps} steps")
    for name in ("ours", "transformers"):
        if name in result:
            found = result[name]
            line = f"{name:<14}{found['seconds']:>9.3f} s a step"
            line += f"{found['tokens_per_second']:>12,.1f} tokens/s"
            print(f"{line}   losses {found['first_loss']:.6f} {found['last_loss']:.6f}")
    if "ratio" in result:
        print(f"ratio {result['ratio']:.2f}; seconds of its batches {result['peer_seconds_by_batch']}")


def main(argv: list[str]) -> None:
    options = parse_options(SFTBenchOptions, argv)
    if not all(size.isdigit() and int(size) for size in options.peer_batches):
        sizes = " ".join(options.peer_batches)
        raise InputError(f"--peer-batches must be numbers, not {sizes}")
    with tempfile.TemporaryDirectory() as decoder:
        folder = options.model
        if Config.from_pretrained(folder).vision is not None:
            write_decoder(folder, decoder)
            folder = decoder
        result = measure(folder, options)
    print_table(result, options.steps)
    if options.json:
        print(json.dumps(result | {"model": Path(options.model).name} | about(options.threads)))


if __name__ == "__main__":
    run_command(main)
