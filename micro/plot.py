"""The README's two figures. Needs matplotlib, which nothing else here does: pip install matplotlib

    python micro/plot.py effect          # micro/results/seed-*.json -> micro/figures/effect.png
    python micro/plot.py why             # micro/results/why.json    -> micro/figures/why.png
"""
import json
import sys
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from micro.reproduce import LIMIT, pooled  # noqa: E402
from micro.study import RESULTS, load_results  # noqa: E402

FIGURES = ROOT / "micro" / "figures"
SETTINGS = {"A text": "text\n(trained)", "A image": "image\n(X-modality)", "L text": "other domain\n(X-domain)",
            "L image": "image of\nother domain"}
STAGES = {"base": "#c9c9c9", "SFT": "#7fb3d5", "SFT + GRPO": "#1f618d"}


def finish(figure, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / name, dpi=110)
    print(FIGURES / name)


def plot_effect(chains: str = "none") -> None:
    """Bars: mean over seeds of the accuracy above the base's reach, with standard deviations; dots: every seed. Lines:
    accuracy by depth."""
    results = load_results()
    tables = [result["tables"][chains] for result in results]
    count = f"{len(tables)} seeds, each with its own base" if len(tables) > 1 else f"one seed ({results[0]['seed']})"
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2))
    for i, (stage, colour) in enumerate(STAGES.items()):
        values = [[100 * pooled(table[stage], column) for table in tables] for column in SETTINGS]
        places = [x + 0.27 * (i - 1) for x in range(len(SETTINGS))]
        errors = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        bars.bar(places, list(map(fmean, values)), 0.25, yerr=errors, color=colour, capsize=3, label=stage)
        for x, points in zip(places, values):
            bars.plot([x] * len(points), points, ".", color="black", markersize=3)
        for column, style in (("A text", "--"), ("A image", "-")):
            depths = list(tables[0][stage][column]["by_depth"])
            means = [100 * fmean(t[stage][column]["by_depth"][k] for t in tables) for k in depths]
            lines.plot(list(map(int, depths)), means, style, marker="o", markersize=3, color=colour,
                       label=f"{stage}, {column.split()[1]}")
    bars.set_xticks(range(len(SETTINGS)), SETTINGS.values())
    bars.set_title(f"questions of more than {LIMIT} steps, {count}", fontsize=10)
    lines.set_title("trained domain, by number of steps k", fontsize=10)
    lines.set_xticks(range(2, 7))
    for axes in (bars, lines):
        axes.axhline(10, color="black", linewidth=0.7, linestyle=":")
        axes.set_ylim(0, 118)  # room for the legend
        axes.set_ylabel("accuracy, %")
        axes.legend(fontsize=8, loc="upper left" if axes is bars else "center", ncols=3 if axes is bars else 1)
        axes.spines[["top", "right"]].set_visible(False)
    finish(figure, "effect.png")


def plot_why() -> None:
    """Left: what is the thought's and what the prompt's, where they disagree. Right: accuracy against reading, on
    images of growing noise."""
    model = json.loads((RESULTS / "why.json").read_text())["SFT + GRPO"]
    figure, (bars, scatter) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(3, 2))
    names = [name.removesuffix(" of the thought") for name in model["image"] if name.endswith("thought")]
    for i, (source, colour) in enumerate({"thought": "#1f618d", "prompt": "#e59866"}.items()):
        values = [100 * model["image"][f"{name} of the {source}"] for name in names]
        places = [y + 0.2 * (2 * i - 1) for y in range(len(names))]
        bars.barh(places, values, 0.38, color=colour, label=f"the {source}'s")
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.set_xlabel("% of those in which thought and image disagree")
    read, right = ([100 * row[key] for row in model["noise"]] for key in ("read", "right"))
    scatter.plot(read, right, "o-", color="#1f618d", label="measured")
    ceiling, chance = 100 * model["text"]["right"], 10
    scatter.plot([0, 100], [chance, ceiling], ":", color="black", label="text accuracy where read, chance elsewhere")
    scatter.set_xlabel("images read without an error, %")
    scatter.set_ylabel("answers right, %")
    for axes in (bars, scatter):
        axes.legend(fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    finish(figure, "why.png")


if __name__ == "__main__":
    {"effect": plot_effect, "why": plot_why}[sys.argv[1]]()
