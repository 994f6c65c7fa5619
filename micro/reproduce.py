"""The paper's main result on the micro world: text-only SFT and GRPO, then text and images.

    python micro/reproduce.py [--seed 0] [--out runs/reproduce]     # or: make reproduce SEED=0
    python micro/reproduce.py --base runs/bases/text --controls     # another base; control runs too

Runs the very commands that a user would (they are printed), evaluates base, SFT and SFT + GRPO
greedily on the test sets of three domains and on transcription, prints a table like the paper's
table 4 and what it says of the claims, and writes it to table.json.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluate import EvaluateOptions, evaluate, load_questions, summarise
from hub.options import MICRO_BASE, MICRO_DATA, ROOT
from sample import load_sampler

COLUMNS = {
    "A text": "test_text",
    "A image": "test_image",
    "L text": "test_text_other",
    "L image": "test_image_other",
    "G text": "test_text_graph",
    "G image": "test_image_graph",
    "reading": "test_transcription",
}
IMAGE_COLUMNS = [column for column in COLUMNS if column.endswith("image")]
LIMIT = 2  # the depth that the base reaches
ROOM = (5, 6)  # the depths that SFT hardly saw, where it leaves room for RL
CHANCE = {"A": 1 / 10, "L": 1 / 10, "G": 1 / 6}  # accuracy of a blind guess, by domain
CONTROLS = ("answer-only SFT", "GRPO alone", "long SFT", "SFT + GRPO, image masked")
BOUNDS = {  # what is claimed, in percentage points: at least so much
    f"gain on A image, k > {LIMIT}": 40,
    "worst change at any depth, A image": -3,
    "GRPO over SFT on A image, k = 5, 6": 5,
}

Row = dict[str, dict]  # a model's figures in each column
Table = dict[str, Row]


def run(script: str, **options) -> None:
    """Runs one of the commands, and shows it. An option of value True is a flag."""
    arguments = []
    for name, value in options.items():
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments.append(str(value))
    print(f"$ python {script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def steps_done(folder: Path) -> int:
    """Returns the number of optimiser steps of a finished run."""
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["step"]


def train(base: Path, out: Path, seed: int) -> dict[str, Path]:
    """Runs the two stages. Returns the model folders of base, SFT and SFT + GRPO."""
    run("sft.py", model=base, out=out / "sft", seed=seed, overwrite=True)
    run("grpo.py", model=out / "sft/model", out=out / "grpo", seed=seed, overwrite=True)
    return {"base": base, "SFT": out / "sft/model", "SFT + GRPO": out / "grpo/model"}


def train_controls(base: Path, out: Path, seed: int) -> dict[str, Path]:
    """Runs what should not have the effect, or shows whose it is; returns the model folders.

    These are SFT without thoughts, RL without SFT, and SFT for as many steps as both stages.
    """
    run("sft.py", model=base, out=out / "answer_only", seed=seed, answer_only=True, overwrite=True)
    run("grpo.py", model=base, out=out / "grpo_alone", seed=seed, overwrite=True)
    steps = steps_done(out / "sft") + steps_done(out / "grpo")
    run(
        "sft.py",
        model=base,
        out=out / "long_sft",
        seed=seed,
        max_steps=steps,
        epochs=steps,
        overwrite=True,
    )
    folders = ("answer_only/model", "grpo_alone/model", "long_sft/model", "grpo/model")
    return dict(zip(CONTROLS, (out / folder for folder in folders)))


def measure(model_folder: Path, *, masked: bool = False, dtype: str = "auto") -> Row:
    """Returns a row of the table. `masked` takes the images from the questions that have one;
    `dtype` is the forward pass's, auto that of the folder's files."""
    options = EvaluateOptions(mask_images=masked)
    sampler, images = load_sampler(str(model_folder), "cpu", dtype)
    row = {}
    for column in IMAGE_COLUMNS if masked else COLUMNS:
        path = str(MICRO_DATA / f"{COLUMNS[column]}.jsonl")
        questions = load_questions(sampler, images, path, options).items
        answers: list[list[dict]] = []
        evaluate(sampler, questions, options, answers.append)
        summary = summarise(answers)
        depths = defaultdict(list)
        for (record,) in answers:  # decoding is greedy: one run
            depths[record["meta"]["depth"]].append(record["correct"])
        row[column] = {name: summary[name] for name in ("n", "accuracy", "stderr", "mean_tokens")}
        row[column]["by_depth"] = {str(k): fmean(v) for k, v in sorted(depths.items())}
    return row


def pooled(row: Row, column: str, depths=None, at_least: float = 0.0) -> float:
    """Returns the accuracy over the depths above the base's reach, or over those given.

    No depth counts for less than `at_least`. All depths have as many questions.
    """
    by_depth = row[column]["by_depth"]
    if depths is None:
        depths = [int(k) for k in by_depth if int(k) > LIMIT]
    return fmean(max(at_least, by_depth[k]) for k in by_depth if int(k) in depths)


def claims(table: Table) -> dict[str, float]:
    """Returns the figures that the claims are about, in percentage points.

    In a gain no depth counts for less than chance: the base is below it at k = 3, where its answer,
    the state after two steps, is never right.
    """
    base, sft, final = table["base"], table["SFT"], table["SFT + GRPO"]
    gains = {}
    for column in COLUMNS:
        if column != "reading":
            chance = CHANCE[column[0]]
            before = pooled(base, column, at_least=chance)
            gains[column] = pooled(final, column, at_least=chance) - before
    figures = {f"gain on {column}, k > {LIMIT}": gain for column, gain in gains.items()}
    before, after = base["A image"]["by_depth"], final["A image"]["by_depth"]
    figures["worst change at any depth, A image"] = min(after[k] - before[k] for k in before)
    for column in ("A text", "A image"):
        gain = pooled(final, column, ROOM) - pooled(sft, column, ROOM)
        figures[f"GRPO over SFT on {column}, k = 5, 6"] = gain
    figures["A image gain in % of A text gain"] = gains["A image"] / gains["A text"]
    return {name: 100 * value for name, value in figures.items()}


def percent(figures: dict) -> str:
    """Returns an accuracy and its standard error in %."""
    return f"{100 * figures['accuracy']:.1f} +- {100 * figures['stderr']:.1f}"


def print_table(table: Table) -> None:
    """Prints accuracy +- standard error (mean tokens per response), then accuracy by depth."""
    print(f"\n{'':<26}" + "".join(f"{column:>22}" for column in COLUMNS))
    for name, row in table.items():
        line = f"{name:<26}"
        for column in COLUMNS:
            cell = "-"
            if column in row:
                cell = f"{percent(row[column])} ({row[column]['mean_tokens']:.0f})"
            line += f"{cell:>22}"
        print(line)
    print("accuracy in % +- standard error (response length in tokens); greedy decoding")
    print("\nby depth k, in %")
    first = next(iter(table.values()))
    for column in COLUMNS:
        print(f"{column:<28}" + "".join(f"{f'k={k}':>8}" for k in first[column]["by_depth"]))
        for name, row in table.items():
            if column in row:
                by_depth = row[column]["by_depth"].values()
                print(f"  {name:<26}" + "".join(f"{100 * value:>8.1f}" for value in by_depth))


def print_claims(figures: dict[str, float], bounds: dict[str, float] = BOUNDS) -> None:
    """Prints the figures, and whether those with a bound are within it."""
    print("\nin percentage points")
    for name, value in figures.items():
        line = f"  {name:<40}{value:>8.1f}"
        if name in bounds:
            verdict = "holds" if value >= bounds[name] else "DOES NOT HOLD"
            line += f"   claimed: at least {bounds[name]}; {verdict}"
        print(line)


def write_table(table: Table, out: Path, started: float, seed: int) -> None:
    """Writes OUT/table.json, and says how long all of it took."""
    path = out / "table.json"
    path.write_text(json.dumps(table, indent=1) + "\n")
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{path} written; {minutes:.1f} minutes, seed {seed}")


def main() -> None:
    """Runs SFT, GRPO and the evaluation, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, default=MICRO_BASE, help="model folder to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument(
        "--controls", action="store_true", help="also the control runs: about twice the time"
    )
    arguments = parser.parse_args()
    started = time.perf_counter()
    models = train(arguments.base, arguments.out, arguments.seed)
    if arguments.controls:
        models |= train_controls(arguments.base, arguments.out, arguments.seed)
    table = {name: measure(folder, masked="masked" in name) for name, folder in models.items()}
    print_table(table)
    print_claims(claims(table))
    write_table(table, arguments.out, started, arguments.seed)


if __name__ == "__main__":
    main()
