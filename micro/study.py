"""The effect over several seeds: for each, three bases from nothing, the two stages from each of them, and controls.

    python micro/study.py --seeds 0 1 2 3 4        # half an hour a seed on 2 busy cores; goes on where it stopped
    python micro/study.py --summary                # what the results in micro/results say, without running anything

A seed decides everything but the data: initial weights, pre-training questions and images, order and samples of SFT and
GRPO. All seeds share the training and test questions of micro/data. A seed's tables go to micro/results/seed-S.json.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from micro.reproduce import COLUMNS, LIMIT, claims, pooled  # noqa: E402
from training.journal import git_commit  # noqa: E402

BASES = {"none": "no complete chain", "text": "complete chains on text only",
         "both": "complete chains on text and images"}
RESULTS = ROOT / "micro" / "results"


def run(script: str, log: Path, *arguments: str) -> None:
    """A command of the project, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"$ python micro/{script} {' '.join(arguments)}    # > {log}", flush=True)
    with open(log, "w") as file:
        subprocess.run([sys.executable, str(ROOT / "micro" / script), *arguments], check=True, stdout=file, stderr=file)


def run_seed(seed: int, out: Path, processes: int) -> None:
    """All that is missing of a seed's runs, and its file of results."""
    folder, commit = out / str(seed), git_commit()
    if not all((folder / "bases" / name / "model.safetensors").exists() for name in BASES):
        run("pretrain.py", folder / "pretrain.log", "--seed", str(seed), "--chains", *BASES,
            "--out", str(folder / "bases"))

    def post_train(name: str) -> None:
        if not (folder / name / "table.json").exists():
            run("reproduce.py", folder / f"{name}.log", "--seed", str(seed), "--base", str(folder / "bases" / name),
                "--out", str(folder / name), *(["--controls"] if name == "none" else []))

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(post_train, BASES))
    tables = {name: json.loads((folder / name / "table.json").read_text()) for name in BASES}
    about = {"seed": seed, "commit": commit, "date": str(date.today()), "torch": torch.__version__,
             "machine": platform.platform()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"seed-{seed}.json").write_text(json.dumps({**about, "tables": tables}, indent=1) + "\n")


def load_results(folder: Path = RESULTS) -> list[dict]:
    """Of all seeds, in order."""
    results = [json.loads(path.read_text()) for path in folder.glob("seed-*.json")]
    return sorted(results, key=lambda result: result["seed"])


def spread(values: list[float]) -> str:
    """Mean +- standard deviation over seeds, and every seed."""
    deviation = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{deviation}  ({' '.join(f'{value:.1f}' for value in values)})"


def print_summary(results: list[dict]) -> None:
    """Per base: accuracy above the base's reach by column, the claims' figures, and accuracy by depth."""
    print(f"seeds {' '.join(str(result['seed']) for result in results)}")
    for name, title in BASES.items():
        tables = [result["tables"][name] for result in results]
        print(f"\nBase whose own training holds {title}: accuracy in %, k > {LIMIT}, mean +- sd over seeds (each seed)")
        for row in tables[0]:
            for column in tables[0][row]:
                print(f"  {row:<26}{column:<9}{spread([100 * pooled(table[row], column) for table in tables])}")
        print("  in percentage points")
        figures = [claims(table) for table in tables]
        for claim in figures[0]:
            print(f"  {claim:<38}{spread([figure[claim] for figure in figures])}")
        print("  by depth, mean over seeds")
        for column in COLUMNS:
            for row in tables[0]:
                if column in tables[0][row]:
                    depths = tables[0][row][column]["by_depth"]
                    cells = (f"{k}: {100 * fmean(t[row][column]['by_depth'][k] for t in tables):5.1f}" for k in depths)
                    print(f"  {column:<9}{row:<26}{'   '.join(cells)}")


def main() -> None:
    """Runs what is missing, seed by seed, and prints the summary of all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--processes", type=int, default=2, help="runs at the same time, of one thread each")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if not args.summary:
        for seed in args.seeds:
            run_seed(seed, args.out, args.processes)
    print_summary(load_results())


if __name__ == "__main__":
    main()
