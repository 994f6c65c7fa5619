"""What metrics.jsonl and samples.jsonl say of a rollout (paper: figure 5)."""

from statistics import fmean

from torch import Tensor

from rewards import extract_answer


def rollout_metrics(
    groups: list[list], rewards: Tensor, advantages: Tensor, seconds: float
) -> dict:
    """Returns a rollout's metrics from its completions, rewards and advantages [B, G]."""
    completions = [completion for group in groups for completion in group]
    lengths = Tensor([len(completion.ids) for completion in completions])
    num_tokens = lengths.sum()
    std = rewards.std(dim=1)
    # A long response weighs more in the loss: this mean is over tokens, so it need not be 0.
    advantage_mean = (advantages.flatten() * lengths).sum() / num_tokens
    return {
        "reward": rewards.mean().item(),
        "reward_std": std.mean().item(),
        "zero_std_groups": (std <= 1e-3).float().mean().item(),  # those that teach nothing
        "advantage_mean": advantage_mean.item(),
        "response_length": lengths.mean().item(),
        "clipped_responses": fmean(c.finish_reason == "length" for c in completions),
        "rollout_seconds": seconds,
        "rollout_tokens_per_second": num_tokens.item() / seconds,
    }


# What a forward pass of the update measures, as means over the tokens that are run.
MEASURED = ("ratio_mean", "clip_fraction", "entropy", "logprob_diff")


def update_metrics(parts: list[dict]) -> dict:
    """Returns an optimiser step's metrics from those of its packs.

    The loss is a mean over all tokens of the step, to which the packs' parts add up. The others are
    sums over a pack's tokens, and become means over those that were run. Where nothing was run,
    since nothing was to be learnt, they are None.
    """
    if not parts:
        return {"loss": 0.0, "kl": 0.0, **dict.fromkeys((*MEASURED, "logprob_diff_max"))}
    num_run = max(1, sum(part["tokens"] for part in parts))
    metrics = {"loss": sum(part["loss"] for part in parts)}
    metrics["kl"] = sum(part.get("kl", 0.0) for part in parts) / num_run  # 0 without a reference
    for name in MEASURED:
        metrics[name] = sum(part[name] for part in parts) / num_run
    metrics["logprob_diff_max"] = max(part["logprob_diff_max"] for part in parts)
    return metrics


def mean_metrics(steps: list[dict]) -> dict:
    """Returns the means over a rollout's optimiser steps, but of a maximum the greatest; None for
    what none has measured."""
    means = {}
    for name in steps[0]:
        values = [step[name] for step in steps if step[name] is not None]
        combine = max if name == "logprob_diff_max" else fmean
        means[name] = combine(values) if values else None
    return means


def reward_converged(rewards: list[float], window: int, gain: float) -> bool:
    """Returns whether the reward of the steps so far has stopped rising.

    That is: the mean of the last `window` steps is less than `gain` above the mean of the `window`
    steps before them. Never with a window of 0. The paper trains until "the training reward
    converges" and gives no criterion (section 3.2); this one is ours.
    """
    if window == 0 or len(rewards) < 2 * window:
        return False
    return fmean(rewards[-window:]) - fmean(rewards[-2 * window : -window]) < gain


def sample_records(step: int, pairs: list[tuple], rewards: Tensor) -> list[dict]:
    """Returns a record per response: what was asked, answered, extracted and rewarded.

    `pairs` holds each question with its group of completions, `rewards` [B, G] theirs.
    """
    records = []
    for (question, group), values in zip(pairs, rewards.tolist()):
        for completion, value in zip(group, values):
            record = {
                "step": step,
                "id": question.example.id,
                "question": question.example.question,
                "response": completion.text,
                "extracted": extract_answer(completion.text),
                "answer": question.example.answer,
                "reward": value,
                "finish_reason": completion.finish_reason,
            }
            records.append(record)
    return records
