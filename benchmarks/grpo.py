"""A step of GRPO, beside TRL's GRPOTrainer.

    python benchmarks/grpo.py --peer PEER/bin/python                       # micro/base, its decoder
    python benchmarks/grpo.py --peer PEER/bin/python --model Qwen2.5-0.5B --data gsm8k.jsonl \\
        --questions 2 --group-size 4 --new-tokens 48 --modes full --threads 2 --peer-batches 8

The peer's environment is made by `python -m venv PEER && PEER/bin/pip install torch trl`. Both
sides take the same steps, on the same questions: sample a group of responses to each at temperature
1, reward them by `rewards.accuracy_reward`, and take one step of AdamW (fused on both), in float32,
without a KL term, with nothing computed twice in the backward pass. The loss is TRL's default
("dapo": a mean over all tokens of the batch), with clip-higher. TRL samples all responses in one
batch; of its --peer-batches, the rows in a forward pass of the update, the fastest counts.

The two sides sample different responses. So that they work on as many tokens, there is the mode
`full`: every response has --new-tokens tokens, whatever is in it, and every second one of a group
is rewarded with 0.3 more, so that none is without an advantage (ours would not run it in the
update). In the mode `natural` responses end when they end, and rewards are what they are.

Before they take steps, both sides are given one batch of natural responses, with advantages and old
log-probs 0.3 off at random, so that some ratios are clipped: the losses must be equal, and so must
be the norms of their gradients. The sides take turns, and each loads the model anew. A turn's first
step warms up.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo  # noqa: E402
from benchmarks.common import (  # noqa: E402
    about,
    alternate,
    ask_peer,
    give_memory_back,
    step_figures,
    write_decoder,
)
from data import ImageConfig, Tokenizer, read_examples  # noqa: E402
from data.prompts import Question, format_prompt, make_prompt  # noqa: E402
from data.responses import Response, make_response, make_response_packs  # noqa: E402
from hub.config import Config  # noqa: E402
from hub.errors import InputError  # noqa: E402
from hub.options import MICRO_BASE, MICRO_DATA, option, parse_options, run_command  # noqa: E402
from sample import Sampler, SamplingParams  # noqa: E402

MODES = ("full", "natural")
BONUS = 0.3  # in the mode "full", for every second response of a group


@dataclass
class GRPOBenchOptions:
    """Seconds of a step of GRPO, of ours and of TRL's."""

    model: str = option(str(MICRO_BASE), "model folder")
    data: str = option(str(MICRO_DATA / "rl.jsonl"), "questions with answers")
    prompt_style: str = option("direct", "how a question is asked", choices=("direct", "train"))
    questions: int = option(16, "questions of a step, the first ones of --data", low=1)
    group_size: int = option(8, "responses to each", low=2)
    modes: list[str] = option(["full", "natural"], "full: all responses as long; natural")
    new_tokens: int = option(64, "tokens of a full response", low=1)
    natural_tokens: int = option(160, "at most, of a natural one", low=1)
    pack_tokens: int = option(4096, "ours: tokens of a forward pass of the update", low=1)
    steps: int = option(3, "measured in a turn, behind one to warm up", low=1)
    rounds: int = option(4, "in each of which both sides have a turn", low=1)
    learning_rate: float = option(1e-6, "of AdamW", low=0.0)
    peer: str | None = option(None, "Python of an environment with trl")
    peer_batches: list[str] = option(["32", "64", "128"], "its rows in a forward pass")
    threads: int = option(1, "of the CPU", low=1)
    json: bool = option(False, "the last line is one JSON object")


def training_options(folder: str, mode: str, options: GRPOBenchOptions) -> grpo.GRPOOptions:
    """Returns what our Trainer is made of."""
    return grpo.GRPOOptions(
        model=folder,
        data=options.data,
        prompt_style=options.prompt_style,
        questions_per_step=options.questions,
        group_size=options.group_size,
        max_new_tokens=options.new_tokens if mode == "full" else options.natural_tokens,
        pack_tokens=options.pack_tokens,
        learning_rate=options.learning_rate,
        device="cpu",
        dtype="float32",
        checkpointing="off",
    )


def first_questions(tokenizer: Tokenizer, options: GRPOBenchOptions) -> list[Question]:
    """Returns the first questions of --data."""
    questions = []
    for example in read_examples(options.data):
        text = format_prompt(example, options.prompt_style)
        prompt = make_prompt(text, [], tokenizer, ImageConfig())
        questions.append(Question(example, prompt))
        if len(questions) == options.questions:
            return questions
    raise InputError(f"{options.data}: has {len(questions)} questions only")


