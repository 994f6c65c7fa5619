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
from benchmarks.common import (  # noqa: E402
    about,
    alternate,
    ask_peer,
    give_memory_back,
    step_figures,
    write_decoder,
)
from data import Row, Tokenizer, encode_example, make_row, read_examples  # noqa: E402
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


def first_rows(tokenizer: Tokenizer, options: SFTBenchOptions) -> list[Row]:
    """Returns the first rows of --data that have a token to be scored."""
    rows = []
    for example in read_examples(options.data):
        ids, scored = encode_example(
            example, tokenizer, style=options.prompt_style, max_length=options.max_length
        )
        rows.append(make_row(ids, scored, example.id))
        if not rows[-1].scored.any():
            rows.pop()
        if len(rows) == options.rows:
            return rows
    raise InputError(f"{options.data}: has {len(rows)} rows only")


def ours(rows: list[Row], training: sft.SFTOptions, options: SFTBenchOptions) -> dict:
    """Takes a turn's steps. Returns the seconds of each but the first, and all losses."""
    model = load_for_training(training)
    optimizer = make_optimizer(model, training)
    torch.set_num_threads(options.threads)  # loading sets it to 1 for a small model
    seconds, busy, losses = [], [], []
    for _ in range(1 + options.steps):
        started, worked = time.perf_counter(), time.process_time()
        metrics = sft.train_step(model, optimizer, rows, training.learning_rate, training)
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - worked)
        losses.append(metrics["loss"])
    return {"seconds": seconds[1:], "busy": busy[1:], "losses": losses}


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
    rows = first_rows(Tokenizer.from_pretrained(folder), options)
    tokens = sum(len(row.ids) for row in rows)
    result = {
        "rows": len(rows),
        "tokens": tokens,
        "scored_tokens": sum(int(row.scored.sum()) for row in rows),
        "longest": max(len(row.ids) for row in rows),
    }

    # The peer's first turn tries all batch sizes, the others the one that was fastest.
    batches = [int(size) for size in options.peer_batches]
    turns = {"ours": [], "transformers": []}
    for side in alternate(options.rounds, options.peer is not None):
        if side == "ours":
            turns["ours"].append(ours(rows, training, options))
            give_memory_back()
            continue
        tried = {found["batch"]: found for found in theirs(rows, folder, batches, options)}
        busy = {batch: step_figures([found], tokens)["busy"] for batch, found in tried.items()}
        if not turns["transformers"]:
            result["peer_busy_by_batch"] = busy
        batches = [min(busy, key=busy.get)]
        turns["transformers"].append(tried[batches[0]] | {"batch": batches[0]})

    for name in [name for name in turns if turns[name]]:
        first = turns[name][0]
        result[name] = step_figures(turns[name], tokens)
        result[name] |= {"first_loss": first["losses"][0], "last_loss": first["losses"][-1]}
    if turns["transformers"]:
        result["transformers"] |= {key: first[key] for key in ("batch", "transformers")}
        for figure in ("seconds", "busy"):
            ratio = result["transformers"][figure] / result["ours"][figure]
            result["ratio" if figure == "seconds" else "busy_ratio"] = ratio
    return result


def print_table(result: dict, steps: int) -> None:
    """Prints a line for each side."""
    print(
        f"{result['rows']} rows of at most {result['longest']} tokens, {result['tokens']} in all,"
    )
    print(f"{result['scored_tokens']} of them scored; losses of steps 1 and {1 + steps}")
    for name in ("ours", "transformers"):
        if name in result:
            found = result[name]
            line = f"{name:<14}{found['seconds']:8.3f} s a step ({found['busy']:.3f} s busy)"
            line += f"{found['tokens_per_second']:>12,.1f} tokens/s"
            print(f"{line}   losses {found['first_loss']:.6f} {found['last_loss']:.6f}")
    if "ratio" in result:
        print(f"ratio {result['ratio']:.2f} ({result['busy_ratio']:.2f} of busy seconds);", end=" ")
        print(f"its batches' busy seconds {result['peer_busy_by_batch']}")


def main(argv: list[str]) -> None:
    """Measures both sides in turns, and prints the table."""
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
