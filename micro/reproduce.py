"""The paper's main result on the micro world: text-only SFT and GRPO, evaluated on text and images of three domains.

    python micro/reproduce.py [--seed 0] [--out runs/reproduce]          # or: make reproduce SEED=0
    python micro/reproduce.py --base runs/bases/text --controls          # from another base; with the control runs

Runs the very commands that a user would (they are printed), evaluates base, SFT and SFT + GRPO greedily on the test
sets and on transcription, prints a table like the paper's table 4 and what it says of the claims, and writes it to
table.json.
"""
import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import EvaluateOptions, evaluate, load_examples, summarise  # noqa: E402
from sample import load_sampler  # noqa: E402
from hub.options import MICRO_BASE, MICRO_DATA  # noqa: E402

COLUMNS = {"A text": "test_text", "A image": "test_image", "L text": "test_text_other", "L image": "test_image_other",
           "G text": "test_text_graph", "G image": "test_image_graph", "reading": "test_transcription"}
IMAGE_COLUMNS = [column for column in COLUMNS if column.endswith("image")]
LIMIT, ROOM = 2, (5, 6)  # the depth that the base reaches; the depths that SFT hardly saw, where it leaves room for RL
CHANCE = {"A": 1 / 10, "L": 1 / 10, "G": 1 / 6}  # of a blind guess, by domain
CONTROLS = ("answer-only SFT", "GRPO alone", "long SFT", "SFT + GRPO, image masked")
BOUNDS = {f"gain on A image, k > {LIMIT}": 40, "worst change at any depth, A image": -3,  # what is claimed, in points
          "GRPO over SFT on A image, k = 5, 6": 5}

Row = dict[str, dict]  # of the table: for each column the figures
Table = dict[str, Row]


