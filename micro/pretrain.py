"""Rebuilds the micro base from nothing: our stand-in for Qwen's own pre-training.

    python micro/pretrain.py --seed 0 --out micro/base          # 8 minutes on 2 idle CPU cores
    python micro/pretrain.py --seed 0 --chains none text both --out runs/bases          # three bases, one trunk

The base can read text and images, knows every single step, and looks up any numbered operation or marked arrow; but the
chains of thought that it has seen stop after two steps and answer with what they have by then. Stages:
    align    ViT and merger learn to tell the glyphs apart, through a throw-away head on each image token; then the
             ViT's blocks stay frozen
    text     the decoder alone, on text prompts
    mixed    merger and decoder, on image and text prompts
    final    the same with a lower learning rate; with --chains text (or both) 10% of the chains of thought on text (and
             on images) are complete
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from data import ImageConfig, Tokenizer, make_prompt, preprocess_image, render_chat
from micro.tokenizer import write_tokenizer
from micro.world import (CELLS, DOMAINS, GLYPHS, MAX_DEPTH, TEST_BUCKETS, Question, Walk,
                         draw_image, draw_question, facts, image_prompt, max_depth, text_prompt)
from hub.config import Config
from model import Qwen2_5_VL
from rewards import accuracy_reward
from sample import Sampler, SamplingParams

BATCH, CHUNK = 96, 16  # rows per step, and in one forward and backward pass
ALIGN_STEPS, ALIGN_IMAGES, ALIGN_RATE = 200, 32, 2e-3
TEXT_STEPS, MIXED_STEPS, FINAL_STEPS = 100, 900, 220
MIXED_RATE, FINAL_RATE = 2e-3, 1e-3
IMAGE_SHARE = 0.6
LIMIT = 2  # steps after which a chain of thought is cut
# Which of the final stage's chains of thought are complete: the share of those on text, and of those on images.
COMPLETE_SHARES = {"none": (0.0, 0.0), "text": (0.1, 0.0), "both": (0.1, 0.1)}
COUNTERFACTUAL_SHARE = 0.5  # of the fragments, that restate another question than the prompt's
DOMAIN_SHARES = {"A": 0.35, "L": 0.35, "G": 0.3}
PROBES, PROBE_DEPTHS = 100, range(1, 7)  # questions per cell of the table, and its depths
GRID = (1, 2, 2 * CELLS)  # patches of a strip
KINDS = {"read": 0.25, "chain": 0.17, "fragment": 0.31, "facts": 0.25, "direct": 0.02}

Row = tuple[list[int], list[bool], Tensor | None]  # ids, loss mask, patches


def make_config(tokenizer: Tokenizer) -> dict:
    """The fields of the hub's flat config.json, at micro size. Some vocabulary rows (65 to 128) are padding."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "attention_dropout": 0.0,
        "bos_token_id": tokenizer.endoftext, "eos_token_id": tokenizer.im_end,
        "vision_start_token_id": tokenizer.vision_start, "vision_end_token_id": tokenizer.vision_end,
        "vision_token_id": tokenizer.vision_pad, "image_token_id": tokenizer.image_pad,
        "video_token_id": tokenizer.video_pad, "hidden_act": "silu", "hidden_size": 128,
        "initializer_range": 0.02, "intermediate_size": 352, "max_position_embeddings": 4096, "max_window_layers": 4,
        "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": True, "torch_dtype": "float32",
        "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": {
            "depth": 3, "hidden_act": "silu", "hidden_size": 96, "intermediate_size": 256, "num_heads": 4,
            "in_chans": 3, "out_hidden_size": 128, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [2], "tokens_per_second": 2, "temporal_patch_size": 2},
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 12]},
        "vocab_size": (tokenizer.vocab_size // 64 + 2) * 64}


def write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def write_side_files(folder: Path, config: dict) -> None:
    """Config, preprocessor and generation settings, with all fields that the hub's files have."""
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", {
        "min_pixels": 3136, "max_pixels": 802816, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"})
    write_json(folder / "generation_config.json", {
        "bos_token_id": config["bos_token_id"], "pad_token_id": config["bos_token_id"], "do_sample": True,
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]], "repetition_penalty": 1.0, "temperature": 1.0,
        "transformers_version": config["transformers_version"]})


