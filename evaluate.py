r"""Evaluation by the paper's protocols (paper: section 4, appendix B).

    python evaluate.py --model runs/grpo/model          # the four micro test sets, greedy
    python evaluate.py --model DIR --data medqa.jsonl --prompt-style mcq --think-budget 3584 \
        --max-new-tokens 4096
    python evaluate.py --model DIR --data gsm8k.jsonl --prompt-style math --runs 5 \
        --temperature 0.3 --out answers.jsonl           # --resume: on from an interruption
    python evaluate.py --model DIR --data mmmu.tsv --mask-images --runs 3 --temperature 0.3 \
        --out masked.jsonl                              # table 6: then tools/compare_masked.py

Greedy decoding gives the headline figures. With k runs at a temperature there are also avg@k (the
accuracy), maj@k (is the answer given most often right?) and pass@k (was any of the answers right?).
An answer that cannot be parsed is wrong. No prompt is cut: a question whose prompt does not fit the
context is not asked, but counted as `dropped`; records that --skip-bad-lines left out are counted
as `bad`. Neither are in any other figure.

The sampler applies no repetition penalty; the hub's generation_config asks for 1.05, which
published Qwen figures may have used.
"""

import json
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from data import (
    STYLES,
    Example,
    ImageConfig,
    Loaded,
    Question,
    format_prompt,
    load_examples,
    make_prompt,
)
from hub.device import DEVICE_HELP, DTYPE_HELP, DTYPES, memory_phase
from hub.disk import follow_links
from hub.errors import InputError
from hub.options import MICRO_BASE, MICRO_DATA, option, parse_options, run_command
from hub.weights import model_files
from rewards import accuracy_reward, extract_answer, is_equivalent
from sample import Completion, Sampler, SamplingParams, load_sampler
from training.journal import recorded_options
from training.record_file import RecordFile, out_file, short_names, when_all_are_there

MICRO_TESTS = ("test_text", "test_image", "test_text_other", "test_image_other")
MICRO_FILES = [str(MICRO_DATA / f"{name}.jsonl") for name in MICRO_TESTS]


@dataclass
class EvaluateOptions:
    """Measure the accuracy of a model on files of questions with answers."""

    model: str = option(str(MICRO_BASE), "model folder")
    data: list[str] = option(MICRO_FILES, "question files")
    prompt_style: str = option("direct", "how a question is asked", choices=STYLES)
    runs: int = option(1, "responses per question (k)", low=1, high=1_000_000)
    temperature: float = option(0.0, "0 is greedy", low=0.0)
    max_new_tokens: int = option(256, "response length limit", low=1)
    think_budget: int | None = option(None, "tokens after which </think> is appended", low=0)
    limit: int | None = option(None, "only the first so many questions of each file", low=1)
    skip_bad_lines: bool = option(False, "leave bad records out, and say how many")
    mask_images: bool = option(False, "ask image questions without their images (paper: table 6)")
    max_batch: int = option(256, "sequences sampled at a time", low=1)
    seed: int = option(0, "seed of the samples", low=0)
    out: str | None = option(None, "JSONL file for every prompt, response, answer and verdict")
    resume: bool = option(False, "go on where --out was interrupted")
    overwrite: bool = option(False, "replace what --out holds")
    json: bool = option(False, "print one JSON object per file")
    device: str = option("auto", DEVICE_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)


# --- Ask ---


def load_questions(
    sampler: Sampler, images: ImageConfig, path: str, options: EvaluateOptions
) -> Loaded:
    """Returns the `Question`s of a file, and how many were dropped or bad.

    Raises InputError where a record is bad and --skip-bad-lines is not given, where two questions
    have the same id, and where no question is left.
    """

    def convert(example: Example) -> Question | None:
        text = format_prompt(example, options.prompt_style)
        pictures = [] if options.mask_images else example.images
        try:
            prompt = make_prompt(text, pictures, sampler.tokenizer, images)
        except InputError as error:
            raise InputError(f"question {example.id}: {error}") from None
        if not sampler.fits(prompt):
            return None
        sampler.check(prompt, f"question {example.id}")
        return Question(example, prompt)

    return load_examples(
        path,
        convert,
        skip_bad=options.skip_bad_lines,
        limit=options.limit,
        too_long=f"their prompts do not fit the context of {sampler.context} tokens",
        unique_ids=True,
    )


