"""Stage 2: reinforcement learning with verifiable rewards by GRPO, text only (paper: section 3.2, appendix A).

    python grpo.py                                               # goes on from runs/sft/model, on a CPU, in minutes
    python grpo.py --recipe paper --model runs/sft-7b/model --data orz_math_57k_collected.json --out runs/grpo-7b
    python grpo.py --resume

A step: sample a group of responses to each question, reward those whose final answer is right, turn the rewards of a
group into advantages, and raise the probability of the tokens of better-than-average responses.
Shapes: B questions, G responses per question (a group), N = B * G responses, T tokens (prompt and response, padded).
"""
import time
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from data import (Example, ImageConfig, InputError, Prompt, Tokenizer, convert_examples, epoch_order, format_prompt,
                  make_prompt, report_bad)
from hub.config import Config
from hub.options import MICRO_DATA, option, parse_options, run_command
from kernels import token_log_probs
from model import Qwen2_5_VL
from rewards import accuracy_reward, extract_answer
from sample import Completion, Sampler, SamplingParams
from training.optimizer import autocast, load_for_training, make_optimizer, optimizer_step
from training.run import Run, TrainOptions

# The paper leaves open what its batch of 128 counts (here: questions, as in verl, which it used), the upper clip bound
# (here: DAPO's 0.28) and whether the KL term stayed (here: on, at the appendix's 1e-2; --kl-coef 0 drops it).
PAPER = {"epochs": 3, "questions_per_step": 128, "max_new_tokens": 4096, "learning_rate": 3e-6, "weight_decay": 1e-2,
         "micro_batch_size": 1, "max_steps": None, "kl_coef": 1e-2, "save_every": 20, "max_prompt_tokens": 2048}
RECIPES = {"micro": {}, "paper": {"prompt_style": "train", **PAPER}, "med": {"prompt_style": "mcq", **PAPER}}


@dataclass
class GRPOOptions(TrainOptions):
    """Reinforcement learning on questions whose answers can be checked."""
    model: str = option("runs/sft/model", "model folder to start from")
    data: str = option(str(MICRO_DATA / "rl.jsonl"), "questions with answers")
    out: str = option("runs/grpo", "run folder")
    epochs: int = option(3, "passes over the questions", low=1)
    max_steps: int | None = option(200, "stop after so many rollouts", low=1)
    learning_rate: float = option(3e-5, "peak learning rate", low=0.0)
    warmup_ratio: float = option(0.1, "share of the steps in which the learning rate rises linearly", low=0.0, high=1.0)
    rollout_batch: int = option(256, "responses sampled at a time; changes memory, not the samples", low=1)
    questions_per_step: int = option(16, "questions per rollout (B)", low=1)
    max_prompt_tokens: int | None = option(None, "longer questions are dropped; None: what fills the context", low=1)
    group_size: int = option(8, "responses per question (G)", low=2, high=1_000_000)
    max_new_tokens: int = option(160, "response length limit", low=1)
    temperature: float = option(1.0, "of the policy, in sampling and in the loss alike", low=1e-3)
    updates_per_rollout: int = option(1, "optimiser steps per rollout, each on its share of the responses", low=1)
    clip_eps_low: float = option(0.2, "the ratio is clipped below at 1 - this", low=0.0, high=1.0)
    clip_eps_high: float = option(0.28, "the ratio is clipped above at 1 + this (DAPO's clip-higher)", low=0.0)
    normalize_std: bool = option(True, "divide advantages by their group's standard deviation")
    kl_coef: float = option(0.0, "weight of the KL penalty against the starting model; 0 loads no reference", low=0.0)
    kl_type: str = option("k3", "estimator of the KL penalty", choices=("k1", "k2", "k3"))


# --- The loss: pure functions -----------------------------------------------------------------------------------------