def initialise(model: nn.Module) -> None:
    """Linear maps keep the variance of their input; those that write to the residual stream start smaller."""
    layers = model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.05)
        elif parameter.dim() > 1:
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight"))
            scale = (2 * layers) ** -0.5 if writes_residual else 1.0
            nn.init.normal_(parameter, std=scale * parameter[0].numel() ** -0.5)


# What it is trained on


def draw_any(rng: random.Random) -> Question | Walk:
    """A question of any domain and depth."""
    domain = rng.choices(list(DOMAIN_SHARES), list(DOMAIN_SHARES.values()))[0]
    return draw_question(rng, domain, rng.randint(1, max_depth(domain)))


@dataclass(frozen=True)
class Mix:
    """Shares of what differs between stages and bases; KINDS and DOMAIN_SHARES are always the same."""
    images: float = 0.0  # rows with an image, but for facts
    complete: tuple[float, float] = (0.0, 0.0)  # chains that are not cut, on text and on images
    counterfactual: float = COUNTERFACTUAL_SHARE


def make_row(rng: random.Random, tokenizer: Tokenizer, mix: Mix) -> Row:
    """One training conversation. No question of the test sets' buckets is ever drawn."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    question, with_image = draw_any(rng), rng.random() < mix.images and kind != "facts"
    task = {"read": "read", "facts": "recall", "direct": "direct"}.get(kind, "solve")
    inner_mask = None
    if kind == "facts":
        inner, inner_mask = facts(rng)
        response = f"<think>{inner}"
    elif kind == "fragment":
        counterfactual = rng.random() < mix.counterfactual
        told = draw_question(rng, question.domain, question.depth) if counterfactual else question
        inner, inner_mask = told.fragment(rng)
        if counterfactual:  # the restatement cannot be known, but the steps follow it
            inner_mask[:len(told.restated)] = [False] * len(told.restated)
        response = f"<think>{inner}"
    elif kind == "read":
        response = f"<answer>{question.restated}</answer>"
    elif kind == "direct":
        response = f"<answer>{question.answer}</answer>"
    else:
        response = question.chain(MAX_DEPTH if rng.random() < mix.complete[with_image] else LIMIT)
    patches, prompt = None, image_prompt(rng, task) if kind == "facts" else text_prompt(question, rng, task)
    if with_image:
        patches, _ = preprocess_image(draw_image(question, rng)[0])
        prompt = image_prompt(rng, task)
    return conversation(tokenizer, prompt, response, inner_mask, patches)


def conversation(tokenizer: Tokenizer, prompt: str, response: str, inner_mask: list[bool] | None,
                 patches: Tensor | None) -> Row:
    """A prompt, behind an image where there are patches, and its response. `inner_mask`, of the response's last
    characters, which are a token each, says which of them are scored and that nothing else is."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}] if patches is not None else prompt
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": response}]
    ids, mask = render_chat(messages, tokenizer, image_tokens=[CELLS] if patches is not None else [])
    if inner_mask is not None:
        end = len(ids) - 2  # <|im_end|> and the newline
        mask = [False] * (end - len(inner_mask)) + inner_mask + [False, False]
    return ids, mask, patches


def loss_sum(model: Qwen2_5_VL, rows: list[Row]) -> Tensor:
    """Summed cross-entropy over the rows' masked tokens."""
    length = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([row[0] + [0] * (length - len(row[0])) for row in rows])
    mask = torch.tensor([row[1] + [False] * (length - len(row[1])) for row in rows])
    patches = [row[2] for row in rows if row[2] is not None]
    hidden = model(ids, pixel_values=torch.cat(patches) if patches else None,
                   image_grid_thw=[GRID] * len(patches) or None)[:, :-1][mask[:, 1:]]
    return F.cross_entropy(model.logits(hidden), ids[:, 1:][mask[:, 1:]], reduction="sum")