def evaluate(
    sampler: Sampler,
    questions: list[Question],
    options: EvaluateOptions,
    on_records: Callable[[list[dict]], None],
) -> None:
    """Asks all questions; `on_records` gets the records of each as soon as all its runs are there.

    The samples of a question are a function of its id and the seed, so they do not depend on which
    others are asked (on a GPU as far as rounding does not depend on the batch).
    """
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        n=options.runs,
        seed=options.seed,
        think_budget=options.think_budget,
    )

    def finish(i: int, completions: list[Completion]) -> None:
        on_records(judge(questions[i].example, completions, options))

    sampler.generate(
        [question.prompt for question in questions],
        params,
        progress=True,
        on_completion=when_all_are_there(options.runs, finish),
        streams=[zlib.crc32(question.example.id.encode()) for question in questions],
    )


# --- Judge ---


def judge(example: Example, completions: list[Completion], options: EvaluateOptions) -> list[dict]:
    """Returns a record for each run: what was asked and answered, and whether that is right."""
    records = []
    for run, completion in enumerate(completions):
        text = completion.text
        reward = accuracy_reward(text, example.truths, example.options, precision=example.precision)
        records.append(
            {
                "id": example.id,
                "run": run,
                "domain": example.domain,
                "meta": example.meta,
                "masked": options.mask_images and bool(example.images),
                "response": text,
                "prompt": format_prompt(example, options.prompt_style),
                "extracted": extract_answer(text),
                "vote": vote(text, example),
                "answer": example.answer,
                "correct": reward == 1.0,
                "finish_reason": completion.finish_reason,
                "forced": any(completion.forced),
                "tokens": len(completion.ids),
                "words": len(text.split()),
            }
        )
    return records


def vote(response: str, example: Example) -> str | None:
    """Returns what a response counts for in a majority; None if it has no answer.

    That is its answer or, where there are options, the letter of the one that it names: "B: No" is
    a vote for B.
    """
    if not example.options:
        return extract_answer(response)
    for letter in example.options:
        if accuracy_reward(response, letter, example.options) == 1.0:
            return letter
    return None


def same_vote(one: dict, other: dict) -> bool:
    """Do the records of two runs vote for the same? All right answers are the same."""
    if one["vote"] is None or other["vote"] is None or one["correct"] != other["correct"]:
        return False
    return one["correct"] or is_equivalent(one["vote"], other["vote"])


def majority(records: list[dict]) -> bool:
    """Is the answer that most of a question's runs gave right? Unparsed answers do not vote."""
    right = False
    most_votes = 0
    for record in records:
        votes = sum(same_vote(record, other) for other in records)
        # Of answers with equally many votes, the one that came first wins.
        if votes > most_votes:
            right = record["correct"]
            most_votes = votes
    return right


# --- Figures ---


def standard_error(values: list[float]) -> float:
    """Returns the standard error of the mean of values from independent questions."""
    if len(values) < 2:
        return 0.0
    return stdev(values) / len(values) ** 0.5


def accuracy(questions: list[list[dict]]) -> dict:
    """Returns n and every measure with its standard error, from the records of each question.

    The errors are those of means over questions: the runs of one question are not independent.
    """
    runs = len(questions[0])
    means = [fmean(record["correct"] for record in records) for records in questions]
    figures = {"n": len(questions), "accuracy": fmean(means), "stderr": standard_error(means)}
    if runs == 1:
        return figures
    measures = {
        f"avg@{runs}": means,
        f"maj@{runs}": [float(majority(records)) for records in questions],
        f"pass@{runs}": [float(mean > 0) for mean in means],
    }
    for name, values in measures.items():
        figures[name] = fmean(values)
        figures[f"{name}_stderr"] = standard_error(values)
    return figures


def summarise(questions: list[list[dict]]) -> dict:
    """Returns the figures of one file, from the records of each question."""
    records = [record for group in questions for record in group]
    domains = defaultdict(list)
    for group in questions:
        domains[str(group[0]["domain"])].append(group)
    return {
        **accuracy(questions),
        "unparsed": fmean(record["extracted"] is None for record in records),
        "mean_words": fmean(record["words"] for record in records),
        "mean_tokens": fmean(record["tokens"] for record in records),
        "forced": fmean(record["forced"] for record in records),
        "by_domain": {domain: accuracy(domains[domain]) for domain in sorted(domains)},
    }


# --- The table ---


