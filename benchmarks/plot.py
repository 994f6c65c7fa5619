"""Plots what `make gpu` recorded. Needs matplotlib, which nothing else here does: pip install matplotlib

    python benchmarks/plot.py            # benchmarks/attention-gpu.json, logprob-gpu.json -> .png beside them
"""
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).resolve().parent


def about(result: dict) -> str:
    r = result
    return f"{r['device']}, torch {r['torch']}, {r['dtype']}, commit {r['commit'][:7]}, {r['date']}"


def bars(axes, groups: dict[str, dict[str, float]], label: str) -> None:
    """One group of horizontal bars per shape, a colour per competitor."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [(y, values[name]) for y, values in enumerate(groups.values()) if name in values]
        axes.barh([y + i * height for y, _ in rows], [value for _, value in rows], height, label=name)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=7)


def plot_attention(path: Path) -> None:
    """Share of the ceiling that was measured in the same run: of a product's speed, when decoding of a copy's."""
    result = json.loads(path.read_text())
    shares = {shape: {name: 100 * r["share"] for name, r in found.items()} for shape, found in result["shapes"].items()}
    speedups = {shape: {name: found["triton"]["forward_backward_ms"] and
                        r["forward_backward_ms"] / found["triton"]["forward_backward_ms"] for name, r in found.items()}
                for shape, found in result["shapes"].items()
                if "triton" in found and found["triton"]["forward_backward_ms"]}
    figure, axes = plt.subplots(1, 2, figsize=(13, 1 + 0.6 * len(shares)))
    bars(axes[0], shares, "forward: % of the measured ceiling")
    if speedups:
        bars(axes[1], speedups, "forward + backward: time in units of ours")
    figure.suptitle(about(result), fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def plot_logprob(path: Path) -> None:
    """Time and memory."""
    result = json.loads(path.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(11, 3))
    bars(axes[0], {"forward": {name: r["forward_ms"] for name, r in result["ways"].items()},
                   "forward + backward": {name: r["forward_backward_ms"] for name, r in result["ways"].items()}}, "ms")
    bars(axes[1], {"": {name: r["extra_bytes"] / 1e9 for name, r in result["ways"].items()}},
         "GB beyond inputs and gradients")
    head = f"{result['tokens']} tokens, head {result['vocabulary']} x {result['width']}"
    figure.suptitle(f"{head}; {about(result)}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    for name, plot in (("attention", plot_attention), ("logprob", plot_logprob)):
        path = FOLDER / f"{name}-gpu.json"
        if path.exists():
            plot(path)
            print(path.with_suffix(".png"))
        else:
            print(f"{path} is not there: run `make gpu` on a machine with a GPU")