# --- One loss, of one batch ---


def sample_batch(
    trainer: grpo.Trainer, questions: list[Question], options: GRPOBenchOptions
) -> list[Response]:
    """Returns natural responses with advantages at random, and old log-probs that are off.

    (These take the place of the sampler's log-probs.)
    """
    sampler = Sampler(trainer.model, trainer.tokenizer)
    params = SamplingParams(options.natural_tokens, n=options.group_size)
    groups = sampler.generate([question.prompt for question in questions], params)
    generator = torch.Generator().manual_seed(0)
    responses = []
    for question, group in zip(questions, groups):
        rewards = torch.rand(1, options.group_size, generator=generator)
        [advantages] = grpo.group_advantages(rewards).tolist()
        for completion, advantage in zip(group, advantages):
            response = make_response(question.prompt, completion, advantage)
            noise = torch.randn(len(completion.ids), generator=generator)
            response.sampler_log_probs += BONUS * noise
            responses.append(response)
    return responses


def our_loss(trainer: grpo.Trainer, responses: list[Response]) -> dict:
    """Returns the loss of these responses and the norm of its gradient, which is cleared again."""
    num_tokens = sum(len(response.sampler_log_probs) for response in responses)
    parts = []
    for part in make_response_packs(responses, trainer.options.pack_tokens):
        part.old_log_probs = part.sampler_log_probs
        parts.append(trainer.accumulate(part, num_tokens))
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), float("inf"))
    trainer.optimizer.zero_grad(set_to_none=True)
    clipped = sum(part["clip_fraction"] for part in parts) / num_tokens
    loss = sum(part["loss"] for part in parts)
    return {"loss": loss, "grad_norm": norm.item(), "clip_fraction": clipped}