def table_line(name: str, figures: dict, measures: list[str]) -> str:
    """Returns the left part of a line: the name, n, and each measure +- its standard error in %."""
    line = f"{name:<28}{figures['n']:>6}"
    for measure in measures:
        error = figures.get(f"{measure}_stderr", figures["stderr"])
        cell = f"{100 * figures[measure]:.1f} +- {100 * error:.1f}"
        line += f"{cell:>14}"
    return line


def print_table(results: dict[str, dict]) -> None:
    """Prints a line for each file, and below it one for each domain if there are several."""
    first = next(iter(results.values()))
    measures = ["accuracy", *(name for name in first if "@" in name and "stderr" not in name)]
    head = f"{'file':<28}{'n':>6}" + "".join(f"{measure:>14}" for measure in measures)
    print(head + f"{'unparsed':>10}{'forced':>8}{'words':>8}{'tokens':>8}{'dropped':>9}")
    names = short_names(results)
    for path, figures in results.items():
        unparsed, forced = 100 * figures["unparsed"], 100 * figures["forced"]
        lengths = f"{figures['mean_words']:>8.1f}{figures['mean_tokens']:>8.1f}"
        line = table_line(names[path].removesuffix(Path(path).suffix), figures, measures)
        print(line + f"{unparsed:>10.1f}{forced:>8.1f}{lengths}{figures['dropped']:>9}")
        if len(figures["by_domain"]) > 1:
            for domain, part in figures["by_domain"].items():
                print(table_line(f"  {domain}", part, measures))


# --- The command ---


def check_options(options: EvaluateOptions) -> None:
    """Raises InputError for options that do not go together."""
    if options.runs > 1 and options.temperature < 0.01:
        needed = "a --temperature of 0.01 or more"
        raise InputError(f"--runs above 1 needs {needed}: greedy runs are the same")
    if len({follow_links(path) for path in options.data}) < len(options.data):
        raise InputError("--data names a file twice")
    for path in options.data:  # said before a model is loaded
        if not Path(path).exists():
            raise InputError(f"{path}: cannot be read (No such file or directory)")
        if options.out and out_file(options.out) == follow_links(path):
            raise InputError(f"--out {options.out} is one of the question files")
    if options.resume and not options.out:
        raise InputError("--resume needs the --out to go on with")
    limit = options.max_new_tokens
    if options.think_budget is not None and options.think_budget >= limit:
        budget = f"--think-budget {options.think_budget}"
        raise InputError(f"{budget} is never reached: --max-new-tokens is {limit}")


def main(argv: list[str]) -> None:
    """Evaluates file by file; after Ctrl-C, what has been answered counts."""
    options = parse_options(EvaluateOptions, argv)
    check_options(options)
    # 1. Read and check every file before anything is sampled.
    sampler, images = load_sampler(
        options.model, options.device, options.dtype, max_batch=options.max_batch
    )
    files = {path: load_questions(sampler, images, path, options) for path in options.data}
    # 2. Records go to --out question by question, so that --resume finds what has been answered.
    inputs = [*options.data, *model_files(Path(options.model))]
    recorded = recorded_options(options, sampler.dtype)
    journal = RecordFile(options.out, recorded, inputs, keys=("file", "id"), size=options.runs)
    results = {}
    interrupted = False
    for path, loaded in files.items():
        # 3. Ask what has not been answered; Ctrl-C ends that.
        keys = [(path, question.example.id) for question in loaded.items]
        left = [question for key, question in zip(keys, loaded.items) if key not in journal.groups]

        def keep(records: list[dict]) -> None:
            journal.append([{"file": path, **record} for record in records])

        try:
            with memory_phase("sampling", "a lower --max-batch", "a lower --max-new-tokens"):
                evaluate(sampler, left, options, keep)
        except KeyboardInterrupt:
            interrupted = True
        # 4. Sum up what has been answered, after Ctrl-C too.
        answered = [journal.groups[key] for key in keys if key in journal.groups]
        if answered:
            counts = {"dropped": loaded.dropped, "bad": loaded.bad}
            results[path] = {**summarise(answered), **counts}
            if options.json:
                print(json.dumps({"file": path, **results[path]}), flush=True)
        if interrupted:
            break
    if results and not options.json:
        print_table(results)
    if interrupted:
        raise KeyboardInterrupt
    # 5. Write the records once more, in the order of the questions.
    journal.finish(
        (path, question.example.id) for path, loaded in files.items() for question in loaded.items
    )


if __name__ == "__main__":
    run_command(main)