def group_advantages(rewards: Tensor, *, normalize_std: bool = True) -> Tensor:
    """(r - mean) / std within each group (DeepSeekMath, arXiv 2402.03300, section 4.1.2): rewards [B, G] -> advantages [B, G].

    The standard deviation is Bessel-corrected, as in torch.std and TRL. A group whose rewards are all equal teaches
    nothing: its advantages are exactly 0 (the floor of 1e-3 keeps rounding residue from being blown up: NeMo-RL#4161).
    normalize_std=False: Dr. GRPO's advantages (arXiv 2503.20783), which do not favour very easy and hard questions.
    """
    centred, std = rewards - rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    advantages = centred / std.clamp(min=1e-3) if normalize_std else centred
    return torch.where(std > 1e-3, advantages, torch.zeros_like(advantages))


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, kl_type: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) (Schulman, "Approximating KL Divergence", 2020), as a loss term.

    k1 = log p - log r:          unbiased as a value, but its gradient is zero in expectation: no use as a loss.
    k2 = (log p - log r)^2 / 2:  its gradient is that of the reverse KL(policy || reference), on-policy.
    k3 = r/p - 1 - log r/p:      unbiased, never negative; its gradient is that of the forward KL(reference || policy).
    """
    log_ratio = ref_log_probs - log_probs
    if kl_type == "k1":
        return -log_ratio
    if kl_type == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio.clamp(max=20.0)) - log_ratio


def grpo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, completion_mask: Tensor, *,
              clip_eps_low: float, clip_eps_high: float, kl_coef: float = 0.0, ref_log_probs: Tensor | None = None,
              kl_type: str = "k3", num_tokens: Tensor | float | None = None) -> tuple[Tensor, dict[str, float]]:
    """The clipped policy-gradient loss, token by token (paper: eq. 1; clip-higher, token-level mean: DAPO, 2503.14476).

    log_probs, old_log_probs, ref_log_probs [N, T]; advantages [N], the same for each token of a response;
    completion_mask [N, T] is true on response tokens. Per token:
        -min(ratio * A, clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high) * A) + kl_coef * KL,  ratio = p / p_old
    summed and divided by num_tokens: the response tokens of the *whole* optimiser batch (default: of this call), so
    that micro-batches add up to the batch's loss. Tokens of groups with zero advantage count among them. Returns the
    loss and metrics, which are token means and add up likewise.
    """
    if kl_coef and ref_log_probs is None:
        raise ValueError("kl_coef needs ref_log_probs")
    masked_out = ~completion_mask.bool()
    num_tokens = (~masked_out).sum() if num_tokens is None else num_tokens
    num_tokens = torch.as_tensor(num_tokens, device=log_probs.device).clamp(min=1.0)

    def clean(x: Tensor) -> Tensor:
        return x.masked_fill(masked_out, 0.0)  # not x * mask: 0 * inf is NaN, in the backward pass too

    def token_mean(x: Tensor) -> Tensor:
        return clean(x).sum() / num_tokens

    log_probs = clean(log_probs)
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1.0 - clip_eps_low, 1.0 + clip_eps_high)
    gain, clipped_gain = ratio * advantages[:, None], clipped * advantages[:, None]
    loss = token_mean(-torch.minimum(gain, clipped_gain))
    was_clipped = (clipped_gain < gain).to(ratio.dtype)
    metrics = {"ratio_mean": token_mean(ratio).item(), "clip_fraction": token_mean(was_clipped).item()}
    if ref_log_probs is not None:
        kl = token_mean(kl_penalty(log_probs, ref_log_probs, kl_type))
        loss, metrics["kl"] = loss + kl_coef * kl, kl.item()
    return loss, metrics


# --- Rollouts ---------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """Rollouts as tensors; all [N, T] but advantages [N]. Position t says something about the id at t."""
    input_ids: Tensor
    completion_mask: Tensor        # true on sampled ids with the stop token; false on prompt, forced ids and padding
    sampler_log_probs: Tensor
    advantages: Tensor

    @property
    def lengths(self) -> Tensor:
        """[N]: up to the last response token."""
        columns = torch.arange(1, self.input_ids.shape[1] + 1, device=self.input_ids.device)
        return (self.completion_mask * columns).amax(1).clamp(min=2)

    def rows(self, index: Tensor) -> "Batch":
        """The chosen rows, without the columns that are padding in all of them."""
        end = int(self.lengths[index].max())
        return Batch(self.input_ids[index, :end], self.completion_mask[index, :end],
                     self.sampler_log_probs[index, :end], self.advantages[index])


def make_batch(prompts: list[Prompt], groups: list[list[Completion]], advantages: Tensor,
               device: torch.device) -> Batch:
    """Prompt and response ids side by side, padded on the right. The ids are those sampled, never re-tokenised text."""
    pairs = [(prompt, completion) for prompt, group in zip(prompts, groups) for completion in group]
    N, T = len(pairs), max(len(p.ids) + len(c.ids) for p, c in pairs)
    input_ids, log_probs = torch.zeros(N, T, dtype=torch.long), torch.zeros(N, T)
    mask = torch.zeros(N, T, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt.ids), len(prompt.ids) + len(completion.ids)
        input_ids[row, :end] = torch.tensor(prompt.ids + completion.ids)
        log_probs[row, start:end] = torch.tensor(completion.log_probs)
        mask[row, start:end] = ~torch.tensor(completion.forced, dtype=torch.bool)
    return Batch(input_ids.to(device), mask.to(device), log_probs.to(device), advantages.flatten().to(device))


def completion_log_probs(model: Qwen2_5_VL, batch: Batch, temperature: float,
                         masked_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The model's log-prob of each response token, 0 elsewhere [N, T], and the sum of the entropies there."""
    scored = batch.completion_mask[:, 1:]
    hidden = model(batch.input_ids)[:, :-1][scored]                                          # [tokens, C]
    values, entropy = token_log_probs(hidden, model.head_weight, batch.input_ids[:, 1:][scored],
                                      temperature=temperature, masked_ids=masked_ids)
    log_probs = torch.zeros(batch.input_ids.shape, device=values.device, dtype=values.dtype)
    log_probs[:, 1:] = log_probs[:, 1:].masked_scatter(scored, values)
    return log_probs, entropy.sum()


