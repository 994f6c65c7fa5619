"""Evaluation by the paper's protocols (paper: section 4, appendix B).

    python evaluate.py --model runs/grpo/model                                   # the four micro test sets, greedy
    python evaluate.py --model DIR --data medqa.jsonl --prompt-style mcq --think-budget 3584 --max-new-tokens 4096
    python evaluate.py --model DIR --data gsm8k.jsonl --prompt-style math --runs 5 --temperature 0.3 --out gsm8k.jsonl

Greedy decoding gives the headline figures. With several runs at a temperature: avg@k (the accuracy), maj@k (the answer
given most often) and pass@k (right at least once). The sampler applies no repetition penalty; the hub's
generation_config asks for 1.05, which published Qwen figures may have used.
"""
import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev

from data import Example, ImageConfig, InputError, Prompt, format_prompt, load_image, make_prompt, read_examples
from rewards import accuracy_reward, extract_answer, is_equivalent
from sample import Completion, Interrupted, Sampler, SamplingParams, load_sampler
from training import MICRO_BASE, MICRO_DATA, option, parse_options, run_command

MICRO_TESTS = ("test_text", "test_image", "test_text_other", "test_image_other")


@dataclass
class EvaluateOptions:
    """Accuracy of a model on files of questions with answers."""
    model: str = option(str(MICRO_BASE), "model folder")
    data: list[str] = option([str(MICRO_DATA / f"{name}.jsonl") for name in MICRO_TESTS], "question files")
    prompt_style: str = option("direct", "how a question is asked", choices=("mcq", "math", "train", "direct"))
    runs: int = option(1, "responses per question (k)", low=1)
    temperature: float = option(0.0, "0 is greedy", low=0.0)
    max_new_tokens: int = option(256, "response length limit", low=1)
    think_budget: int | None = option(None, "tokens after which </think> is appended if it has not come", low=0)
    limit: int | None = option(None, "only the first so many questions of each file", low=1)
    mask_images: bool = option(False, "ask image questions without their images (paper: table 6)")
    max_batch: int = option(256, "sequences sampled at a time", low=1)
    seed: int = option(0, "of the random stream", low=0)
    out: str | None = option(None, "JSONL file for every prompt, response, extracted answer and verdict")
    json: bool = option(False, "print one JSON object per file")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "auto is the one on disk", choices=("auto", "float32", "bfloat16"))


def example_prompt(sampler: Sampler, images: ImageConfig, example: Example, options: EvaluateOptions) -> Prompt:
    """The question with its images in the chosen prompt."""
    pictures = [] if options.mask_images else [load_image(image) for image in example.images]
    return make_prompt(format_prompt(example, options.prompt_style), pictures, sampler.tokenizer, images)


def evaluate(sampler: Sampler, images: ImageConfig, examples: list[Example], options: EvaluateOptions) -> list[dict]:
    """One record per question and run, in order. After Ctrl-C raises Interrupted with those of the questions whose runs
    are all there."""
    prompts = [example_prompt(sampler, images, example, options) for example in examples]
    params = SamplingParams(options.max_new_tokens, options.temperature, n=options.runs, seed=options.seed,
                            think_budget=options.think_budget)
    try:
        groups = sampler.generate(prompts, params, progress=True)
    except Interrupted as stopped:
        whole = [(e, group) for e, group in zip(examples, stopped.results) if len(group) == options.runs]
        raise Interrupted(records([e for e, _ in whole], [group for _, group in whole], options)) from None
    return records(examples, groups, options)


def records(examples: list[Example], groups: list[list[Completion]], options: EvaluateOptions) -> list[dict]:
    """What was asked, answered, extracted, and the verdict."""
    return [{"id": example.id, "run": run, "domain": example.domain, "meta": example.meta, "response": completion.text,
             "prompt": format_prompt(example, options.prompt_style), "extracted": extract_answer(completion.text),
             "vote": vote(completion.text, example), "answer": example.answer,
             "correct": accuracy_reward(completion.text, example.answer, example.options) == 1.0,
             "finish_reason": completion.finish_reason, "forced": any(completion.forced), "tokens": len(completion.ids),
             "words": len(completion.text.split())}
            for example, group in zip(examples, groups) for run, completion in enumerate(group)]


def vote(response: str, example: Example) -> str | None:
    """What a response counts for in a majority: the option it names ("B: No" is a vote for B), else its answer."""
    if not example.options:
        return extract_answer(response)
    return next((letter for letter in example.options if accuracy_reward(response, letter, example.options)), None)