def batch_for_peer(questions: list[Question], responses: list[Response]) -> list[dict]:
    """Returns the same responses as JSON."""
    group_size = len(responses) // len(questions)
    rows = []
    for i, response in enumerate(responses):
        prompt = questions[i // group_size].prompt.ids
        row = {
            "prompt": prompt,
            "completion": response.row.ids[len(prompt) :].tolist(),
            "advantage": response.advantage,
            "old_log_probs": response.sampler_log_probs.tolist(),
        }
        rows.append(row)
    return rows


# --- Steps ---


def reward_with_bonus():
    """Returns the reward of the mode "full", which is asked about a group's responses in turn."""
    bonus = cycle([0.0, BONUS])
    return lambda example, response: accuracy(example, response) + next(bonus)


accuracy = grpo.reward  # what grpo.py itself rewards


def ours(trainer: grpo.Trainer, questions: list[Question], mode: str, steps: int) -> dict:
    """Takes a turn's steps. Returns the figures of each but the first."""
    if mode == "full":
        trainer.tokenizer.stop_ids = ()  # nothing ends a response but its length
    grpo.reward = reward_with_bonus() if mode == "full" else accuracy
    taken = {name: [] for name in ("seconds", "busy", "rollout_seconds", "tokens", "rewards")}
    for number in range(1 + steps):
        started, worked = time.perf_counter(), time.process_time()
        metrics, samples = trainer.step(questions, number, trainer.options.learning_rate)
        taken["seconds"].append(time.perf_counter() - started)
        taken["busy"].append(time.process_time() - worked)
        taken["rollout_seconds"].append(metrics["rollout_seconds"])
        taken["tokens"].append(round(metrics["response_length"] * len(samples)))
        taken["rewards"].append(metrics["reward"])
    grpo.reward = accuracy
    return {name: values[1:] for name, values in taken.items()}


def theirs(
    training: grpo.GRPOOptions,
    questions: list[Question],
    mode: str,
    batches: list[int],
    given: list[dict],
    options: GRPOBenchOptions,
) -> list[dict]:
    """Returns the same of the peer's turn for each of its batch sizes, and its loss of `given`."""
    tokenizer = Tokenizer.from_pretrained(training.model)
    job = {
        "model": training.model,
        "prompts": [question.prompt.ids for question in questions],
        "texts": [tokenizer.decode(q.prompt.ids, skip_special=False) for q in questions],
        "truths": [question.example.truths for question in questions],
        "choices": [question.example.options for question in questions],
        "precisions": [question.example.precision for question in questions],
        "bonus": BONUS if mode == "full" else 0.0,
        "endless": mode == "full",
        "group_size": options.group_size,
        "new_tokens": training.max_new_tokens,
        "clip_eps_low": training.clip_eps_low,
        "clip_eps_high": training.clip_eps_high,
        "max_grad_norm": training.max_grad_norm,
        "learning_rate": training.learning_rate,
        "batches": batches,
        "steps": options.steps,
        "given": given,
        "threads": options.threads,
    }
    return ask_peer(options.peer, "trl_grpo.py", job)


def measure(folder: str, mode: str, options: GRPOBenchOptions) -> dict:
    """Lets both sides take their turns in one mode. Returns the figures."""
    training = training_options(folder, mode, options)
    questions = first_questions(Tokenizer.from_pretrained(folder), options)
    result, turns = {}, {"ours": [], "trl": []}
    batches = [int(size) for size in options.peer_batches]
    given = []
    for side in alternate(options.rounds, options.peer is not None):
        if side == "ours":
            trainer = grpo.Trainer(training, Tokenizer.from_pretrained(folder))
            torch.set_num_threads(options.threads)  # loading sets it to 1 for a small model
            if not turns["ours"]:
                responses = sample_batch(trainer, questions, options)
                given = batch_for_peer(questions, responses)
                result["our_loss"] = our_loss(trainer, responses)
            turns["ours"].append(ours(trainer, questions, mode, options.steps))
            del trainer
            give_memory_back()
            continue
        found = theirs(training, questions, mode, batches, given, options)
        busy = {turn["batch"]: step_figures([turn], 1)["busy"] for turn in found}
        if not turns["trl"]:
            result["peer_busy_by_batch"] = busy
            result["trl_loss"] = found[0]["given"]
        batches, given = [min(busy, key=busy.get)], []
        turns["trl"] += [turn for turn in found if turn["batch"] == batches[0]]

    for name in [name for name in turns if turns[name]]:
        tokens = fmean(count for turn in turns[name] for count in turn["tokens"])
        rollout = [{**turn, "seconds": turn["rollout_seconds"]} for turn in turns[name]]
        result[name] = step_figures(turns[name], tokens)
        result[name]["rollout_seconds"] = step_figures(rollout, tokens)["seconds"]
        result[name]["response_tokens"] = tokens
        result[name]["reward"] = fmean(reward for turn in turns[name] for reward in turn["rewards"])
    if turns["trl"]:
        result["trl"] |= {key: turns["trl"][0][key] for key in ("batch", "trl", "transformers")}
        # Seconds a token that was sampled: in the mode "full" there are as many on both sides.
        speed = {name: result[name]["tokens_per_second"] for name in turns}
        work = {name: result[name]["busy"] / result[name]["response_tokens"] for name in turns}
        result["ratio"] = speed["ours"] / speed["trl"]
        result["busy_ratio"] = work["trl"] / work["ours"]
    return result


def print_table(mode: str, result: dict) -> None:
    """Prints a line for each side."""
    for name in [name for name in ("ours", "trl") if name in result]:
        found, loss = result[name], result["our_loss" if name == "ours" else "trl_loss"]
        update = found["seconds"] - found["rollout_seconds"]
        print(
            f"{mode:<9}{name:<5}{found['seconds']:8.3f} s a step ({found['busy']:.3f} s busy):",
            end="",
        )
        print(f" rollout {found['rollout_seconds']:.3f}, update {update:.3f}", end="")
        print(f"{found['tokens_per_second']:>10,.1f} of {found['response_tokens']:,.0f} tokens/s")
        print(f"{'':14}given batch: loss {loss['loss']:.6f}, gradient {loss['grad_norm']:.5g}")
    if "ratio" in result:
        print(
            f"{mode:<9}ratio {result['ratio']:.2f} ({result['busy_ratio']:.2f} of busy seconds);",
            end="",
        )
        print(f" its batches' busy seconds {result['peer_busy_by_batch']}")


def main(argv: list[str]) -> None:
    """Measures each mode, and prints the table."""
    options = parse_options(GRPOBenchOptions, argv)
    responses = options.questions * options.group_size
    for size in options.peer_batches if options.peer else []:
        if not (size.isdigit() and int(size) and responses % int(size) == 0):
            raise InputError(f"--peer-batches {size}: must divide the step's {responses} responses")
    if not set(options.modes) <= set(MODES):
        raise InputError(f"--modes must be of {', '.join(MODES)}, not {' '.join(options.modes)}")
    with tempfile.TemporaryDirectory() as decoder:
        folder = options.model
        if Config.from_pretrained(folder).vision is not None:
            write_decoder(folder, decoder)
            folder = decoder
        results = {}
        for mode in options.modes:
            results[mode] = measure(folder, mode, options)
            print_table(mode, results[mode])
    if options.json:
        print(json.dumps(results | {"model": Path(options.model).name} | about(options.threads)))


if __name__ == "__main__":
    run_command(main)