class Trainer:
    """Policy, reference and optimiser, and the two halves of a step: roll out, then update."""

    def __init__(self, options: GRPOOptions):
        self.options = options
        self.tokenizer = Tokenizer.from_pretrained(options.model)
        self.examples = load_questions(options, self.tokenizer)
        self.model = load_for_training(options)
        self.optimizer = make_optimizer(self.model, options)
        self.reference = load_for_training(options).requires_grad_(False) if options.kl_coef > 0 else None
        self.sampler = Sampler(self.model, self.tokenizer, max_batch=options.rollout_batch)
        self.masked_ids = self.sampler.masked_ids

    def rollout(self, chosen: list[int], step: int) -> tuple[Batch, list[dict], dict]:
        """Samples, rewards and weighs the responses to the chosen questions. Returns the batch, samples.jsonl's
        records and metrics."""
        o, started = self.options, time.perf_counter()
        examples = [self.examples[i] for i in chosen]
        prompts = [question_prompt(example, o, self.tokenizer) for example in examples]
        params = SamplingParams(o.max_new_tokens, o.temperature, n=o.group_size, seed=o.seed * 1_000_003 + step)
        with autocast(self.model, o):
            groups = self.sampler.generate(prompts, params)
        seconds = time.perf_counter() - started
        rewards = torch.tensor([[accuracy_reward(c.text, example.truths, example.options, precision=example.precision)
                                 for c in group] for example, group in zip(examples, groups)])                  # [B, G]
        advantages = group_advantages(rewards, normalize_std=o.normalize_std)
        records = [{"step": step + 1, "id": example.id, "question": example.question, "response": c.text,
                    "extracted": extract_answer(c.text), "answer": example.answer, "reward": reward,
                    "finish_reason": c.finish_reason}
                   for example, group, row in zip(examples, groups, rewards.tolist()) for c, reward in zip(group, row)]
        batch = make_batch(prompts, groups, advantages, self.model.head_weight.device)
        return batch, records, rollout_metrics(groups, rewards, advantages, seconds)

    @torch.no_grad()
    def score(self, model: Qwen2_5_VL, batch: Batch) -> Tensor:
        """A model's log-probs [N, T], micro-batch by micro-batch."""
        o, out = self.options, torch.zeros_like(batch.sampler_log_probs)
        for rows in batch.lengths.argsort().split(o.micro_batch_size):
            part = batch.rows(rows)
            with autocast(model, o):
                log_probs, _ = completion_log_probs(model, part, o.temperature, self.masked_ids)
            out[rows, :log_probs.shape[1]] = log_probs
        return out

    def update(self, batch: Batch, learning_rate: float) -> dict:
        """`updates_per_rollout` optimiser steps, each on its share of the rollout; returns their mean metrics."""
        o, steps = self.options, []
        # With a single step the policy is still the one that sampled: its own log-probs, detached, are the old ones.
        old_log_probs = self.score(self.model, batch) if o.updates_per_rollout > 1 else None
        ref_log_probs = self.score(self.reference, batch) if self.reference is not None else None
        everything = torch.arange(len(batch.advantages), device=batch.advantages.device)
        for share in everything.tensor_split(min(o.updates_per_rollout, len(everything))):
            num_tokens = batch.completion_mask[share].sum().clamp(min=1)  # of all groups, whatever their advantage
            if o.kl_coef == 0:  # no advantage, no gradient: no need to run those rows (but one, for Adam's moments)
                share = share[batch.advantages[share] != 0] if batch.advantages[share].any() else share[:1]
            scored, parts = batch.completion_mask[share].sum().clamp(min=1), []
            for rows in share[batch.lengths[share].argsort()].split(o.micro_batch_size):
                old, ref = (None if x is None else x[rows] for x in (old_log_probs, ref_log_probs))
                parts.append(self.accumulate(batch.rows(rows), num_tokens, scored, old, ref))
            metrics = {key: (max if key.endswith("_max") else sum)(part[key] for part in parts) for key in parts[0]}
            metrics["grad_norm"] = optimizer_step(self.model, self.optimizer, learning_rate, o.max_grad_norm)
            steps.append(metrics)
        return {key: fmean(metrics[key] for metrics in steps) for key in steps[0]}

    def accumulate(self, part: Batch, num_tokens: Tensor, scored: Tensor, old_log_probs: Tensor | None,
                   ref_log_probs: Tensor | None) -> dict:
        """Forward and backward of one micro-batch; returns its share of the step's metrics. The loss is per token of the
        whole step (num_tokens), the other metrics are means over those that are run (scored)."""
        o, T = self.options, part.input_ids.shape[1]
        with autocast(self.model, o):
            log_probs, entropy = completion_log_probs(self.model, part, o.temperature, self.masked_ids)
        old_log_probs = log_probs.detach() if old_log_probs is None else old_log_probs[:, :T]
        ref_log_probs = None if ref_log_probs is None else ref_log_probs[:, :T]
        loss, metrics = grpo_loss(
            log_probs, old_log_probs, part.advantages, part.completion_mask, clip_eps_low=o.clip_eps_low,
            clip_eps_high=o.clip_eps_high, kl_coef=o.kl_coef, ref_log_probs=ref_log_probs, kl_type=o.kl_type,
            num_tokens=num_tokens)
        loss.backward()
        # Sampler and trainer should agree to rounding. Old log-probs are compared: the policy may have moved since.
        difference = (old_log_probs - part.sampler_log_probs)[part.completion_mask].abs()
        metrics = {key: value * (num_tokens / scored).item() for key, value in metrics.items()}
        return {"loss": loss.item(), "kl": 0.0, **metrics, "entropy": (entropy / scored).item(),
                "logprob_diff": (difference.sum() / scored).item(),
                "logprob_diff_max": max(difference.tolist(), default=0.0)}


