"""Stage 2: reinforcement learning with verifiable rewards by GRPO, text only.

    python grpo.py                             # goes on from runs/sft/model, on a CPU, in minutes
    python grpo.py --recipe paper --model runs/sft-7b/model --data orz_math_57k_collected.json

Paper: section 3.2, appendix A. A step: sample a group of responses to each question, reward those
whose final answer is right, turn the rewards of a group into advantages, and raise the probability
of the tokens of better-than-average responses. `Trainer.step` is that, in four numbered steps.

Shapes: B questions, G responses per question (a group), N tokens that are scored in a pack.
"""

import sys
import time
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from data.datasets import Example
from data.prompts import Question, load_text_questions
from data.responses import (
    IDLE_RESPONSE,
    Response,
    ResponsePack,
    make_response,
    make_response_pack,
    make_response_packs,
    split_evenly,
)
from data.sequences import Pack, num_steps
from data.tokenizer import Tokenizer, check_vocabulary
from hub.config import Config
from hub.device import memory_phase
from hub.options import MICRO_DATA, option, parse_options, run_command
from model import Qwen2_5_VL, score
from rewards import accuracy_reward
from sample import SamplingParams
from training.metrics import (
    mean_metrics,
    reward_converged,
    rollout_metrics,
    sample_records,
    update_metrics,
)
from training.optimizer import (
    forward_dtype,
    load_for_training,
    make_optimizer,
    optimizer_step,
    update_remedies,
    visiting,
)
from training.options import TrainOptions
from training.parallel import deal, exchange, is_first, processes, rank, training_device
from training.plan import print_plan, settle
from training.rehearsal import NoTokenizer, Rehearsal
from training.rollout import rollout
from training.run import Run
from training.validation import Validation

# The paper leaves three things open. Its batch of 128 counts questions here, as in verl, which it
# used; the upper clip bound is DAPO's 0.28; the KL term is on, at the appendix's 1e-2.
PAPER = {
    "epochs": 3,
    "max_steps": None,
    "questions_per_step": 128,
    "max_prompt_tokens": 2048,
    "max_new_tokens": 4096,
    "eval_new_tokens": 4096,
    "pack_tokens": 6144,
    "learning_rate": 3e-6,
    "weight_decay": 1e-2,
    "kl_coef": 1e-2,
}
RECIPES = {
    "micro": {},
    "paper": {"prompt_style": "train", **PAPER},
    "med": {"prompt_style": "mcq", **PAPER},
}

# What helps where a GPU's memory does not suffice to sample.
ROLLOUT_REMEDIES = ("a lower --rollout-batch", "a lower --max-new-tokens")


@dataclass
class GRPOOptions(TrainOptions):
    """Reinforcement learning on questions whose answers can be checked."""

    model: str = option("runs/sft/model", "model folder to start from")
    data: str = option(str(MICRO_DATA / "rl.jsonl"), "questions with answers")
    out: str = option("runs/grpo", "run folder")
    # How long, and how fast.
    epochs: int = option(3, "passes over the questions", low=1)
    max_steps: int | None = option(200, "stop after so many rollouts", low=1)
    stop_window: int = option(
        0,
        "stop when the mean reward of the last so many steps is not higher than that of as many "
        "before, by --stop-gain; 0 is never",
        low=0,
    )
    stop_gain: float = option(0.01, "what --stop-window asks the mean reward to rise", low=0.0)
    learning_rate: float = option(3e-5, "peak learning rate", low=0.0)
    warmup_ratio: float = option(0.1, "share of steps of linear warm-up", low=0.0, high=1.0)
    # The rollout.
    questions_per_step: int = option(16, "questions per rollout (B)", low=1)
    group_size: int = option(8, "responses per question (G)", low=2)
    max_prompt_tokens: int | None = option(
        None, "longer questions are dropped; None: those that fill the context", low=1
    )
    max_new_tokens: int = option(160, "response length limit", low=1)
    temperature: float = option(1.0, "of the policy: in sampling and in the loss alike", low=1e-3)
    rollout_batch: int = option(256, "responses sampled at a time (memory only)", low=1)
    # The loss.
    updates_per_rollout: int = option(1, "optimiser steps per rollout, on a share each", low=1)
    clip_eps_low: float = option(0.2, "the ratio is clipped at 1 - this", low=0.0, high=1.0)
    clip_eps_high: float = option(0.28, "the ratio is clipped at 1 + this (clip-higher)", low=0.0)
    normalize_std: bool = option(True, "divide advantages by their group's standard deviation")
    kl_coef: float = option(0.0, "weight of the KL penalty; 0 loads no reference", low=0.0)
    kl_type: str = option("k3", "estimator of the KL penalty", choices=("k1", "k2", "k3"))


