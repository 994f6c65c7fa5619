"""Rebuilds the micro base from nothing: our stand-in for Qwen's own pre-training.

    python micro/pretrain.py --seed 0 --out micro/base          # about 15 minutes on 2 CPU cores

The base can read text and images, knows every single step, and looks up any numbered operation; but nearly all chains
of thought that it has seen stop after two steps and answer with what they have by then. Stages:
    align    ViT and merger learn to tell the glyphs apart, through a throw-away head on each image token; then the ViT's
             blocks stay frozen
    text     the decoder alone, on text prompts
    mixed    merger and decoder, on image and text prompts
    final    the same with a lower learning rate; some chains of thought are complete
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import ImageConfig, Prompt, Tokenizer, preprocess_image, render_chat
from micro.tokenizer import write_tokenizer
from micro.world import (CELLS, GLYPHS, MAX_DEPTH, MAX_OPERAND, MODULUS, TASKS, TEST_BUCKETS, Question, draw_image, draw_question,
                         image_prompt, text_prompt)
from model import Config, Qwen2_5_VL
from sample import Sampler, SamplingParams

BATCH, CHUNKS = 96, 6  # rows per step, in so many pieces of like length
ALIGN_STEPS, ALIGN_IMAGES, ALIGN_RATE = 200, 32, 2e-3
TEXT_STEPS, MIXED_STEPS, FINAL_STEPS = 100, 900, 220
MIXED_RATE, FINAL_RATE = 2e-3, 1e-3
IMAGE_SHARE = 0.6
LIMIT = 2  # steps after which a chain of thought is cut
COMPLETE_SHARE = 0.1  # of the final stage's chains
KINDS = {"read": 0.33, "chain": 0.2, "fragment": 0.2, "facts": 0.25, "direct": 0.02}

Row = tuple[list[int], list[bool], Tensor | None]  # ids, loss mask, patches


def make_config(tokenizer: Tokenizer) -> dict:
    """The fields of the hub's flat config.json, at micro size. 64 to 127 vocabulary rows are padding, as in the real ones."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "attention_dropout": 0.0,
        "bos_token_id": tokenizer.endoftext, "eos_token_id": tokenizer.im_end, "vision_start_token_id": tokenizer.vision_start,
        "vision_end_token_id": tokenizer.vision_end, "vision_token_id": tokenizer.vision_pad,
        "image_token_id": tokenizer.image_pad, "video_token_id": tokenizer.video_pad, "hidden_act": "silu", "hidden_size": 128,
        "initializer_range": 0.02, "intermediate_size": 352, "max_position_embeddings": 4096, "max_window_layers": 4,
        "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": True, "torch_dtype": "float32",
        "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": {
            "depth": 3, "hidden_act": "silu", "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "in_chans": 3,
            "out_hidden_size": 128, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [2], "tokens_per_second": 2, "temporal_patch_size": 2},
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


# What a row of training text is


def facts(rng: random.Random) -> tuple[str, list[bool]]:
    """Single steps on random states: `;#33+4=7#18-2=6...`. The loss is on the results only."""
    text, mask = ";", [False]
    domain = rng.choice("AL")
    for _ in range(rng.randint(4, 10)):
        question = Question(domain, 0, ((rng.randrange(2), rng.randint(1, MAX_OPERAND)),))
        step = question.step(1, rng.randrange(MODULUS))
        text += f"#{rng.randint(1, MAX_DEPTH)}{step[2:]}"
        mask += [False] * (len(step) - 1) + [True]
    return text, mask


def fragment(question: Question, rng: random.Random) -> tuple[str, list[bool]]:
    """The restated question, then its steps in random order on random states: which operation has which number. The loss
    is on all that can be known: not on the numbers and states drawn at random."""
    text, mask = question.restated + ";", [True] * (len(question.restated) + 1)
    for i in rng.sample(range(1, question.depth + 1), question.depth):
        step = question.step(i, rng.randrange(MODULUS))
        text += step
        mask += [False] * 3 + [True] * (len(step) - 3)
    return text, mask


