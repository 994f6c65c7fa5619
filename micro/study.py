"""The effect over several seeds: three bases from nothing, both stages from each, and controls.

    python micro/study.py --seeds 0 1 2 3 4   # half an hour a seed on 2 busy cores; can be resumed
    python micro/study.py --summary           # what micro/results says, without running anything

A seed decides everything but the data: initial weights, pre-training questions and images, order
and samples of SFT and GRPO. All seeds share the training and test questions of micro/data. The
tables of seed S go to micro/results/seed-S.json.
"""

import argparse
import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from hub.options import ROOT
from micro.reproduce import COLUMNS, LIMIT, claims, pooled
from training.journal import git_commit

BASES = {
    "none": "no complete chain",
    "text": "complete chains on text only",
    "both": "complete chains on text and images",
}
RESULTS = ROOT / "micro" / "results"


def run(script: str, log: Path, *arguments: str) -> None:
    """Runs a command of the micro world, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"$ python micro/{script} {' '.join(arguments)}    # > {log}", flush=True)
    words = [sys.executable, str(ROOT / "micro" / script), *arguments]
    with open(log, "w") as file:
        subprocess.run(words, check=True, stdout=file, stderr=file)


def run_seed(seed: int, out: Path, processes: int) -> None:
    """Runs what is missing of a seed, and writes its file of results."""
    folder = out / str(seed)
    bases = folder / "bases"
    commit = git_commit()  # of the code that runs, not of what is committed meanwhile
    # 1. The three bases.
    if not all((bases / name / "model.safetensors").exists() for name in BASES):
        options = f"--seed {seed} --chains {' '.join(BASES)} --out"
        run("pretrain.py", folder / "pretrain.log", *options.split(), str(bases))

    # 2. SFT and GRPO from each of them; the controls from the one that we ship.
    def post_train(name: str) -> None:
        if not (folder / name / "table.json").exists():
            options = ["--seed", str(seed), "--base", str(bases / name), "--out"]
            controls = ["--controls"] if name == "none" else []
            log = folder / f"{name}.log"
            run("reproduce.py", log, *options, str(folder / name), *controls)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(post_train, BASES))
    # 3. The results.
    tables = {name: json.loads((folder / name / "table.json").read_text()) for name in BASES}
    results = {
        "seed": seed,
        "commit": commit,
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "tables": tables,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"seed-{seed}.json").write_text(json.dumps(results, indent=1) + "\n")


def load_results(folder: Path = RESULTS) -> list[dict]:
    """Returns the results of all seeds, in order."""
    results = [json.loads(path.read_text()) for path in folder.glob("seed-*.json")]
    return sorted(results, key=lambda result: result["seed"])


def spread(values: list[float]) -> str:
    """Returns the mean +- the standard deviation over seeds, and the value of every seed."""
    deviation = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{deviation}  ({' '.join(f'{value:.1f}' for value in values)})"


def print_summary(results: list[dict]) -> None:
    """Prints for each base the accuracy above its reach, the claims' figures, accuracy by depth."""
    print(f"seeds {' '.join(str(result['seed']) for result in results)}")
    for name, title in BASES.items():
        tables = [result["tables"][name] for result in results]
        print(f"\nBase whose own training holds {title}: ", end="")
        print(f"accuracy in %, k > {LIMIT}, mean +- sd over seeds (each seed)")
        for row in tables[0]:
            for column in tables[0][row]:
                values = [100 * pooled(table[row], column) for table in tables]
                print(f"  {row:<26}{column:<9}{spread(values)}")
        print("  in percentage points")
        figures = [claims(table) for table in tables]
        for claim in figures[0]:
            print(f"  {claim:<38}{spread([figure[claim] for figure in figures])}")
        print("  by depth, mean over seeds")
        for column in COLUMNS:
            for row in tables[0]:
                if column in tables[0][row]:
                    by_depth = [table[row][column]["by_depth"] for table in tables]
                    means = {k: 100 * fmean(one[k] for one in by_depth) for k in by_depth[0]}
                    cells = "   ".join(f"{k}: {mean:5.1f}" for k, mean in means.items())
                    print(f"  {column:<9}{row:<26}{cells}")


def main() -> None:
    """Runs what is missing, seed by seed, and prints the summary of all results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--processes", type=int, default=2, help="runs at the same time, of one thread each"
    )
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        for seed in args.seeds:
            run_seed(seed, args.out, args.processes)
    print_summary(load_results())


if __name__ == "__main__":
    main()