def run(script: str, **options) -> None:
    """Runs one of the commands, and shows it."""
    arguments = [word for name, value in options.items()
                 for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))]
    print(f"$ python {script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def steps_done(folder: Path) -> int:
    """Optimiser steps of a finished run."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def train(base: Path, out: Path, seed: int) -> dict[str, Path]:
    """The two stages. Returns the model folders of base, SFT and SFT + GRPO."""
    run("sft.py", model=base, out=out / "sft", seed=seed, overwrite=True)
    run("grpo.py", model=out / "sft/model", out=out / "grpo", seed=seed, overwrite=True)
    return {"base": base, "SFT": out / "sft/model", "SFT + GRPO": out / "grpo/model"}


def train_controls(base: Path, out: Path, seed: int) -> dict[str, Path]:
    """What should not have the effect, or shows whose it is: no thinking, RL without SFT, SFT for the steps of both."""
    run("sft.py", model=base, out=out / "answer_only", seed=seed, answer_only=True, overwrite=True)
    run("grpo.py", model=base, out=out / "grpo_alone", seed=seed, overwrite=True)
    steps = steps_done(out / "sft") + steps_done(out / "grpo")
    run("sft.py", model=base, out=out / "long_sft", seed=seed, max_steps=steps, epochs=steps, overwrite=True)
    folders = ("answer_only/model", "grpo_alone/model", "long_sft/model", "grpo/model")
    return dict(zip(CONTROLS, (out / folder for folder in folders)))


def measure(model_folder: Path, *, masked: bool = False) -> Row:
    """A row of the table; masked: images are taken from the questions that have one."""
    sampler, images = load_sampler(str(model_folder), "cpu", "auto")
    row = {}
    for column in IMAGE_COLUMNS if masked else COLUMNS:
        examples = load_examples(str(MICRO_DATA / f"{COLUMNS[column]}.jsonl"), None)
        records = evaluate(sampler, images, examples, EvaluateOptions(mask_images=masked))
        summary = summarise(records)
        depths = defaultdict(list)
        for record in records:
            depths[record["meta"]["depth"]].append(record["correct"])
        row[column] = {name: summary[name] for name in ("n", "accuracy", "stderr", "mean_tokens")}
        row[column]["by_depth"] = {str(k): fmean(v) for k, v in sorted(depths.items())}
    return row


def pooled(row: Row, column: str, depths=None, at_least: float = 0.0) -> float:
    """Accuracy over the depths above the base's reach, or over those given, where a depth counts for `at_least` so
    much. All depths have as many questions."""
    by_depth = row[column]["by_depth"]
    return fmean(max(at_least, by_depth[k]) for k in by_depth
                 if (int(k) > LIMIT if depths is None else int(k) in depths))


def claims(table: Table) -> dict[str, float]:
    """The figures that the claims are about, in percentage points. In a gain no depth counts for less than chance: the
    base is below it at k = 3, where its answer, the state after two steps, is never right."""
    base, sft, final = (table[name] for name in ("base", "SFT", "SFT + GRPO"))
    gain = {}
    for column in [column for column in COLUMNS if column != "reading"]:
        before, after = (pooled(row, column, at_least=CHANCE[column[0]]) for row in (base, final))
        gain[column] = after - before
    by_depth = [final["A image"]["by_depth"][k] - base["A image"]["by_depth"][k] for k in base["A image"]["by_depth"]]
    figures = {f"gain on {column}, k > {LIMIT}": value for column, value in gain.items()}
    figures |= {"worst change at any depth, A image": min(by_depth),
                "GRPO over SFT on A text, k = 5, 6": pooled(final, "A text", ROOM) - pooled(sft, "A text", ROOM),
                "GRPO over SFT on A image, k = 5, 6": pooled(final, "A image", ROOM) - pooled(sft, "A image", ROOM),
                "A image gain in % of A text gain": gain["A image"] / gain["A text"]}
    return {name: 100 * value for name, value in figures.items()}


def print_table(table: Table) -> None:
    """Accuracy in percent +- standard error (mean tokens per response), then accuracy by question depth."""
    print(f"\n{'':<26}" + "".join(f"{column:>22}" for column in COLUMNS))
    for name, row in table.items():
        cells = {c: f"{100 * s['accuracy']:.1f} +- {100 * s['stderr']:.1f} ({s['mean_tokens']:.0f})"
                 for c, s in row.items()}
        print(f"{name:<26}" + "".join(f"{cells.get(column, '-'):>22}" for column in COLUMNS))
    print("accuracy in % +- standard error (response length in tokens); greedy decoding\n\nby depth k, in %")
    for column in COLUMNS:
        depths = list(next(iter(table.values()))[column]["by_depth"])
        print(f"{column:<28}" + "".join(f"{f'k={k}':>8}" for k in depths))
        for name, row in table.items():
            if column in row:
                print(f"  {name:<26}" + "".join(f"{100 * row[column]['by_depth'][k]:>8.1f}" for k in depths))


def print_claims(figures: dict[str, float], bounds: dict[str, float] = BOUNDS) -> None:
    """The figures, and whether those with a bound are within it."""
    print("\nin percentage points")
    for name, value in figures.items():
        bound = bounds.get(name)
        verdict = "holds" if bound is not None and value >= bound else "DOES NOT HOLD"
        print(f"  {name:<40}{value:>8.1f}" + ("" if bound is None else f"   claimed: at least {bound}; {verdict}"))


def main() -> None:
    """SFT, GRPO and evaluation, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, default=MICRO_BASE, help="model folder to start from")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--controls", action="store_true", help="also the control runs: about twice the time")
    arguments = parser.parse_args()
    started, out = time.perf_counter(), arguments.out
    models = train(arguments.base, out, arguments.seed)
    if arguments.controls:
        models |= train_controls(arguments.base, out, arguments.seed)
    table = {name: measure(folder, masked="masked" in name) for name, folder in models.items()}
    print_table(table)
    print_claims(claims(table))
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"\n{out / 'table.json'} written; {(time.perf_counter() - started) / 60:.1f} minutes, seed {arguments.seed}")


if __name__ == "__main__":
    main()