def rollout_metrics(groups: list[list[Completion]], rewards: Tensor, advantages: Tensor, seconds: float) -> dict:
    """What the paper's figure 5 plots of a rollout: rewards and advantages [B, G], lengths in tokens."""
    completions = [completion for group in groups for completion in group]
    lengths = torch.tensor([float(len(completion.ids)) for completion in completions])
    return {"reward": rewards.mean().item(), "reward_std": rewards.std(1).mean().item(),
            "zero_std_groups": (rewards.std(1) <= 1e-3).float().mean().item(),
            "advantage_mean": ((advantages.flatten() * lengths).sum() / lengths.sum()).item(),  # over tokens
            "response_length": lengths.mean().item(),
            "clipped_responses": fmean(completion.finish_reason == "length" for completion in completions),
            "rollout_seconds": seconds, "rollout_tokens_per_second": lengths.sum().item() / seconds}


def question_prompt(example: Example, options: GRPOOptions, tokenizer: Tokenizer) -> Prompt:
    return make_prompt(format_prompt(example, options.prompt_style), [], tokenizer, ImageConfig())


def load_questions(options: GRPOOptions, tokenizer: Tokenizer) -> list[Example]:
    """The questions, text only, without what training does not need. Those whose prompt is too long, or leaves no room
    in the context, are dropped and counted."""
    limit = Config.from_pretrained(options.model).max_position_embeddings - 1
    limit = min(limit, options.max_prompt_tokens or limit)

    def fitting(example: Example) -> Example | None:
        if example.images:
            raise InputError(f"question {example.id} has an image: training is on text only")
        fits = len(question_prompt(example, options, tokenizer).ids) <= limit
        return replace(example, response=None, meta={}) if fits else None

    bad = [] if options.skip_bad_lines else None
    examples = list(tqdm(convert_examples(options.data, fitting, bad), desc="reading", unit=" examples", delay=5))
    report_bad(options.data, bad)
    kept = [example for example in examples if example is not None]
    if not kept:
        raise InputError(f"{options.data}: no question fits {limit} tokens")
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept)} of {len(examples)} questions dropped: the prompt is over {limit} tokens")
    return kept


