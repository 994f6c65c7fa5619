"""The paper's main result on the micro world: text-only SFT and GRPO, evaluated on text and images of two domains.

    python micro/reproduce.py [--seed 0] [--out runs/reproduce]          # or: make reproduce SEED=0

Runs the very commands that a user would (they are printed), then evaluates base, SFT and SFT + GRPO greedily on the four
test sets and on transcription, prints a table like the paper's table 4, and writes it to table.json.
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
from training import MICRO_BASE, MICRO_DATA  # noqa: E402

COLUMNS = {"text": "test_text", "image": "test_image", "text_other": "test_text_other", "image_other": "test_image_other",
           "transcription": "test_transcription"}
TITLES = {"text": "text", "image": "image (X-modality)", "text_other": "other domain (X-domain)",
          "image_other": "image of other domain", "transcription": "transcription"}


def run(script: str, *arguments: str) -> None:
    """Runs one of the commands, and shows it."""
    print(f"$ python {script} {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def measure(model_folder: Path) -> dict[str, dict]:
    """A row of the table: for each column the summary, and the accuracy by depth."""
    sampler, images = load_sampler(str(model_folder), "cpu", "auto")
    row = {}
    for column, name in COLUMNS.items():
        records = evaluate(sampler, images, load_examples(str(MICRO_DATA / f"{name}.jsonl"), None), EvaluateOptions())
        depths = defaultdict(list)
        for record in records:
            depths[record["meta"]["depth"]].append(record["correct"])
        row[column] = {**summarise(records), "by_depth": {k: fmean(v) for k, v in sorted(depths.items())}}
    return row


def print_table(table: dict[str, dict]) -> None:
    """Accuracy in percent +- standard error (mean tokens per response), then accuracy by question depth."""
    print(f"\n{'':<12}" + "".join(f"{TITLES[c]:>26}" for c in COLUMNS))
    for name, row in table.items():
        cells = (f"{100 * s['accuracy']:.1f} +- {100 * s['stderr']:.1f} ({s['mean_tokens']:.0f})" for s in row.values())
        print(f"{name:<12}" + "".join(f"{cell:>26}" for cell in cells))
    print("accuracy in % +- standard error (response length in tokens); greedy decoding\n\nby depth k, in %")
    for column in COLUMNS:
        depths = list(next(iter(table.values()))[column]["by_depth"])
        print(f"{TITLES[column]:<26}" + "".join(f"{f'k={k}':>8}" for k in depths))
        for name, row in table.items():
            print(f"  {name:<24}" + "".join(f"{100 * row[column]['by_depth'][k]:>8.1f}" for k in depths))


def main() -> None:
    """SFT, GRPO and evaluation, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    arguments = parser.parse_args()
    started, out, seed = time.perf_counter(), arguments.out, str(arguments.seed)
    run("sft.py", "--seed", seed, "--out", str(out / "sft"), "--overwrite")
    run("grpo.py", "--seed", seed, "--model", str(out / "sft/model"), "--out", str(out / "grpo"), "--overwrite")
    models = {"base": MICRO_BASE, "sft": out / "sft/model", "sft+grpo": out / "grpo/model"}
    table = {name: measure(folder) for name, folder in models.items()}
    print_table(table)
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"\n{out / 'table.json'} written; {(time.perf_counter() - started) / 60:.1f} minutes, seed {seed}")


if __name__ == "__main__":
    main()