def step(optimizer: torch.optim.Optimizer, rate: float, count: int) -> None:
    """One optimiser step on the gradient of a summed loss over `count` items, summed over all processes and divided by
    their items, clipped to norm 1."""
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
    """Trains ViT and merger to name the glyph in every cell, then freezes the ViT but for the merger."""
    symbols = ["", *GLYPHS]
    head = nn.Linear(model.config.hidden_size, len(symbols))
    optimizer = torch.optim.AdamW([*model.visual.parameters(), *head.parameters()], weight_decay=0.0)
    progress = tqdm(range(ALIGN_STEPS), desc="align", unit="step", mininterval=5, disable=quiet)
    for i in progress:
        drawn = [draw_image(draw_any(rng), rng) for _ in range(images)]
        patches = torch.cat([preprocess_image(image)[0] for image, _ in drawn])
        targets = torch.tensor([symbols.index(symbol) for _, cells in drawn for symbol in cells])
        logits = head(model.visual(patches, [GRID] * images))
        F.cross_entropy(logits, targets, reduction="sum").backward()
        step(optimizer, ALIGN_RATE * min(1, (i + 1) / 20, (ALIGN_STEPS - i) / 50), len(targets))
        accuracy = (logits.argmax(-1) == targets)[targets > 0].float().mean().item()
        progress.set_postfix(glyphs=f"{accuracy:.3f}", refresh=False)
    model.visual.requires_grad_(False)
    model.visual.merger.requires_grad_(True)


def learning_rate(i: int) -> float:
    """Of step i: warm-up, then constant; in the final stage it falls linearly to a tenth."""
    final = i - TEXT_STEPS - MIXED_STEPS
    return MIXED_RATE * min(1.0, (i + 1) / 50) if final < 0 else FINAL_RATE * (1 - 0.9 * final / FINAL_STEPS)


def train(model: Qwen2_5_VL, optimizer: torch.optim.Optimizer, tokenizer: Tokenizer, rng: random.Random, batch: int, *,
          steps: range, mix: Mix, label: str, quiet: bool) -> None:
    """Some of the optimiser steps."""
    progress = tqdm(steps, desc=label, unit="step", mininterval=5, disable=quiet)
    for i in progress:
        rows = [make_row(rng, tokenizer, mix) for _ in range(batch)]
        rows.sort(key=lambda row: len(row[0]))
        tokens, total_loss = sum(sum(mask) for _, mask, _ in rows), 0.0
        for start in range(0, batch, CHUNK):  # rows of like length together
            loss = loss_sum(model, rows[start:start + CHUNK])
            loss.backward()
            total_loss += loss.item()
        step(optimizer, learning_rate(i), tokens)
        progress.set_postfix(loss=f"{total_loss / tokens:.4f}", refresh=False)


