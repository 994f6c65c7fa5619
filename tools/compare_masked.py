r"""Is the image needed? Two models on the questions that neither solves without it (table 6).

    python evaluate.py --model A --data mmmu.tsv --mask-images --runs 3 --temperature 0.3 \
        --out A.masked.jsonl                                            # the same for model B
    python evaluate.py --model A --data mmmu.tsv --out A.jsonl          # the same for model B
    python tools/compare_masked.py A.masked.jsonl B.masked.jsonl --on A.jsonl B.jsonl \
        --out rest.jsonl

A question is text-solvable if one of the two models answers it rightly in every run although its
image is masked. This command says how many questions are; --out gets the names of the others, the
rest. With --on, the same two models' answers to the questions with their images, it compares the
models on all image questions and on the rest.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import accuracy, standard_error
from hub.errors import InputError
from hub.options import option, parse_options, run_command
from training.journal import json_lines, write_whole
from training.record_file import out_file, short_names

Key = tuple[str, str]  # names a question: its file (see short_names) and its id
Answers = dict[Key, list[dict]]  # the records of each question's runs


@dataclass
class CompareOptions:
    """Count the image questions that need no image, and compare two models on the others."""

    first: str = option("", "the first model's answers without images", positional=True)
    second: str = option("", "the second model's answers without images", positional=True)
    on: list[str] = option([], "both models' answers with images")
    out: str | None = option(None, "JSONL file for the names of the questions that need an image")
    json: bool = option(False, "print one JSON object")


# --- Read and check ---


def read_answers(path: str, *, masked: bool) -> Answers:
    """Returns the records in an --out file of evaluate.py: the masked questions', or the others'.

    Raises InputError where a line is no such record.
    """
    records = []
    number = 1
    try:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            record = json.loads(line)
            fields = ("file", "id", "masked", "correct", "vote")
            records.append(
                {name: record[name] for name in fields} | {"truth": record.get("answer")}
            )
    except (ValueError, TypeError, KeyError, RecursionError):
        complaint = f"{path}: line {number}: not a record of evaluate.py --out"
        raise InputError(complaint) from None
    # The two models may have read the question files from different folders, but two files of one
    # name that one model has read are two files.
    names = short_names({str(record["file"]) for record in records})
    answers = defaultdict(list)
    for record in records:
        if record["masked"] == masked:
            answers[names[str(record["file"])], record["id"]].append(record)
    return answers


def read_files(options: CompareOptions) -> tuple[list[Answers], list[Answers]]:
    """Returns both models' answers to the masked questions, and those to the shown ones, if any.

    Raises InputError where the files are not those of two models on the same questions.
    """
    if len(options.on) not in (0, 2):
        raise InputError("--on takes two files, one of each model")
    paths = [options.first, options.second, *options.on]
    masked = [read_answers(path, masked=True) for path in paths[:2]]
    shown = [read_answers(path, masked=False) for path in paths[2:]]
    # One run is not enough, since a guess is right now and then.
    for path, answers in zip(paths, masked):
        runs = {len(records) for records in answers.values()}
        if len(runs) != 1 or runs == {1}:
            raise InputError(
                f"{path}: every image question must have the same number of runs, at least 2: "
                "make it with --mask-images --runs 3 --temperature 0.3, or finish it with --resume"
            )
    # Every file must have all image questions.
    questions = masked[0].keys() | masked[1].keys()
    for path, answers in zip(paths, [*masked, *shown]):
        lacking = sorted(questions - answers.keys())
        if lacking:
            name, question = lacking[0]
            raise InputError(f"{path}: question {question} of {name} is missing")
        # Files of one name, and questions of one id, may still be others.
        for key in questions:
            if answers[key][0]["truth"] != masked[0][key][0]["truth"]:
                name, question = key
                raise InputError(
                    f"{path}: question {question} of {name} has another answer than in {paths[0]}: "
                    "they are not the same questions"
                )
    return masked, shown


# --- Compare ---


def solved_always(answers: Answers) -> set[Key]:
    """Returns the questions that were answered rightly in every run."""
    return {key for key, runs in answers.items() if all(run["correct"] for run in runs)}


def compare_models(shown: list[Answers], questions: list[Key]) -> list[dict]:
    """Returns the figures of the first model, of the second, and of the second minus the first."""
    if not shown or not questions:
        return []
    models = [[answers[key] for key in questions] for answers in shown]
    first, second = (
        [fmean(record["correct"] for record in runs) for runs in model] for model in models
    )
    # Both were asked the same: the error is that of the paired differences, which is smaller.
    gains = [after - before for before, after in zip(first, second)]
    difference = {"n": len(gains), "accuracy": fmean(gains), "stderr": standard_error(gains)}
    return [accuracy(models[0]), accuracy(models[1]), difference]


def compare(masked: list[Answers], shown: list[Answers]) -> tuple[dict, list[Key]]:
    """Returns the figures of the comparison, and the questions that neither model always solves."""
    solved = [solved_always(answers) for answers in masked]
    text_solvable = solved[0] | solved[1]
    rest = [key for key in masked[0] if key not in text_solvable]
    figures = {
        "n": len(masked[0]),
        "runs": [len(next(iter(answers.values()))) for answers in masked],
        "masked": [accuracy(list(answers.values())) for answers in masked],
        "solved": [len(keys) for keys in solved],
        "solved_by_either": len(text_solvable),
        "remaining": len(rest),
        "all": compare_models(shown, list(masked[0])),
        "rest": compare_models(shown, rest),
        "text_solvable": [{"file": name, "id": i} for name, i in sorted(text_solvable)],
    }
    return figures, rest


# --- Print ---


def percent(figures: dict) -> str:
    return f"{100 * figures['accuracy']:.1f} +- {100 * figures['stderr']:.1f}"


def print_comparison(options: CompareOptions, figures: dict) -> None:
    """Prints how many questions are text-solvable, and how good the models are on the others."""
    print(f"{figures['n']} image questions, asked without their images:\n")
    print(f"{'':<44}{'accuracy':>16}{'always right':>16}")
    for i, path in enumerate((options.first, options.second)):
        runs = figures["runs"][i]
        always = f"{figures['solved'][i]} ({runs} of {runs})"
        print(f"{path:<44}{percent(figures['masked'][i]):>16}{always:>16}")
    print(
        f"always right by one of the two, or both: {figures['solved_by_either']}; "
        f"that leaves {figures['remaining']}"
    )
    if not figures["all"]:
        return
    print(f"\n{'with their images, in %':<44}{'all':>16}{'the rest':>16}")
    for i, name in enumerate([*options.on, "difference"]):
        rest = percent(figures["rest"][i]) if figures["rest"] else "-"
        print(f"{name:<44}{percent(figures['all'][i]):>16}{rest:>16}")


def main(argv: list[str]) -> None:
    """Reads, compares, writes and prints."""
    options = parse_options(CompareOptions, argv)
    if options.out and out_file(options.out).exists():
        raise InputError(f"{options.out} is there: use another --out")
    masked, shown = read_files(options)
    figures, rest = compare(masked, shown)
    if options.out:
        names = ({"file": name, "id": question} for name, question in rest)
        write_whole(out_file(options.out), json_lines(names))
    if options.json:
        print(json.dumps(figures))
    else:
        print_comparison(options, figures)


if __name__ == "__main__":
    run_command(main)
