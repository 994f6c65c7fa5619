"""Stage 1: supervised fine-tuning on long chains of thought, text only.

    python sft.py                               # micro base on micro data, on a CPU, in minutes
    python sft.py --recipe paper --model Qwen2.5-VL-7B-Instruct --data openthoughts.jsonl
    python sft.py --answer-only --out runs/sft-answer-only      # the ablation without thinking
    python sft.py --resume                      # goes on after an interruption, bit for bit

Paper: section 3.1, appendix A. The vision tower is frozen and no image is seen. A step: take a
batch of worked responses, pack them end to end, and lower -log p of the response tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.datasets import Example, load_examples
from data.sequences import IDLE_ROW, Pack, Row, example_pieces, make_pack, make_row, plan_packs
from data.tokenizer import Piece, Tokenizer, check_vocabulary, encode_chats
from hub.device import memory_phase
from hub.options import MICRO_DATA, option, parse_options, run_command
from model import Qwen2_5_VL, score
from rewards import accuracy_reward
from training.optimizer import (
    forward_dtype,
    load_for_training,
    make_optimizer,
    optimizer_step,
    update_remedies,
)
from training.options import TrainOptions
from training.parallel import deal, processes, total, training_device
from training.plan import print_plan, settle
from training.rehearsal import Rehearsal
from training.rows import RowFile
from training.run import Run
from training.validation import MAX_BATCH, Validation

PAPER = {
    "epochs": 4,
    "max_steps": None,
    "batch_size": 128,
    "max_length": 4096,
    "learning_rate": 1e-5,
    "lr_decay": 0.8,
    "save_every": 100,
    "eval_new_tokens": 4096,
}
RECIPES = {
    "micro": {},
    "paper": {"prompt_style": "train", **PAPER},
    "med": {"prompt_style": "mcq", **PAPER},
}

# What the rows of tokens depend on, besides data and tokenizer (training/rows.py).
ROW_OPTIONS = ("prompt_style", "max_length", "answer_only", "skip_bad_lines")


@dataclass
class SFTOptions(TrainOptions):
    """Fine-tune on worked responses. The loss is on the response only."""

    data: str = option(str(MICRO_DATA / "sft.jsonl"), "questions with worked responses")
    out: str = option("runs/sft", "run folder")
    learning_rate: float = option(2e-4, "learning rate of the first epoch", low=0.0)
    lr_decay: float = option(1.0, "factor on it after each epoch", low=0.0, high=1.0)
    epochs: int = option(2, "passes over the data", low=1)
    max_steps: int | None = option(80, "stop after so many optimiser steps", low=1)
    batch_size: int = option(64, "sequences per optimiser step", low=1)
    max_length: int = option(1024, "longer sequences are cut to so many tokens", low=2)
    answer_only: bool = option(False, "train on question -> answer with no thinking")


def sft_loss(model: Qwen2_5_VL, pack: Pack) -> Tensor:
    """Returns the sum (not the mean) of -log p over the pack's scored tokens: its responses'.

    The caller divides by the scored tokens of the whole batch, so that the gradient does not depend
    on how the batch is split into forward passes (the mean of their means would weigh a token by
    the number of its neighbours: huggingface/trl#3231).
    """
    log_probs, _ = score(model, pack)
    return -log_probs.sum()


def train_step(
    model: Qwen2_5_VL,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    learning_rate: float,
    options: SFTOptions,
) -> dict:
    """Takes one optimiser step on a batch of rows. Returns its metrics."""
    device = model.head_weight.device
    # 1. The loss is a mean over all response tokens of the batch, however it is packed.
    num_tokens = sum(int(row.scored.sum()) for row in rows)
    own_loss = 0.0
    # 2. Packs are as many forward and backward passes as memory asks for; gradients add up. They
    #    fill up best when the longest rows come first. Of several processes each takes its share.
    longest_first = sorted(rows, key=lambda row: -len(row.ids))
    packs = []
    for chosen in plan_packs(longest_first, options.pack_tokens):
        packs.append([longest_first[i] for i in chosen])
    for members in deal(packs, idle=[IDLE_ROW]):
        pack = make_pack(members).to(device)
        loss = sft_loss(model, pack) / num_tokens
        loss.backward()
        own_loss += loss.item()
    # 3. One step of AdamW on the sum.
    grad_norm = optimizer_step(model, optimizer, learning_rate, options.max_grad_norm)
    [loss] = total([own_loss])
    return {
        "loss": loss,
        "lr": learning_rate,
        "grad_norm": grad_norm,
        "tokens": sum(len(row.ids) for row in rows),
    }


def load_rows(options: SFTOptions, tokenizer: Tokenizer) -> list[Row]:
    """Returns all examples as rows of tokens.

    Those whose prompt alone fills max_length have no token to score: they are dropped and counted.
    """

    def convert(example: Example) -> tuple[str, list[Piece]]:
        style, answer_only = options.prompt_style, options.answer_only
        return example.id, example_pieces(example, tokenizer, style=style, answer_only=answer_only)

    def tokenise(block: list[tuple[str, list[Piece]]]) -> list[Row | None]:
        rows = []
        encoded = encode_chats([pieces for _, pieces in block], tokenizer)
        for (name, _), (ids, mask) in zip(block, encoded):
            row = make_row(ids[: options.max_length], mask[: options.max_length], name)
            rows.append(row if row.scored.any() else None)
        return rows

    too_long = f"the prompt fills --max-length {options.max_length}"
    return load_examples(
        options.data, convert, tokenise, skip_bad=options.skip_bad_lines, too_long=too_long
    ).items


def reward(example: Example, response: str) -> float:
    """Returns 1.0 for a right final answer, else 0.0: what validation measures."""
    return accuracy_reward(response, example.truths, example.options, precision=example.precision)


def rehearse(options: SFTOptions, rehearsal: Rehearsal) -> None:
    """Takes a step on rows as long as they may be, for the memory plan (training/plan.py)."""
    model = load_for_training(options)
    optimizer = make_optimizer(model, options)
    rehearsal.watch(model, optimizer)
    if options.eval_every:
        rehearsal.rollout(model, forward_dtype(options), 2048, options.eval_new_tokens, MAX_BATCH)
    rows = rehearsal.rows(max(options.pack_tokens, options.max_length))
    train_step(model, optimizer, rows, options.learning_rate, options)


def train(options: SFTOptions) -> None:
    """Runs the whole stage: from the options to the run folder."""
    # Refuse an occupied folder and what does not fit a GPU, before anything is loaded.
    run = Run(options)
    options = settle(options, rehearse)
    with processes(training_device(options.device)):
        train_on_ranks(options, run)


def train_on_ranks(options: SFTOptions, run: Run) -> None:
    """Loads, and takes all steps. Every process runs this."""
    # 1. Load; only then touch the disk.
    tokenizer = Tokenizer.from_pretrained(options.model)
    row_file = RowFile(run, ROW_OPTIONS)
    rows = row_file.rows(lambda: load_rows(options, tokenizer))
    validation = Validation(options, tokenizer, reward)
    with memory_phase("loading", *update_remedies(options)):
        model = load_for_training(options)
        check_vocabulary(tokenizer, model.config)
        optimizer = make_optimizer(model, options)
        run.begin(model, optimizer)
    row_file.keep()

    # 2. Steps. The learning rate falls after each epoch.
    for epoch, chosen in run.steps(len(rows), options.batch_size):
        batch = [rows[i] for i in chosen]
        learning_rate = options.learning_rate * options.lr_decay**epoch
        with run.explaining_divergence([row.example for row in batch], learning_rate):
            with memory_phase("the training step", *update_remedies(options)):
                metrics = train_step(model, optimizer, batch, learning_rate, options)
        run.finish_step(metrics | validation.after_step(run))


def main(argv: list[str]) -> None:
    options = parse_options(SFTOptions, argv, RECIPES)
    if options.plan:
        print_plan(options, rehearse)
        return
    train(options)


if __name__ == "__main__":
    run_command(main)