def majority(records: list[dict]) -> bool:
    """Is the answer that most of a question's runs gave right? Equivalent answers vote together, unparsed ones not at
    all, and of equally many the answer that came first wins."""
    voters = [r for r in records if r["vote"] is not None]
    votes = [sum(r["correct"] == other["correct"] and (r["correct"] or is_equivalent(r["vote"], other["vote"]))
                 for other in voters) for r in voters]
    return bool(voters) and voters[votes.index(max(votes))]["correct"]


def summarise(records: list[dict]) -> dict:
    """The figures of one file. `stderr` is that of the mean over questions of each question's mean over its runs."""
    questions: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        questions[record["id"]].append(record)
    scores = [fmean(r["correct"] for r in group) for group in questions.values()]
    n, runs = len(scores), len(records) // len(scores)
    domains: dict[str, list[float]] = defaultdict(list)
    for group, score in zip(questions.values(), scores):
        domains[str(group[0]["domain"])].append(score)
    summary = {"n": n, "accuracy": fmean(scores), "stderr": stdev(scores) / n**0.5 if n > 1 else 0.0}
    if runs > 1:
        summary |= {f"avg@{runs}": summary["accuracy"], f"maj@{runs}": fmean(map(majority, questions.values())),
                    f"pass@{runs}": fmean(any(r["correct"] for r in group) for group in questions.values())}
    return summary | {"unparsed": fmean(r["extracted"] is None for r in records),
                      "mean_words": fmean(r["words"] for r in records),
                      "mean_tokens": fmean(r["tokens"] for r in records),
                      "forced": fmean(r["forced"] for r in records),
                      "by_domain": {d: {"n": len(s), "accuracy": fmean(s)} for d, s in sorted(domains.items())}}


def load_examples(path: str, limit: int | None) -> list[Example]:
    """The file's questions, each with a name of its own."""
    examples = list(islice(read_examples(path), limit))
    if len({example.id for example in examples}) < len(examples):
        raise InputError(f"{path}: field 'id' is not unique")
    return examples


def print_table(results: dict[str, dict]) -> None:
    """One line per file, in percent."""
    columns = [key for key in next(iter(results.values())) if "@" in key]
    print(f"{'file':<24}{'n':>6}{'accuracy':>16}" + "".join(f"{c:>9}" for c in columns)
          + f"{'unparsed':>10}{'forced':>8}{'words':>8}{'tokens':>8}")
    for path, s in results.items():
        accuracy = f"{100 * s['accuracy']:.1f} +- {100 * s['stderr']:.1f}"
        print(f"{Path(path).stem:<24}{s['n']:>6}{accuracy:>16}" + "".join(f"{100 * s[c]:>9.1f}" for c in columns)
              + f"{100 * s['unparsed']:>10.1f}{100 * s['forced']:>8.1f}{s['mean_words']:>8.1f}{s['mean_tokens']:>8.1f}")


def main(argv: list[str]) -> None:
    """Checks everything that can be checked, then evaluates file by file; after Ctrl-C what was answered counts."""
    options = parse_options(EvaluateOptions, argv)
    if options.runs > 1 and options.temperature == 0:
        raise InputError("--runs above 1 needs a --temperature above 0: greedy runs are all the same")
    if len(set(options.data)) < len(options.data):
        raise InputError("--data names a file twice")
    if options.out and Path(options.out).resolve() in [Path(path).resolve() for path in options.data]:
        raise InputError(f"--out {options.out} is one of the question files")
    files = {path: load_examples(path, options.limit) for path in options.data}
    sampler, images = load_sampler(options.model, options.device, options.dtype, max_batch=options.max_batch)
    for path, examples in files.items():  # whatever is wrong with the last file is said before the first is sampled
        for example in examples:
            try:
                sampler.check(example_prompt(sampler, images, example, options), "prompt")
            except InputError as error:
                raise InputError(f"{path}: question {example.id}: {error}") from None
    out = open(options.out, "w") if options.out else None
    results, interrupted = {}, False
    for path, examples in files.items():
        try:
            answered = evaluate(sampler, images, examples, options)
        except Interrupted as stopped:
            answered = stopped.results
            interrupted = True
        if answered:
            results[path] = summarise(answered)
        if out:
            out.writelines(json.dumps({"file": path, **record}) + "\n" for record in answered)
            out.flush()
        if options.json and answered:
            print(json.dumps({"file": path, **results[path]}), flush=True)
        if interrupted:
            break
    if results and not options.json:
        print_table(results)
    if interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_command(main)