def train(options: GRPOOptions) -> None:
    """The whole run: from the options to the run folder."""
    trainer = Trainer(options)
    run = Run(options)
    if options.resume:
        run.load_checkpoint(trainer.model, trainer.optimizer)
    n = len(trainer.examples)
    steps_per_epoch = -(-n // options.questions_per_step)
    total_steps = min(options.epochs * steps_per_epoch, options.max_steps or 10**12)
    warmup_steps = max(1, round(options.warmup_ratio * total_steps))
    progress = tqdm(range(run.step, total_steps), initial=run.step, total=total_steps, desc="grpo", unit="step")
    for step in progress:
        started = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        chosen = epoch_order(n, options.seed, epoch)[place * options.questions_per_step:][:options.questions_per_step]
        batch, records, metrics = trainer.rollout(chosen, step)
        learning_rate = options.learning_rate * min(1.0, (step + 1) / warmup_steps)
        metrics |= trainer.update(batch, learning_rate)
        seconds, tokens = time.perf_counter() - started, int(batch.lengths.sum())
        run.step = step + 1
        run.log("samples.jsonl", *records)
        run.log("metrics.jsonl", {"step": run.step, "epoch": epoch, "lr": learning_rate, "tokens": tokens, **metrics,
                                  "tokens_per_second": tokens / seconds, "seconds": seconds,
                                  "train_seconds": seconds - metrics["rollout_seconds"]})
        progress.set_postfix(reward=f"{metrics['reward']:.3f}", length=f"{metrics['response_length']:.0f}")
        run.save(trainer.model, trainer.optimizer, last=run.step == total_steps)


def main(argv: list[str]) -> None:
    train(parse_options(GRPOOptions, argv, RECIPES))


if __name__ == "__main__":
    run_command(main)
