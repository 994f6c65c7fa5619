"""The compact optimiser beside AdamW in float32: the micro recipe under both, over some seeds.

    python micro/compact.py --seeds 0 1 2      # half an hour a seed on one core; can be resumed
    python micro/compact.py --summary          # the tables again, without running anything

Three ways to train, told apart by where bfloat16 comes in:

    float32              nowhere: AdamW on float32 weights
    compact, in float32  in the weights, gradients and moments that CompactAdamW keeps; but forward,
                         backward and sampling compute with these weights in float32
    compact              everywhere, as on a GPU: sft.py and grpo.py with --dtype bfloat16 (slow on
                         a processor without bfloat16 instructions)

All models are then evaluated greedily in float32, 500 questions a cell, and the last also in
bfloat16.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import grpo
import sft
from hub.options import MICRO_BASE
from micro.reproduce import Table, measure
from training.compact import CompactAdamW
from training.journal import read_records
from training.optimizer import make_optimizer, trained_weights
from training.options import TrainOptions

COLUMNS = ("A text", "A image", "L text", "L image", "reading")
STAGES = {"SFT": "sft", "SFT + GRPO": "grpo"}
# The way to train -> the name of its folder, --dtype.
WAYS = {
    "float32": ("float32", "float32"),
    "compact, in float32": ("compact-in-float32", "float32"),
    "compact": ("compact", "bfloat16"),
}
SPANS = {  # of steps, first and last included
    "SFT": ("loss", (1, 10), (11, 20), (41, 80)),
    "SFT + GRPO": ("reward", (1, 20), (21, 60), (161, 200)),
}


class InFloat32(CompactAdamW):
    """CompactAdamW for a float32 model: it holds bfloat16 weights of its own, and the model is
    shown their values. Such a run keeps no optimiser state in its checkpoint."""

    def __init__(self, model: nn.Module, options: TrainOptions):
        self.shown = list(trained_weights(model).values())
        super().__init__(
            [nn.Parameter(weight.detach().to(torch.bfloat16)) for weight in self.shown],
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            seed=options.seed,
        )
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        for shown, (_, weight, _) in zip(self.shown, self.weights()):
            shown.copy_(weight)

    def clip(self, max_norm: float) -> Tensor:
        """Takes the model's gradients, in bfloat16. Returns their norm."""
        for shown, (_, weight, _) in zip(self.shown, self.weights()):
            weight.grad = None if shown.grad is None else shown.grad.to(torch.bfloat16)
        return super().clip(max_norm)

    def step(self) -> None:
        super().step()
        self.show()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for shown in self.shown:
            shown.grad = None


def train(stage: ModuleType, way: str, start: Path, out: Path, seed: int) -> Path:
    """Runs sft.py or grpo.py. Returns the folder of the model that it makes."""
    stage.make_optimizer = InFloat32 if way == "compact, in float32" else make_optimizer
    arguments = f"--device cpu --dtype {WAYS[way][1]} --seed {seed} --overwrite --save-every 0"
    stage.main(["--model", str(start), "--out", str(out), *arguments.split()])
    return out / "model"


def run_seed(seed: int, out: Path) -> None:
    """Runs both stages in each way, and writes OUT/table.json."""
    table: Table = {}
    for way, (folder, _) in WAYS.items():
        model = MICRO_BASE
        for stage, module in {"SFT": sft, "SFT + GRPO": grpo}.items():
            model = train(module, way, model, out / folder / STAGES[stage], seed)
            table[f"{stage}, {way}"] = measure(model, dtype="float32")
            if way == "compact":
                table[f"{stage}, {way}, run in bfloat16"] = measure(model, dtype="bfloat16")
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")


# --- The tables -----------------------------------------------------------------------------------


def curve(metrics: Path, key: str, spans: list[tuple[int, int]]) -> list[float]:
    """Returns the means of a metric over spans of steps."""
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
    """Prints the tables of docs/results.md: accuracy at the end, and the curves until there."""
    folders = [out / str(seed) for seed in seeds]
    tables = [json.loads((folder / "table.json").read_text()) for folder in folders]

    print(f"\naccuracy in %, mean +- standard error over {len(seeds)} seeds\n")
    print_header("", *COLUMNS)
    percent: dict[str, list[list[float]]] = {}
    for name in tables[0]:
        percent[name] = [[100 * table[name][c]["accuracy"] for table in tables] for c in COLUMNS]
        print_line(name, *(cell(values, 1) for values in percent[name]))
    # All ways of a seed see the same batches, so differences are taken seed by seed.
    for stage in STAGES:
        for way in list(WAYS)[1:]:
            pairs = zip(percent[f"{stage}, {way}"], percent[f"{stage}, float32"])
            differences = [[a - b for a, b in zip(*pair)] for pair in pairs]
            name = f"{stage}: {way} - float32"
            print_line(name, *(cell(values, 1) for values in differences))

    for stage, (key, *spans) in SPANS.items():
        print(f"\n{key} of {stage}\n")
        print_header("", *(f"steps {first} to {last}" for first, last in spans))
        for way, (name, _) in WAYS.items():
            path = Path(name) / STAGES[stage] / "metrics.jsonl"
            curves = [curve(folder / path, key, spans) for folder in folders]
            print_line(way, *(cell(list(values), 4) for values in zip(*curves)))


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
