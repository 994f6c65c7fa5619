"""Stage 1: supervised fine-tuning on long chains of thought, text only (paper: section 3.1, appendix A).

    python sft.py                                                       # micro base on micro data, on a CPU, in minutes
    python sft.py --recipe paper --model Qwen2.5-VL-7B-Instruct --data openthoughts.jsonl --out runs/sft-7b
    python sft.py --answer-only --out runs/sft-answer-only              # the paper's ablation without thinking
    python sft.py --resume                                              # go on after an interruption, bit for bit

The vision tower is frozen and no image is seen.
"""
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from data import (Example, InputError, Row, Tokenizer, check_vocabulary, collate, collate_packed, convert_examples,
                  encode_example, epoch_order, make_row, pack, report_bad)
from hub.options import MICRO_DATA, option, parse_options, run_command
from kernels import token_log_probs
from model import Qwen2_5_VL
from training.optimizer import autocast, load_for_training, make_optimizer, optimizer_step
from training.run import Run, TrainOptions

PAPER = {"epochs": 4, "max_steps": None, "batch_size": 128, "max_length": 4096, "learning_rate": 1e-5, "lr_decay": 0.8,
         "micro_batch_size": 1, "pack_tokens": 4096, "save_every": 100}
RECIPES = {"micro": {}, "paper": {"prompt_style": "train", **PAPER}, "med": {"prompt_style": "mcq", **PAPER}}


@dataclass
class SFTOptions(TrainOptions):
    """Fine-tune on worked responses. The loss is on the response only."""
    data: str = option(str(MICRO_DATA / "sft.jsonl"), "questions with worked responses")
    out: str = option("runs/sft", "run folder")
    learning_rate: float = option(2e-4, "learning rate of the first epoch", low=0.0)
    epochs: int = option(2, "passes over the data", low=1)
    lr_decay: float = option(1.0, "factor on the learning rate after each epoch", low=0.0, high=1.0)
    batch_size: int = option(64, "sequences per optimiser step", low=1)
    max_length: int = option(1024, "longer sequences are cut to so many tokens", low=2)
    pack_tokens: int = option(0, "pack sequences, which do not see one another, into forward passes of so many tokens; "
                                 "0: pad --micro-batch-size of them. The gradient is the same", low=0)
    max_steps: int | None = option(80, "stop after so many optimiser steps", low=1)
    answer_only: bool = option(False, "train on question -> answer with no thinking")


def sft_loss(model: Qwen2_5_VL, input_ids: Tensor, loss_mask: Tensor, position_ids: Tensor | None = None,
             cu_seqlens: Tensor | None = None) -> Tensor:
    """Sum (not mean) of -log p over the tokens of input_ids [B, T] that loss_mask marks, each given those before it.

    The caller divides by the loss tokens of the whole optimiser batch, so that the gradient does not depend on how the
    batch is split (the mean of micro-batch means would weigh a token by its neighbours' number: TRL#3231).
    position_ids and cu_seqlens: of a packed row (`collate_packed`).
    """
    device = model.head_weight.device
    input_ids, loss_mask = input_ids.to(device), loss_mask.to(device)
    position_ids = None if position_ids is None else position_ids.to(device)  # the borders stay where Python reads them
    hidden = model(input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens)
    hidden = hidden[:, :-1][loss_mask[:, 1:]]                                              # [N, C]: only what is scored
    log_probs, _ = token_log_probs(hidden, model.head_weight, input_ids[:, 1:][loss_mask[:, 1:]])
    return -log_probs.sum()


def load_rows(options: SFTOptions, tokenizer: Tokenizer) -> list[Row]:
    """All examples as tokens, read one by one: of the text nothing is kept. Those whose prompt alone fills max_length
    are dropped and counted."""
    def encode(example: Example) -> Row:
        return make_row(*encode_example(example, tokenizer, style=options.prompt_style, max_length=options.max_length,
                                        answer_only=options.answer_only))

    bad = [] if options.skip_bad_lines else None
    rows, dropped = [], 0
    for row in tqdm(convert_examples(options.data, encode, bad), desc="reading", unit=" examples", delay=5):
        if row[1][1:].any():
            rows.append(row)
        else:
            dropped += 1
    report_bad(options.data, bad)
    if not rows:
        raise InputError(f"{options.data}: no example fits --max-length {options.max_length}")
    if dropped:
        print(f"{dropped} of {len(rows) + dropped} examples dropped: the prompt fills {options.max_length} tokens")
    return rows


def micro_batches(rows: list[Row], options: SFTOptions) -> Iterator[tuple[Tensor, ...]]:
    """What sft_loss takes, one forward pass after the other: packed rows, or padded ones of like length."""
    if options.pack_tokens:
        yield from map(collate_packed, pack(rows, options.pack_tokens))
        return
    rows = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(rows), options.micro_batch_size):
        yield collate(rows[start:start + options.micro_batch_size])


def train_step(model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, rows: list[Row], learning_rate: float,
               options: SFTOptions) -> dict:
    """One optimiser step on a batch of rows, in as many forward passes as it takes."""
    num_tokens = sum(int(mask[1:].sum()) for _, mask in rows)
    total = 0.0
    for inputs in micro_batches(rows, options):
        with autocast(model, options):
            loss = sft_loss(model, *inputs) / num_tokens
        loss.backward()
        total += loss.item()
    grad_norm = optimizer_step(model, optimizer, learning_rate, options.max_grad_norm)
    return {"loss": total, "lr": learning_rate, "grad_norm": grad_norm, "tokens": sum(len(ids) for ids, _ in rows)}


def train(options: SFTOptions) -> None:
    """The whole run: from the options to the run folder."""
    if 0 < options.pack_tokens < options.max_length:
        raise InputError(f"--pack-tokens {options.pack_tokens} is less than --max-length {options.max_length}")
    tokenizer = Tokenizer.from_pretrained(options.model)
    rows = load_rows(options, tokenizer)
    model = load_for_training(options)
    check_vocabulary(tokenizer, model.config)
    run = Run(options)
    optimizer = make_optimizer(model, options)
    if options.resume:
        run.load_checkpoint(model, optimizer)
    steps_per_epoch = -(-len(rows) // options.batch_size)  # the last batch of an epoch may be smaller
    total_steps = min(options.epochs * steps_per_epoch, options.max_steps or 10**12)
    progress = tqdm(range(run.step, total_steps), initial=run.step, total=total_steps, desc="sft", unit="step")
    for step in progress:
        started = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        chosen = epoch_order(len(rows), options.seed, epoch)[place * options.batch_size:][:options.batch_size]
        learning_rate = options.learning_rate * options.lr_decay**epoch
        metrics = train_step(model, optimizer, [rows[i] for i in chosen], learning_rate, options)
        seconds = time.perf_counter() - started
        run.step = step + 1
        run.log("metrics.jsonl", {"step": run.step, "epoch": epoch, **metrics,
                                  "tokens_per_second": metrics["tokens"] / seconds, "seconds": seconds})
        progress.set_postfix(loss=f"{metrics['loss']:.3f}")
        run.save(model, optimizer, last=run.step == total_steps)


def main(argv: list[str]) -> None:
    train(parse_options(SFTOptions, argv, RECIPES))


if __name__ == "__main__":
    run_command(main)
