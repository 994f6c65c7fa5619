"""The compact optimiser beside AdamW in float32: the micro recipe under both, over some seeds.

    python micro/compact.py --seeds 0 1 2      # half an hour a seed on one core; can be resumed
    python micro/compact.py --summary          # the table again, without running anything

Nothing is simulated: with --dtype bfloat16 sft.py and grpo.py hold bfloat16 weights alone, forward,
backward and sampling compute with them, and CompactAdamW updates them. (On a processor without
bfloat16 instructions that is slow.) All models are then evaluated greedily, 500 questions a cell,
in float32; the compact ones also in bfloat16, as a GPU would run them.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub.options import MICRO_BASE
from micro.reproduce import Table, measure, run
from training.journal import read_records

COLUMNS = ("A text", "A image", "L text", "L image", "reading")
STAGES = {"SFT": "sft", "SFT + GRPO": "grpo"}
DTYPES = {"float32": "float32", "compact": "bfloat16"}  # of training, by optimiser
SPANS = {
    "SFT": ("loss", (1, 10), (11, 20), (41, 80)),
    "SFT + GRPO": ("reward", (1, 20), (21, 60), (161, 200)),
}


def run_seed(seed: int, out: Path) -> None:
    """Runs both stages under both optimisers, and writes OUT/table.json."""
    table: Table = {}
    for name, dtype in DTYPES.items():
        sft, grpo = out / name / "sft", out / name / "grpo"
        options = {"seed": seed, "dtype": dtype, "device": "cpu", "overwrite": True}
        run("sft.py", model=MICRO_BASE, out=sft, **options)
        run("grpo.py", model=sft / "model", out=grpo, **options)
        for stage, folder in STAGES.items():
            model = out / name / folder / "model"
            table[f"{stage}, {name}"] = measure(model, dtype="float32")
            if name == "compact":
                table[f"{stage}, {name}, run in bfloat16"] = measure(model, dtype="bfloat16")
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")


def curve(metrics: Path, key: str, spans: list[tuple[int, int]]) -> list[float]:
    """Returns the means of a metric over spans of steps, first and last included."""
    values = [record[key] for record, _ in read_records(metrics, ("step", key))]
    return [fmean(values[first - 1 : last]) for first, last in spans]


def cell(values: list[float], digits: int) -> str:
    """Returns the mean over seeds and its standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values):.{digits}f} +- {error:.{digits}f}"


def print_line(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def print_header(*cells: str) -> None:
    print_line(*cells)
    print_line(*["---"] * len(cells))


def summary(out: Path, seeds: list[int]) -> None:
    """Prints two tables for docs/results.md: accuracy at the end, and the curves until there."""
    folders = [out / str(seed) for seed in seeds]
    tables = [json.loads((folder / "table.json").read_text()) for folder in folders]

    print(f"\naccuracy in %, mean +- standard error over {len(seeds)} seeds\n")
    print_header("", *COLUMNS)
    percent: dict[str, list[list[float]]] = {}
    for name in tables[0]:
        percent[name] = [[100 * table[name][c]["accuracy"] for table in tables] for c in COLUMNS]
        print_line(name, *(cell(values, 1) for values in percent[name]))
    # Both optimisers of a seed see the same batches, so their difference is taken seed by seed.
    for stage in STAGES:
        pairs = zip(percent[f"{stage}, compact"], percent[f"{stage}, float32"])
        differences = [[a - b for a, b in zip(*pair)] for pair in pairs]
        print_line(f"{stage}: compact - float32", *(cell(values, 1) for values in differences))

    for stage, (key, *spans) in SPANS.items():
        print(f"\n{key} of {stage}\n")
        print_header("", *(f"steps {first} to {last}" for first, last in spans))
        for name in DTYPES:
            path = Path(name) / STAGES[stage] / "metrics.jsonl"
            curves = [curve(folder / path, key, spans) for folder in folders]
            print_line(name, *(cell(list(values), 4) for values in zip(*curves)))


def main() -> None:
    """Runs what is missing, then prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/compact"))
    parser.add_argument("--summary", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        folder = arguments.out / str(seed)
        if not arguments.summary and not (folder / "table.json").exists():
            run_seed(seed, folder)
    summary(arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
