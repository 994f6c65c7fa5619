"""Rebuilds the micro base from nothing: our stand-in for Qwen's own pre-training.

    python micro/pretrain.py --seed 0 --out micro/base          # 8 minutes on 2 idle CPU cores
    python micro/pretrain.py --seed 0 --chains none text both --out runs/bases    # three bases
    python micro/pretrain.py --seed 0 --width 64 --out runs/narrow                # 192: a wide one

The base can read text and images, knows every single step, and looks up any numbered operation or
marked arrow; but the chains of thought that it has seen stop after two steps and answer with what
they have by then. Stages:
    align    ViT and merger learn to tell the glyphs apart, through a throw-away head on each image
             token; then the ViT's blocks stay frozen
    text     the decoder alone, on text prompts
    mixed    merger and decoder, on image and text prompts
    final    the same with a lower learning rate; with --chains text (or both) 10% of the chains of
             thought on text (and on images) are complete. Several bases share all stages but this
"""

import argparse
import copy
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import ImageConfig, Tokenizer, make_prompt, preprocess_image
from hub.config import Config
from hub.options import MICRO_BASE
from micro.conversations import (
    COUNTERFACTUAL_SHARE,
    GRID,
    Mix,
    Row,
    conversation,
    draw_any,
    make_row,
)
from micro.folder import WIDTH, make_config, write_side_files
from micro.tokenizer import write_tokenizer
from micro.world import (
    DOMAINS,
    GLYPHS,
    TEST_BUCKETS,
    Question,
    Walk,
    draw_image,
    draw_question,
    image_prompt,
    max_depth,
    text_prompt,
)
from model import Qwen2_5_VL
from rewards import accuracy_reward
from sample import Sampler, SamplingParams

BATCH = 96  # rows per step
CHUNK = 16  # rows in one forward and backward pass
ALIGN_STEPS = 200
ALIGN_IMAGES = 32  # per step
ALIGN_RATE = 2e-3
TEXT_STEPS = 100
MIXED_STEPS = 900
FINAL_STEPS = 220
MIXED_RATE = 2e-3
FINAL_RATE = 1e-3
IMAGE_SHARE = 0.6  # of the rows that may have an image
# Shares of the final stage's chains of thought that are complete: on text, and on images.
COMPLETE_SHARES = {"none": (0.0, 0.0), "text": (0.1, 0.0), "both": (0.1, 0.1)}
PROBES = 100  # questions in a cell of the report
PROBE_DEPTHS = range(1, 7)


# --- Training ---


def initialise(model: nn.Module) -> None:
    """Draws the initial weights.

    Linear maps keep the variance of their input; those that write to the residual stream start
    smaller. Norms stay 1.
    """
    layers = model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.05)
        elif parameter.dim() > 1:
            last = ("o_proj.weight", "down_proj.weight", "attn.proj.weight")
            writes_residual = name.endswith(last)
            scale = (2 * layers) ** -0.5 if writes_residual else 1.0
            nn.init.normal_(parameter, std=scale * parameter[0].numel() ** -0.5)


def loss_sum(model: Qwen2_5_VL, rows: list[Row]) -> Tensor:
    """Returns the summed cross-entropy over the rows' scored tokens.

    Rows are padded on the right; attention is causal, so that nothing sees the padding.
    """
    length = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _, _ in rows])
    mask = torch.tensor([mask + [False] * (length - len(mask)) for _, mask, _ in rows])
    patches = [one for _, _, one in rows if one is not None]
    images = {}
    if patches:
        images = {"pixel_values": torch.cat(patches), "image_grid_thw": [GRID] * len(patches)}
    # A token is predicted from the hidden state before it.
    scored = mask[:, 1:]
    hidden = model(ids, **images)[:, :-1][scored]
    return F.cross_entropy(model.logits(hidden), ids[:, 1:][scored], reduction="sum")


