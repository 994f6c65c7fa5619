"""Draws the figures of the documents. Needs matplotlib: pip install matplotlib

python micro/plot.py effect      # micro/results/seed-*.json       -> micro/figures/effect.png
python micro/plot.py stages      # micro/results/claims/stages.json
python micro/plot.py why         # micro/results/why.json          -> micro/figures/why.png
python micro/plot.py dynamics    # micro/results/claims/dynamics.json
python micro/plot.py transfer    # micro/results/claims/reading.json, size.json, variants.json
python micro/plot.py decisions   # micro/results/claims/decisions.json, clock.json
"""

import json
import sys
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from hub.errors import InputError
from hub.options import ROOT, run_command
from micro.claims import CURVE_STEPS
from micro.decisions import DECISIONS
from micro.further_claims import CHANCE, IMAGE_SHARES, WIDTHS
from micro.paper_claims import LONGER, PANELS, TWO
from micro.reproduce import LIMIT, pooled
from micro.study import RESULTS, load_results
from micro.verdicts import mean_and_error
from micro.why_claims import (
    BACK_BY_COUNT,
    BACK_BY_PLACE,
    BY_COUNT,
    BY_LAST,
    MOVED_BY_COUNT,
    MOVED_BY_PLACE,
)

FIGURES = ROOT / "micro" / "figures"
SETTINGS = {
    "A text": "text\n(trained)",
    "A image": "image\n(X-modality)",
    "L text": "other domain\n(X-domain)",
    "L image": "image of\nother domain",
}
STAGES = {"base": "#c9c9c9", "SFT": "#7fb3d5", "SFT + GRPO": "#1f618d"}


