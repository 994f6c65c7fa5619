"""Draws the curves of training runs, one panel a metric (paper: figure 5), from metrics.jsonl.

    python tools/plot.py runs/grpo                              # -> curves.png
    python tools/plot.py runs/sft runs/other --out compare.png  # several runs in one picture

A thin line is what was measured, the thick one is smoothed. Needs matplotlib, which nothing else
here does: pip install matplotlib
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub.errors import InputError  # noqa: E402
from hub.options import option, parse_options, run_command  # noqa: E402
from training.journal import read_records  # noqa: E402

# A field of metrics.jsonl -> its panel's title. A panel is drawn where some run has the field.
PANELS = {
    "reward": "reward",
    "eval_reward": "reward in validation",
    "loss": "loss",
    "response_length": "response length, tokens",
    "clipped_responses": "share of responses cut at the length limit",
    "entropy": "entropy, nats per token",
    "kl": "KL to the starting model (0 without --kl-coef)",
    "logprob_diff": "log-prob difference of sampler and trainer, nats",
    "grad_norm": "gradient norm before clipping",
}
COLUMNS = 4

Curves = dict[str, tuple[list[int], list[float]]]  # a field -> its steps and values


@dataclass
class PlotOptions:
    """Draws the curves of training runs."""

    runs: list[str] = option([], "run folders, or metrics.jsonl files", positional=True)
    out: str = option("curves.png", "picture to write")


def read_run(run: str) -> Curves:
    """Returns the curves of a run folder or of a metrics.jsonl file, also while the run goes on.

    Raises InputError if there is no such file, or no metric in it.
    """
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    curves: Curves = {}
    for record, _ in read_records(path, ("step",)):
        for field in record.keys() & PANELS.keys():
            if record[field] is None:  # a GRPO step without advantages measures less
                continue
            steps, values = curves.setdefault(field, ([], []))
            steps.append(record["step"])
            values.append(record[field])
    if not curves:
        raise InputError(f"{path}: no metrics to draw")
    return curves


def choose_panels(runs: list[Curves]) -> list[str]:
    """Returns the fields that at least one run has, in the order of PANELS."""
    return [field for field in PANELS if any(field in curves for curves in runs)]


def smooth(values: list[float], reach: int = 5) -> list[float]:
    """Returns the mean of each value and its neighbours, `reach` on either side or as many as there
    are. Such a mean does not lag behind the curve, as a running average would."""
    smoothed = []
    for i in range(len(values)):
        start = max(0, i - reach)
        smoothed.append(fmean(values[start : i + reach + 1]))
    return smoothed


def draw(runs: dict[str, Curves], out: str) -> None:
    """Writes the picture of runs, given by name. Raises InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib is missing: pip install matplotlib") from None
    panels = choose_panels(list(runs.values()))
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for place, field in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place, xlabel="step")
        axes.set_title(PANELS[field], fontsize=9)
        for number, (name, curves) in enumerate(runs.items()):
            steps, values = curves.get(field, ([], []))
            axes.plot(steps, values, color=f"C{number}", linewidth=0.6, alpha=0.4)
            axes.plot(steps, smooth(values), color=f"C{number}", linewidth=1.8, label=name)
    # The lines have the same colours in all panels, so one legend serves the picture.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=COLUMNS)
    try:
        figure.savefig(out, dpi=110)
    except ValueError as error:  # an ending that is no format of a picture
        raise InputError(f"--out {out}: {error}") from None


def main(argv: list[str]) -> None:
    options = parse_options(PlotOptions, argv)
    draw({run: read_run(run) for run in options.runs}, options.out)
    print(options.out)


if __name__ == "__main__":
    run_command(main)