# --- Reward, advantages, loss: pure functions -----------------------------------------------------


def reward(example: Example, response: str) -> float:
    """Returns 1.0 for a right final answer, else 0.0. A reward of your own goes here."""
    return accuracy_reward(response, example.truths, example.options, precision=example.precision)


def group_advantages(rewards: Tensor, *, normalize_std: bool = True) -> Tensor:
    """Returns (r - mean) / std within each group: rewards [B, G] -> advantages [B, G].

    DeepSeekMath (arXiv 2402.03300), section 4.1.2. The standard deviation is Bessel-corrected, as
    in torch.std and TRL. A group whose rewards are all equal teaches nothing: its advantages are
    exactly 0 (the floor of 1e-3 keeps rounding residue from being blown up: NVIDIA-NeMo/RL#4161).
    Without a KL term its responses are then not run, but counted in the loss (`Trainer.update`).
    normalize_std=False gives Dr. GRPO's advantages (arXiv 2503.20783), which do not favour very
    easy and very hard questions.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)
    advantages = centred / std.clamp(min=1e-3) if normalize_std else centred
    return torch.where(std > 1e-3, advantages, torch.zeros_like(advantages))


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, kl_type: str) -> Tensor:
    """Returns a per-token estimate of KL(policy || reference), as a loss term.

    Schulman, "Approximating KL Divergence" (2020). With p the policy's and r the reference's
    probability of the sampled token:

    k1 = log p - log r:          unbiased as a value, but its gradient is zero in expectation: no
                                 use as a loss.
    k2 = (log p - log r)^2 / 2:  its gradient is that of the reverse KL(policy || reference),
                                 on-policy.
    k3 = r/p - 1 - log r/p:      unbiased, never negative; its gradient is that of the forward
                                 KL(reference || policy).
    """
    log_ratio = ref_log_probs - log_probs
    if kl_type == "k1":
        return -log_ratio
    if kl_type == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio.clamp(max=20.0)) - log_ratio


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps_low: float,
    clip_eps_high: float,
    kl_coef: float = 0.0,
    ref_log_probs: Tensor | None = None,
    kl_type: str = "k3",
    num_tokens: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Returns the clipped policy-gradient loss, token by token, and its metrics.

    Paper: eq. 1; clip-higher and the token-level mean are DAPO's (arXiv 2503.14476).

    All tensors are [rows, T]; completion_mask is true on the tokens that count. advantages may also
    be [rows]: the same for each token of a row. (A pack's scored tokens come as one row.) Per token

        -min(ratio * A, clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high) * A) + kl_coef * KL,
        ratio = p / p_old,

    summed and divided by num_tokens: the response tokens of the *whole* optimiser batch (default:
    of this call), so that parts of a batch add up to its loss. The metrics are means over
    num_tokens, and add up likewise. Raises ValueError for kl_coef without ref_log_probs.
    """
    if kl_coef and ref_log_probs is None:
        raise ValueError("kl_coef needs ref_log_probs")
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    ignored = ~completion_mask.bool()
    if num_tokens is None:
        num_tokens = (~ignored).sum()
    num_tokens = torch.as_tensor(num_tokens, device=log_probs.device).clamp(min=1.0)

    def token_mean(x: Tensor) -> Tensor:
        # Filled, not multiplied by the mask: 0 * inf is NaN, in the backward pass too.
        return x.masked_fill(ignored, 0.0).sum() / num_tokens

    # The ratio of policies, and where it is clipped. What is ignored must not overflow in exp.
    log_probs = log_probs.masked_fill(ignored, 0.0)
    old_log_probs = old_log_probs.masked_fill(ignored, 0.0)
    ratio = (log_probs - old_log_probs).exp()
    clipped_ratio = ratio.clamp(1.0 - clip_eps_low, 1.0 + clip_eps_high)

    # The lower of the two gains: clipping never makes an update look better than it is.
    gain = ratio * advantages
    clipped_gain = clipped_ratio * advantages
    loss = token_mean(-torch.minimum(gain, clipped_gain))

    was_clipped = (clipped_gain < gain).to(ratio.dtype)
    metrics = {
        "ratio_mean": token_mean(ratio).item(),
        "clip_fraction": token_mean(was_clipped).item(),
    }
    if ref_log_probs is not None:
        ref_log_probs = ref_log_probs.masked_fill(ignored, 0.0)
        kl = token_mean(kl_penalty(log_probs, ref_log_probs, kl_type))
        loss = loss + kl_coef * kl
        metrics["kl"] = kl.item()
    return loss, metrics