def load_pyplot():
    """Returns matplotlib.pyplot, for drawing to files. Raises InputError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def finish(figure, name: str) -> None:
    """Writes a figure, and says where."""
    FIGURES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / name, dpi=110)
    with Image.open(FIGURES / name) as image:
        small = image.convert("RGB").quantize(64)  # as good to the eye, and a third of the bytes
    small.save(FIGURES / name, optimize=True)
    print(FIGURES / name)


def draw_upright_bars(axes, groups: dict[str, list[list[float]]], colours: list[str]) -> None:
    """Draws the accuracy by setting: means and deviations over seeds, seeds as dots.

    groups: what stands in the legend -> for each of SETTINGS, the values of its seeds.
    """
    width = 0.8 / len(groups)
    for i, ((label, values), colour) in enumerate(zip(groups.items(), colours)):
        places = [x + width * (i - (len(groups) - 1) / 2) for x in range(len(SETTINGS))]
        means = [fmean(points) for points in values]
        errors = [stdev(points) if len(points) > 1 else 0.0 for points in values]
        axes.bar(places, means, 0.93 * width, yerr=errors, color=colour, capsize=3, label=label)
        for x, points in zip(places, values):
            axes.plot([x] * len(points), points, ".", color="black", markersize=3)
    axes.set_xticks(range(len(SETTINGS)), SETTINGS.values())
    axes.legend(fontsize=8, loc="upper left", ncols=len(groups))


def finish_accuracy(axes) -> None:
    """Marks what a blind guess would do, and makes room for a legend above 100%."""
    axes.axhline(CHANCE, color="black", linewidth=0.7, linestyle=":")
    axes.set_ylim(0, 118)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)


def draw_lines(axes, tables: list[dict]) -> None:
    """Draws the accuracy on the trained domain by depth, as means over seeds."""
    for stage, colour in STAGES.items():
        for column, style in (("A text", "--"), ("A image", "-")):
            by_depth = [table[stage][column]["by_depth"] for table in tables]
            depths = [int(k) for k in by_depth[0]]
            means = [100 * fmean(accuracy[k] for accuracy in by_depth) for k in by_depth[0]]
            label = f"{stage}, {column.split()[1]}"
            axes.plot(depths, means, style, marker="o", markersize=3, color=colour, label=label)
    axes.set_xticks(range(2, 7))
    axes.legend(fontsize=8, loc="center")


def plot_effect(chains: str = "none") -> None:
    """Draws effect.png: bars by setting, and lines by depth."""
    results = load_results()
    tables = [result["tables"][chains] for result in results]
    count = f"one seed ({results[0]['seed']})"
    if len(tables) > 1:
        count = f"{len(tables)} seeds, each with its own base"
    figure, (bars, lines) = load_pyplot().subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    groups = {
        stage: [[100 * pooled(table[stage], column) for table in tables] for column in SETTINGS]
        for stage in STAGES
    }
    draw_upright_bars(bars, groups, list(STAGES.values()))
    draw_lines(lines, tables)
    bars.set_title(f"questions of more than {LIMIT} steps, {count}", fontsize=10)
    lines.set_title("trained domain, by number of steps k", fontsize=10)
    finish_accuracy(bars)
    finish_accuracy(lines)
    finish(figure, "effect.png")


def plot_stages() -> None:
    """Draws stages.png: base, SFT, both stages, and SFT of as many tokens, in each setting."""
    tables = [result["table"] for result in read_claim("stages").values()]
    groups = {
        name: [[table[name][column] for table in tables] for column in SETTINGS]
        for name in ("base", "SFT (80 steps)", LONGER[1], TWO)
    }
    figure, axes = load_pyplot().subplots(figsize=(9, 3.8))
    colours = [STAGES["base"], STAGES["SFT"], "#b9a2cf", STAGES["SFT + GRPO"]]
    draw_upright_bars(axes, groups, colours)
    seeds = f"{len(tables)} seeds, each with its own base"
    axes.set_title(f"questions of more than {LIMIT} steps, {seeds}", fontsize=10)
    finish_accuracy(axes)
    finish(figure, "stages.png")


def plot_why() -> None:
    """Draws why.png.

    Left: what is the thought's and what the prompt's, where they disagree. Right: accuracy against
    reading, on images of growing noise.
    """
    model = json.loads((RESULTS / "why.json").read_text())["SFT + GRPO"]
    figure, (bars, scatter) = load_pyplot().subplots(1, 2, figsize=(11, 3.4), width_ratios=(3, 2))
    suffix = " of the thought"
    names = [name.removesuffix(suffix) for name in model["image"] if name.endswith(suffix)]
    for i, (source, colour) in enumerate({"thought": "#1f618d", "prompt": "#e59866"}.items()):
        values = [100 * model["image"][f"{name} of the {source}"] for name in names]
        places = [y + 0.2 * (2 * i - 1) for y in range(len(names))]
        bars.barh(places, values, 0.38, color=colour, label=f"the {source}'s")
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.set_xlabel("% of those in which thought and image disagree")
    read = [100 * row["read"] for row in model["noise"]]
    right = [100 * row["right"] for row in model["noise"]]
    scatter.plot(read, right, "o-", color="#1f618d", label="measured")
    # The line from chance, where nothing is read, to the accuracy on text, where everything is.
    line = [10, 100 * model["text"]["right"]]
    label = "text accuracy where read, chance elsewhere"
    scatter.plot([0, 100], line, ":", color="black", label=label)
    scatter.set_xlabel("images read without an error, %")
    scatter.set_ylabel("answers right, %")
    for axes in (bars, scatter):
        axes.legend(fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    finish(figure, "why.png")


def read_claim(name: str) -> dict[str, dict]:
    """Returns what micro/claims.py has measured of a claim, by seed."""
    path = RESULTS / "claims" / f"{name}.json"
    if not path.exists():
        raise InputError(f"{path}: not measured yet: make claims CLAIMS='--claim {name}'")
    return json.loads(path.read_text())["seeds"]


def plot_dynamics() -> None:
    """Draws dynamics.png: a panel for each metric of GRPO, a line for each seed (paper: figure 5).

    A point is the mean of CURVE_STEPS steps; where nothing was measured there is none.
    """
    seeds = read_claim("dynamics")
    figure, axes = load_pyplot().subplots(2, 4, figsize=(13, 5))
    for panel, (field, (title, factor)) in zip(axes.flat, PANELS.items()):
        for seed, result in seeds.items():
            points = result["curves"][field]
            steps = [CURVE_STEPS * (i + 0.5) for i in range(len(points))]
            values = [None if value is None else factor * value for value in points]
            known = [(x, y) for x, y in zip(steps, values) if y is not None]
            panel.plot(*zip(*known), linewidth=1.2, label=f"seed {seed}")
        panel.set_title(title, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=7)
    for panel in axes[1]:
        panel.set_xlabel("step")
    finish(figure, "dynamics.png")


BASE_MARKS = {"A image": "o", "L image": "s", "A text": "x"}


def draw_reading(axes, seeds: dict[str, dict]) -> None:
    """Draws accuracy on A after both stages against what the base reads; a dot is a base."""
    tables = [result["table"] for result in seeds.values()]
    for number, share in enumerate(IMAGE_SHARES):
        read = [table[f"image_share {share}: base"]["reading"] for table in tables]
        for column in ("A image", "A text"):
            right = [table[f"image_share {share}: SFT + RL"][column] for table in tables]
            label = f"image share {share}: {column}"
            axes.plot(read, right, BASE_MARKS[column], color=f"C{number}", label=label)
    axes.plot([0, 100], [CHANCE, 100], ":", color="black", label="reading, else a guess")
    axes.set_xlabel("images that the base reads without an error, %")


def draw_size(axes, seeds: dict[str, dict]) -> None:
    """Draws accuracy after both stages against the base's width; a dot is a base."""
    tables = [result["table"] for result in seeds.values()]
    for number, (column, mark) in enumerate(BASE_MARKS.items()):
        points = [(w, table[f"width {w}: SFT + RL"][column]) for w in WIDTHS for table in tables]
        means = [fmean(table[f"width {w}: SFT + RL"][column] for table in tables) for w in WIDTHS]
        axes.plot(*zip(*points), mark, color=f"C{number}", label=column)
        axes.plot(WIDTHS, means, "-", color=f"C{number}", linewidth=0.8)
    axes.set_xticks(WIDTHS)
    axes.set_xlabel("width of the base (hidden size)")