def make_row(rng: random.Random, tokenizer: Tokenizer, *, image_share: float, complete_share: float) -> Row:
    """One training conversation. No question of the test sets' buckets is ever drawn."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    question = draw_question(rng, rng.choice("AL"), rng.randint(1, MAX_DEPTH))
    task = {"read": "read", "facts": "recall", "direct": "direct"}.get(kind, "solve")
    inner_mask = None
    if kind == "facts":
        inner, inner_mask = facts(rng)
        response = f"<think>{inner}"
    elif kind == "fragment":
        inner, inner_mask = fragment(question, rng)
        response = f"<think>{inner}"
    elif kind == "read":
        response = f"<answer>{question.restated}</answer>"
    elif kind == "direct":
        response = f"<answer>{question.answer}</answer>"
    else:
        response = question.chain(MAX_DEPTH if rng.random() < complete_share else LIMIT)
    patches, content = None, text_prompt(None if kind == "facts" else question, rng, task)
    if kind != "facts" and rng.random() < image_share:
        patches, _ = preprocess_image(draw_image(question, rng)[0])
        content = [{"type": "image"}, {"type": "text", "text": image_prompt(rng, task)}]
    ids, mask = render_chat([{"role": "user", "content": content}, {"role": "assistant", "content": response}], tokenizer,
                            image_tokens=[CELLS] if patches is not None else [])
    if inner_mask is not None:  # each character of the inner text is one token; nothing behind it counts
        end = len(ids) - 2  # <|im_end|> and the newline
        mask = [False] * (end - len(inner_mask)) + inner_mask + [False, False]
    return ids, mask, patches


def loss_sum(model: Qwen2_5_VL, rows: list[Row]) -> Tensor:
    """Summed cross-entropy over the rows' masked tokens."""
    length = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([row[0] + [0] * (length - len(row[0])) for row in rows])
    mask = torch.tensor([row[1] + [False] * (length - len(row[1])) for row in rows])
    patches = [row[2] for row in rows if row[2] is not None]
    images = {"pixel_values": torch.cat(patches), "image_grid_thw": [(1, 2, 2 * CELLS)] * len(patches)} if patches else {}
    hidden = model(ids, **images)[:, :-1][mask[:, 1:]]
    return F.cross_entropy(model.logits(hidden), ids[:, 1:][mask[:, 1:]], reduction="sum")


def align(model: Qwen2_5_VL, rng: random.Random) -> None:
    """Trains ViT and merger to name the glyph in every cell, then freezes the ViT but for the merger."""
    symbols = ["", *GLYPHS]
    head = nn.Linear(model.config.hidden_size, len(symbols))
    optimizer = torch.optim.AdamW([*model.visual.parameters(), *head.parameters()], lr=ALIGN_RATE, weight_decay=0.0)
    progress = tqdm(range(ALIGN_STEPS), desc="align", unit="step")
    for step in progress:
        drawn = [draw_image(draw_question(rng, rng.choice("AL"), rng.randint(1, MAX_DEPTH)), rng) for _ in range(ALIGN_IMAGES)]
        patches = torch.cat([preprocess_image(image)[0] for image, _ in drawn])
        targets = torch.tensor([symbols.index(symbol) for _, cells in drawn for symbol in cells])
        logits = head(model.visual(patches, [(1, 2, 2 * CELLS)] * len(drawn)))
        optimizer.param_groups[0]["lr"] = ALIGN_RATE * min(1, (step + 1) / 20, (ALIGN_STEPS - step) / 50)
        F.cross_entropy(logits, targets).backward()
        nn.utils.clip_grad_norm_(model.visual.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        glyphs = targets > 0
        progress.set_postfix(glyphs=f"{(logits.argmax(-1) == targets)[glyphs].float().mean():.3f}")
    print(f"align: {(logits.argmax(-1) == targets)[glyphs].float().mean():.3f} of the last batch's glyphs named right")
    model.visual.requires_grad_(False)
    model.visual.merger.requires_grad_(True)


def learning_rate(step: int) -> float:
    """Warm-up, then constant; the final stage falls linearly to a tenth."""
    final = step - TEXT_STEPS - MIXED_STEPS
    return MIXED_RATE * min(1.0, (step + 1) / 50) if final < 0 else FINAL_RATE * (1 - 0.9 * final / FINAL_STEPS)


def train(model: Qwen2_5_VL, tokenizer: Tokenizer, rng: random.Random) -> None:
    """The stages text, mixed and final."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=MIXED_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    total = TEXT_STEPS + MIXED_STEPS + FINAL_STEPS
    progress = tqdm(range(total), desc="train", unit="step", mininterval=10)
    for step in progress:
        is_final = step >= TEXT_STEPS + MIXED_STEPS
        rows = [make_row(rng, tokenizer, image_share=0.0 if step < TEXT_STEPS else IMAGE_SHARE,
                         complete_share=COMPLETE_SHARE if is_final else 0.0) for _ in range(BATCH)]
        rows.sort(key=lambda row: len(row[0]))
        num_tokens = sum(sum(mask) for _, mask, _ in rows)
        total_loss = 0.0
        for chunk in range(CHUNKS):
            loss = loss_sum(model, rows[chunk * BATCH // CHUNKS:(chunk + 1) * BATCH // CHUNKS]) / num_tokens
            loss.backward()
            total_loss += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{total_loss:.3f}", refresh=False)
        if (step + 1) % 100 == 0:
            tqdm.write(f"step {step + 1} loss {total_loss:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    args = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    rng = random.Random(f"pretrain {args.seed}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.out)
    tokenizer = Tokenizer.from_pretrained(args.out)
    config = make_config(tokenizer)
    model = Qwen2_5_VL(Config.from_dict(config)).train()
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.vocab_size} tokens")
    align(model, rng)
    train(model, tokenizer, rng)
    model.save_pretrained(args.out)
    write_side_files(args.out, config)
    print(f"{args.out} written after {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