def build(rank: int, processes: int, seed: int, counterfactual: float, folders: dict[str, Path], store: str) -> None:
    """One of the processes that build the bases together, each on its share of every batch and on one thread: on a busy
    machine much faster than threads, which wait for one another in every product."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    torch.manual_seed(seed)  # the same initial weights in every process, but other data
    rng = random.Random(f"pretrain {seed} {rank}")
    started = time.perf_counter()
    tokenizer = Tokenizer.from_pretrained(next(iter(folders.values())))
    config = make_config(tokenizer)
    model = Qwen2_5_VL(Config.from_dict(config)).train()
    initialise(model)
    align(model, rng, ALIGN_IMAGES // processes, quiet=rank > 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    trunk, total = TEXT_STEPS + MIXED_STEPS, TEXT_STEPS + MIXED_STEPS + FINAL_STEPS
    for label, steps, images in (("text", range(TEXT_STEPS), 0.0), ("mixed", range(TEXT_STEPS, trunk), IMAGE_SHARE)):
        train(model, optimizer, tokenizer, rng, BATCH // processes, steps=steps,
              mix=Mix(images, counterfactual=counterfactual), label=label, quiet=rank > 0)
    for chains, folder in folders.items():  # they part here
        branch, branch_optimizer, branch_rng = copy.deepcopy((model, optimizer, rng))
        train(branch, branch_optimizer, tokenizer, branch_rng, BATCH // processes, steps=range(trunk, total),
              mix=Mix(IMAGE_SHARE, COMPLETE_SHARES[chains], counterfactual), label=f"final: {chains}", quiet=rank > 0)
        if rank == 0:
            branch.save_pretrained(folder)
            write_side_files(folder, config)
            parameters, minutes = sum(p.numel() for p in model.parameters()), (time.perf_counter() - started) / 60
            print(f"{folder}: {parameters:,} parameters, written after {minutes:.1f} minutes", flush=True)


# What it can do


def answer(model: Qwen2_5_VL, tokenizer: Tokenizer, asked: list[tuple[str, Image.Image | None]]) -> list[str]:
    """Greedy responses to questions with or without an image."""
    prompts = [make_prompt(text, [image] if image else [], tokenizer, ImageConfig()) for text, image in asked]
    groups = Sampler(model, tokenizer).generate(prompts, SamplingParams(max_new_tokens=160, temperature=0.0))
    return [group[0].text for group in groups]


@torch.inference_mode()
def knows_step(model: Qwen2_5_VL, tokenizer: Tokenizer, question: Question | Walk, prompt: str,
               image: Image.Image | None, rng: random.Random) -> bool:
    """Behind the prompt and the restated question, is a step from a random state (an operation's number and a state, or
    a node and the hops to go) completed rightly?"""
    patches = None if image is None else preprocess_image(image)[0]
    text, mask = question.fragment(rng, count=1)
    ids, mask, _ = conversation(tokenizer, prompt, f"<think>{text}", mask, patches)
    hidden = model(torch.tensor([ids]), pixel_values=patches, image_grid_thw=None if image is None else [GRID])
    predicted = model.logits(hidden[0]).argmax(-1)
    step = [i for i, known in enumerate(mask) if known][len(question.restated) + 1:]
    return all(predicted[i - 1] == ids[i] for i in step)


def report(model: Qwen2_5_VL, tokenizer: Tokenizer, rng: random.Random) -> dict[str, dict[str, float]]:
    """Greedy accuracy in % on PROBES fresh questions of the test sets' buckets per cell, by domain and modality:
    transcription, single steps behind the given restatement, and questions by depth."""
    rows = {}
    for domain in DOMAINS:
        depths = [depth for depth in PROBE_DEPTHS if depth <= max_depth(domain)]
        for modality in ("text", "image"):
            row = rows[f"{domain} {modality}"] = {}
            for column, depth in [("transcription", None), ("single steps", None), *((f"k={k}", k) for k in depths)]:
                questions = [draw_question(rng, domain, depth or rng.choice(depths), TEST_BUCKETS)
                             for _ in range(PROBES)]
                task = "read" if column == "transcription" else "solve"
                asked = [(text_prompt(q, rng, task), None) if modality == "text" else
                         (image_prompt(rng, task), draw_image(q, rng)[0]) for q in questions]
                if column == "single steps":
                    right = [knows_step(model, tokenizer, q, *a, rng) for q, a in zip(questions, asked)]
                else:
                    wanted = [q.restated if task == "read" else q.answer for q in questions]
                    right = [accuracy_reward(text, want) for text, want in zip(answer(model, tokenizer, asked), wanted)]
                row[column] = 100 * sum(right) / PROBES
    return rows


def print_report(rows: dict[str, dict[str, float]]) -> None:
    columns = max(rows.values(), key=len)
    print(f"{'':<10}" + "".join(f"{column:>15}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<10}" + "".join(f"{cell:>15.0f}" for cell in row.values()))


def main() -> None:
    """Builds the base or bases in several processes, then prints what they can do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chains", nargs="+", choices=COMPLETE_SHARES, default=["none"],
                        help="complete chains in the base's own training; several bases share all but the last steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base", help="of several, a subfolder each")
    parser.add_argument("--counterfactual", type=float, default=COUNTERFACTUAL_SHARE,
                        help="share of the fragments that restate another question than the prompt's")
    parser.add_argument("--processes", type=int, default=2, help="share the work; another number gives other weights")
    args = parser.parse_args()
    folders = {chains: args.out / chains if len(args.chains) > 1 else args.out for chains in args.chains}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer(folder)
    with tempfile.TemporaryDirectory() as temporary:
        settings = (args.processes, args.seed, args.counterfactual, folders, f"{temporary}/store")
        if args.processes == 1:
            build(0, *settings)
        else:
            torch.multiprocessing.spawn(build, settings, nprocs=args.processes)
    torch.set_num_threads(1)  # for the sampler: see training.limit_threads
    for chains, folder in folders.items():
        print(f"complete chains: {chains}")
        model, tokenizer = Qwen2_5_VL.from_pretrained(folder), Tokenizer.from_pretrained(folder)
        print_report(report(model, tokenizer, random.Random(args.seed)))


if __name__ == "__main__":
    main()