def load_questions(options: GRPOOptions, tokenizer: Tokenizer) -> list[Question]:
    """Returns the questions, text only. Those whose prompt is too long are dropped and counted."""
    limit = Config.from_pretrained(options.model).max_position_embeddings - 1
    if options.max_prompt_tokens is not None:
        limit = min(limit, options.max_prompt_tokens)
    return load_text_questions(
        options.data,
        tokenizer,
        style=options.prompt_style,
        limit=limit,
        skip_bad=options.skip_bad_lines,
    )


# --- A step ---------------------------------------------------------------------------------------


class Trainer:
    """Policy, reference and optimiser, and what one step does with them."""

    def __init__(self, options: GRPOOptions, tokenizer: Tokenizer):
        self.options = options
        self.tokenizer = tokenizer
        self.model = load_for_training(options)
        self.dtype = forward_dtype(options)
        self.device = self.model.head_weight.device
        self.optimizer = make_optimizer(self.model, options)
        self.reference = None
        if options.kl_coef > 0:
            self.reference = load_for_training(options, frozen=True)
        check_vocabulary(tokenizer, self.model.config)
        self.idle_pack = make_response_pack([IDLE_RESPONSE])
        self.masked_ids = tokenizer.never_sampled(self.model.config.vocab_size).to(self.device)

    def step(
        self, questions: list[Question], number: int, learning_rate: float
    ) -> tuple[dict, list[dict]]:
        """Takes step `number` (from 0). Returns its metrics, and the records for samples.jsonl."""
        options = self.options
        # 1. Sample: a group of G responses to each question, from the policy as it is now.
        # 2. Reward [B, G]: is the final answer right?
        started = time.perf_counter()
        params = SamplingParams(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            n=options.group_size,
            seed=options.seed * 1_000_003 + number,  # steps of two seeds do not meet
        )
        with memory_phase("the rollout", *ROLLOUT_REMEDIES):
            groups, rewards = rollout(
                self.model,
                self.tokenizer,
                [question.prompt for question in questions],
                params,
                dtype=self.dtype,
                max_batch=options.rollout_batch,
                judge=lambda i, completion: reward(questions[i].example, completion.text),
            )
        rollout_seconds = time.perf_counter() - started

        # 3. Advantages [B, G]: how much better than its group's mean is each response?
        advantages = group_advantages(rewards, normalize_std=options.normalize_std)

        # 4. Loss and optimiser step on all responses.
        pairs = list(zip(questions, groups))
        responses = []
        for (question, group), row in zip(pairs, advantages.tolist()):
            for completion, advantage in zip(group, row):
                responses.append(make_response(question.prompt, completion, advantage))
        metrics = rollout_metrics(groups, rewards, advantages, rollout_seconds)
        with memory_phase("the update", *update_remedies(options)):
            metrics |= self.update(responses, learning_rate)
        metrics["tokens"] = sum(len(response.row.ids) for response in responses)
        return metrics, sample_records(number + 1, pairs, rewards)

    def update(self, responses: list[Response], learning_rate: float) -> dict:
        """Takes `updates_per_rollout` optimiser steps, each on its share of the responses.

        Returns their mean metrics. Where no response of a share has an advantage there is no
        gradient (unless there is a KL term): nothing is run, nothing changes, neither weights nor
        Adam's moments, and what a forward pass would measure is None.
        """
        options = self.options
        shares = split_evenly(responses, options.updates_per_rollout)

        # 1. Packs. A response without an advantage has no gradient: it need not be run. Of
        #    several processes each takes its share of the packs.
        packs_of = []
        for share in shares:
            if self.reference is None:
                share = [response for response in share if response.advantage != 0]
            packs = deal(make_response_packs(share, options.pack_tokens), self.idle_pack)
            packs_of.append([part.to(self.device) for part in packs])

        # 2. Log-probs of the old policy and the reference, before any weight moves. With a single
        #    step the policy still is the old one: then its own log-probs, detached, will do.
        every_pack = list(chain.from_iterable(packs_of))
        with torch.no_grad():
            if options.updates_per_rollout > 1:
                for part in every_pack:
                    part.old_log_probs, _ = self.score(self.model, part.pack)
            if self.reference is not None:
                with visiting(self.reference, self.device):
                    for part in every_pack:
                        part.ref_log_probs, _ = self.score(self.reference, part.pack)

        # 3. Loss and optimiser step of each share. The loss is a mean over all tokens of the share,
        #    whether they are run or not.
        steps = []
        for share, packs in zip(shares, packs_of):
            num_tokens = max(1, sum(len(response.sampler_log_probs) for response in share))
            measured = {rank(): [self.accumulate(part, num_tokens) for part in packs]}
            grad_norm = optimizer_step(
                self.model, self.optimizer, learning_rate, options.max_grad_norm
            )
            everywhere = list(chain.from_iterable(exchange(measured).values()))
            steps.append(update_metrics(everywhere) | {"grad_norm": grad_norm})
        return mean_metrics(steps)

    def accumulate(self, part: ResponsePack, num_tokens: int) -> dict[str, float]:
        """Adds a pack's gradient to the step's. Returns its share of the loss, and other sums."""
        options = self.options
        log_probs, entropy = self.score(self.model, part.pack)
        old_log_probs = part.old_log_probs
        if old_log_probs is None:
            old_log_probs = log_probs.detach()
        # A pack's tokens are one row here. Divided by the tokens of the whole share, the packs'
        # losses add up to the share's.
        loss, metrics = grpo_loss(
            log_probs[None],
            old_log_probs[None],
            part.advantages[None],
            torch.ones_like(log_probs[None], dtype=torch.bool),
            clip_eps_low=options.clip_eps_low,
            clip_eps_high=options.clip_eps_high,
            kl_coef=options.kl_coef,
            ref_log_probs=None if part.ref_log_probs is None else part.ref_log_probs[None],
            kl_type=options.kl_type,
            num_tokens=num_tokens,
        )
        loss.backward()
        # The metrics are to be means over the tokens that are run, so they go on as sums.
        sums = {name: value * num_tokens for name, value in metrics.items()}
        sums["tokens"] = len(log_probs)
        sums["entropy"] = entropy.sum().item()
        # Sampler and trainer should agree to rounding.
        difference = (old_log_probs - part.sampler_log_probs).abs()
        sums["logprob_diff"] = difference.sum().item()
        sums["logprob_diff_max"] = difference.max().item() if len(difference) else 0.0
        return {"loss": loss.item(), **sums}

    def score(self, model: Qwen2_5_VL, pack: Pack) -> tuple[Tensor, Tensor]:
        """Returns a model's log-probs and entropies [N], under the distribution sampled from."""
        temperature = self.options.temperature
        return score(model, pack, temperature=temperature, masked_ids=self.masked_ids)