def draw_variants(axes, seeds: dict[str, dict]) -> None:
    """Draws what each variant of GRPO adds to the images of A and of L: mean +- standard error."""
    tables = [result["table"] for result in seeds.values()]
    names = [name for name in tables[0] if name != "SFT"]
    for i, (column, colour) in enumerate({"A image": "#1f618d", "L image": "#7fb3d5"}.items()):
        gains = [[t[name][column] - t["SFT"][column] for t in tables] for name in names]
        means, errors = zip(*(mean_and_error(values) for values in gains))
        places = [y + 0.2 * (2 * i - 1) for y in range(len(names))]
        bars = None if len(tables) == 1 else errors
        axes.barh(places, means, 0.38, xerr=bars, capsize=2, color=colour, label=column)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("points over SFT after 60 rollouts")


def plot_transfer() -> None:
    """Draws transfer.png: bases that read worse, bases of other sizes, variants of GRPO."""
    figure, axes = load_pyplot().subplots(1, 3, figsize=(15, 4))
    draw_reading(axes[0], read_claim("reading"))
    draw_size(axes[1], read_claim("size"))
    for panel in axes[:2]:
        panel.set_ylabel("after SFT + RL, accuracy in %, k > 2")
    draw_variants(axes[2], read_claim("variants"))
    for panel, empty_corner in zip(axes, ("lower right", "lower center", "upper right")):
        panel.legend(fontsize=7, loc=empty_corner)
        panel.spines[["top", "right"]].set_visible(False)
    finish(figure, "transfer.png")


def draw_lying_bars(axes, names: list[str], groups: dict[str, list[list[float]]]) -> None:
    """Draws a horizontal bar for each name and group, the mean over seeds, and seeds as dots.

    groups: what stands in the legend -> for each name, the values of its seeds.
    """
    height = 0.8 / len(groups)
    for i, (label, rows) in enumerate(groups.items()):
        places = [y + height * (i - (len(groups) - 1) / 2) for y in range(len(names))]
        axes.barh(places, [fmean(values) for values in rows], 0.95 * height, label=label)
        for place, values in zip(places, rows):
            axes.plot(values, [place] * len(values), ".", color="black", markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def plot_decisions() -> None:
    """Draws decisions.png: which decisions do not carry over, and what the number follows."""
    figure, (wrong, follows) = load_pyplot().subplots(1, 2, figsize=(11, 3.8), width_ratios=(2, 3))
    tables = [result["table"] for result in read_claim("decisions").values()]
    columns = {
        column: [[100 - table[f"SFT: {name}"][column] for table in tables] for name in DECISIONS]
        for column in ("A image", "L text", "L image")
    }
    draw_lying_bars(wrong, list(DECISIONS), columns)
    wrong.set_title("decisions that are wrong after SFT on text of A, %", fontsize=10)

    tables = [result["table"] for result in read_claim("clock").values()]
    rows = {
        "last step replaced:\none more than its number": BY_LAST,
        "one more than there are": BY_COUNT,
        "steps moved on:\none more than there are": MOVED_BY_COUNT,
        "what is due at the place": MOVED_BY_PLACE,
        "steps moved back:\none more than there are": BACK_BY_COUNT,
        "what is due at that place": BACK_BY_PLACE,
    }
    columns = {
        column: [[table[f"SFT + RL: {row}"][column] for table in tables] for row in rows.values()]
        for column in ("A text", "L text")
    }
    draw_lying_bars(follows, list(rows), columns)
    follows.set_title("the number of the next step, after SFT + RL, %", fontsize=10)
    finish(figure, "decisions.png")


FIGURES_BY_NAME = {
    "decisions": plot_decisions,
    "effect": plot_effect,
    "stages": plot_stages,
    "why": plot_why,
    "dynamics": plot_dynamics,
    "transfer": plot_transfer,
}


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] not in FIGURES_BY_NAME:
        raise InputError(f"say which figure: {', '.join(FIGURES_BY_NAME)}")
    FIGURES_BY_NAME[argv[0]]()


if __name__ == "__main__":
    run_command(main)