def step(optimizer: torch.optim.Optimizer, rate: float, count: int) -> None:
    """Takes an optimiser step on the gradient of a loss that was summed over `count` items.

    Gradients and counts are summed over all processes; the mean gradient is clipped to norm 1.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([float(count)])])
    if dist.is_initialized():
        dist.all_reduce(flat)
    gradient = flat[:-1] / flat[-1]
    gradient *= min(1.0, 1.0 / gradient.norm().item())
    for p, part in zip(parameters, gradient.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


def align(model: Qwen2_5_VL, rng: random.Random, images: int, quiet: bool) -> None:
    """Trains ViT and merger to name the glyph in every cell, then freezes all but the merger."""
    symbols = ["", *GLYPHS]
    head = nn.Linear(model.config.hidden_size, len(symbols))
    parameters = [*model.visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    progress = tqdm(range(ALIGN_STEPS), desc="align", unit="step", mininterval=5, disable=quiet)
    for i in progress:
        drawn = [draw_image(draw_any(rng), rng) for _ in range(images)]
        patches = torch.cat([preprocess_image(image)[0] for image, _ in drawn])
        targets = torch.tensor([symbols.index(symbol) for _, cells in drawn for symbol in cells])
        logits = head(model.visual(patches, [GRID] * images))
        F.cross_entropy(logits, targets, reduction="sum").backward()
        rate = ALIGN_RATE * min(1, (i + 1) / 20, (ALIGN_STEPS - i) / 50)
        step(optimizer, rate, len(targets))
        accuracy = (logits.argmax(-1) == targets)[targets > 0].float().mean().item()
        progress.set_postfix(glyphs=f"{accuracy:.3f}", refresh=False)
    model.visual.requires_grad_(False)
    model.visual.merger.requires_grad_(True)


def learning_rate(i: int) -> float:
    """Returns that of step i: warm-up, constant, and in the final stage a fall to a tenth."""
    final = i - TEXT_STEPS - MIXED_STEPS
    if final < 0:
        return MIXED_RATE * min(1.0, (i + 1) / 50)
    return FINAL_RATE * (1 - 0.9 * final / FINAL_STEPS)


def train(
    model: Qwen2_5_VL,
    optimizer: torch.optim.Optimizer,
    rng: random.Random,
    *,
    steps: range,
    mix: Mix,
    label: str,
    batch: int,
    tokenizer: Tokenizer,
    quiet: bool,
) -> None:
    """Takes some of the optimiser steps."""
    progress = tqdm(steps, desc=label, unit="step", mininterval=5, disable=quiet)
    for i in progress:
        rows = [make_row(rng, tokenizer, mix) for _ in range(batch)]
        rows.sort(key=lambda row: len(row[0]))
        tokens = sum(sum(mask) for _, mask, _ in rows)
        total_loss = 0.0
        for start in range(0, batch, CHUNK):  # rows of like length together
            loss = loss_sum(model, rows[start : start + CHUNK])
            loss.backward()
            total_loss += loss.item()
        step(optimizer, learning_rate(i), tokens)
        progress.set_postfix(loss=f"{total_loss / tokens:.4f}", refresh=False)


def build(
    rank: int, processes: int, seed: int, mix: Mix, width: int, folders: dict[str, Path], store: str
) -> None:
    """Runs one of the processes that build the bases together.

    Each works on its share of every batch, on one thread: on a busy machine that is much faster
    than threads, which wait for one another in every product.
    """
    torch.set_num_threads(1)
    if processes > 1:
        where = f"file://{store}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=processes)
    torch.manual_seed(seed)  # the same initial weights in every process, but other data
    rng = random.Random(f"pretrain {seed} {rank}")
    started = time.perf_counter()
    tokenizer = Tokenizer.from_pretrained(next(iter(folders.values())))
    config = make_config(tokenizer, width)
    model = Qwen2_5_VL(Config.from_dict(config)).train()
    initialise(model)
    # The stages that all bases share.
    align(model, rng, ALIGN_IMAGES // processes, quiet=rank > 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    trunk = TEXT_STEPS + MIXED_STEPS
    common = {"batch": BATCH // processes, "tokenizer": tokenizer, "quiet": rank > 0}
    on_text = replace(mix, images=0.0)
    train(model, optimizer, rng, steps=range(TEXT_STEPS), mix=on_text, label="text", **common)
    train(model, optimizer, rng, steps=range(TEXT_STEPS, trunk), mix=mix, label="mixed", **common)
    # The final stage, once for each base, from the same state.
    final = range(trunk, trunk + FINAL_STEPS)
    for chains, folder in folders.items():
        branch = copy.deepcopy((model, optimizer, rng))
        complete = replace(mix, complete=COMPLETE_SHARES[chains])
        train(*branch, steps=final, mix=complete, label=f"final: {chains}", **common)
        if rank == 0:
            branch[0].save_pretrained(folder)
            write_side_files(folder, config)
            count = sum(p.numel() for p in model.parameters())
            minutes = (time.perf_counter() - started) / 60
            print(f"{folder}: {count:,} parameters, after {minutes:.1f} minutes", flush=True)


# --- What it can do ---


def answer(
    model: Qwen2_5_VL, tokenizer: Tokenizer, asked: list[tuple[str, Image.Image | None]]
) -> list[str]:
    """Returns the greedy responses to questions with or without an image."""
    prompts = []
    for text, image in asked:
        images = [] if image is None else [image]
        prompts.append(make_prompt(text, images, tokenizer, ImageConfig()))
    params = SamplingParams(max_new_tokens=160, temperature=0.0)
    groups = Sampler(model, tokenizer).generate(prompts, params)
    return [group[0].text for group in groups]


@torch.inference_mode()
def knows_step(
    model: Qwen2_5_VL,
    tokenizer: Tokenizer,
    question: Question | Walk,
    prompt: str,
    image: Image.Image | None,
    rng: random.Random,
) -> bool:
    """Is a step from a random state completed rightly, behind the prompt and the restated question?

    A random state is an operation's number and a state, or a node and the hops to go.
    """
    patches = None
    images = {}
    if image is not None:
        patches, _ = preprocess_image(image)
        images = {"pixel_values": patches, "image_grid_thw": [GRID]}
    text, mask = question.fragment(rng, count=1)
    ids, mask, _ = conversation(tokenizer, prompt, f"<think>{text}", mask, patches)
    hidden = model(torch.tensor([ids]), **images)
    predicted = model.logits(hidden[0]).argmax(-1)
    # The scored tokens begin with the restatement and its semicolon; the step is behind them.
    scored = [i for i, known in enumerate(mask) if known]
    step = scored[len(question.restated) + 1 :]
    return all(predicted[i - 1] == ids[i] for i in step)


def probe(
    model: Qwen2_5_VL,
    tokenizer: Tokenizer,
    rng: random.Random,
    questions: list[Question | Walk],
    modality: str,
    column: str,
) -> float:
    """Returns the accuracy in % on some questions: one cell of the report."""
    task = "read" if column == "transcription" else "solve"
    asked = []
    for question in questions:
        if modality == "text":
            asked.append((text_prompt(question, rng, task), None))
        else:
            prompt = image_prompt(rng, task)
            image, _ = draw_image(question, rng)
            asked.append((prompt, image))
    if column == "single steps":
        right = [
            knows_step(model, tokenizer, question, prompt, image, rng)
            for question, (prompt, image) in zip(questions, asked)
        ]
    else:
        wanted = [q.restated if task == "read" else q.answer for q in questions]
        texts = answer(model, tokenizer, asked)
        right = [accuracy_reward(text, truth) for text, truth in zip(texts, wanted)]
    return 100 * sum(right) / len(questions)


def report(
    model: Qwen2_5_VL, tokenizer: Tokenizer, rng: random.Random
) -> dict[str, dict[str, float]]:
    """Returns the greedy accuracy in % by domain and modality (rows) and by task (columns).

    Tasks: transcription, single steps behind the given restatement, and questions of each depth.
    Every cell has PROBES fresh questions of the test sets' buckets.
    """
    rows = {}
    for domain in DOMAINS:
        depths = [depth for depth in PROBE_DEPTHS if depth <= max_depth(domain)]
        columns = {"transcription": depths, "single steps": depths}
        columns |= {f"k={depth}": [depth] for depth in depths}
        for modality in ("text", "image"):
            row = {}
            for column, choices in columns.items():
                questions = []
                for _ in range(PROBES):
                    depth = choices[0] if len(choices) == 1 else rng.choice(choices)
                    questions.append(draw_question(rng, domain, depth, TEST_BUCKETS))
                row[column] = probe(model, tokenizer, rng, questions, modality, column)
            rows[f"{domain} {modality}"] = row
    return rows


def print_report(rows: dict[str, dict[str, float]]) -> None:
    """Prints a report as a table."""
    columns = max(rows.values(), key=len)
    print(f"{'':<10}" + "".join(f"{column:>15}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<10}" + "".join(f"{cell:>15.0f}" for cell in row.values()))


def main() -> None:
    """Builds the base or bases in several processes, then prints what they can do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0)
    add("--chains", nargs="+", choices=COMPLETE_SHARES, default=["none"], help="of each base")
    add("--out", type=Path, default=MICRO_BASE, help="of several bases, a subfolder each")
    add("--counterfactual", type=float, default=COUNTERFACTUAL_SHARE, help="share of fragments")
    add("--image-share", type=float, default=IMAGE_SHARE, help="share of the rows with an image")
    add("--width", type=int, default=WIDTH, choices=(64, 128, 192), help="hidden size")
    add("--processes", type=int, default=2, help="another number gives other weights")
    args = parser.parse_args()
    folders = {args.chains[0]: args.out}
    if len(args.chains) > 1:
        folders = {chains: args.out / chains for chains in args.chains}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder)
    with tempfile.TemporaryDirectory() as temporary:
        mix = Mix(args.image_share, counterfactual=args.counterfactual)
        store = f"{temporary}/store"
        settings = (args.processes, args.seed, mix, args.width, folders, store)
        if args.processes == 1:
            build(0, *settings)
        else:
            torch.multiprocessing.spawn(build, settings, nprocs=args.processes)
    torch.set_num_threads(1)  # for the sampler: see hub.options.limit_threads
    for chains, folder in folders.items():
        print(f"complete chains: {chains}")
        model = Qwen2_5_VL.from_pretrained(folder)
        tokenizer = Tokenizer.from_pretrained(folder)
        print_report(report(model, tokenizer, random.Random(args.seed)))


if __name__ == "__main__":
    main()