# --- The run --------------------------------------------------------------------------------------


def rehearse(options: GRPOOptions, rehearsal: Rehearsal) -> None:
    """Takes a step on responses as long as they may be, for the memory plan (training/plan.py)."""
    trainer = Trainer(options, NoTokenizer())
    rehearsal.grpo_step(trainer, rehearsal.longest_prompt(options, load_questions))


def train(options: GRPOOptions) -> None:
    """Runs the whole stage: from the options to the run folder."""
    # Refuse an occupied folder and what does not fit a GPU, before anything is loaded.
    run = Run(options)
    options = settle(options, rehearse)
    with processes(training_device(options.device)):
        train_on_ranks(options, run)


def train_on_ranks(options: GRPOOptions, run: Run) -> None:
    """Loads, and takes all steps. Every process runs this."""
    # 1. Load; only then touch the disk.
    tokenizer = Tokenizer.from_pretrained(options.model)
    questions = load_questions(options, tokenizer)
    validation = Validation(options, tokenizer, reward)
    size = options.questions_per_step
    total_steps = num_steps(len(questions), size, options.epochs, options.max_steps)
    warmup_steps = max(1, round(options.warmup_ratio * total_steps))
    with memory_phase("loading", *update_remedies(options)):
        trainer = Trainer(options, tokenizer)
        run.begin(trainer.model, trainer.optimizer, warmup_steps)

    def converged() -> bool:
        rewards = [record["reward"] for record in run.records]
        return reward_converged(rewards, options.stop_window, options.stop_gain)

    # 2. Steps. The learning rate rises linearly over the first of them; over how many, was settled
    #    when the run first started, so that one that goes on for longer keeps its schedule.
    for _, chosen in run.steps(len(questions), size, stop=converged):
        batch = [questions[i] for i in chosen]
        learning_rate = options.learning_rate * min(1.0, (run.step + 1) / run.warmup_steps)
        with run.explaining_divergence([q.example.id for q in batch], learning_rate):
            metrics, samples = trainer.step(batch, run.step, learning_rate)
        metrics["lr"] = learning_rate
        metrics["train_seconds"] = run.seconds() - metrics["rollout_seconds"]
        run.finish_step(metrics | validation.after_step(run), samples)
    if converged() and is_first():
        risen = f"the reward has not risen by {options.stop_gain} in {options.stop_window} steps"
        print(f"stopped after step {run.step}: {risen}", file=sys.stderr)


def main(argv: list[str]) -> None:
    options = parse_options(GRPOOptions, argv, RECIPES)
    if options.plan:
        print_plan(options, rehearse)
        return
    train(options)


if __name__ == "__main__":
    run_command(main)
