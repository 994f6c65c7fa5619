"""Plots what `make gpu` recorded: attention.json and logprob.json, as .png beside them. Needs
matplotlib.

    python benchmarks/plot.py [FOLDER]      runs/gpu; benchmarks/gpu has an H200's
"""

import json
import sys
from pathlib import Path

try:
    import matplotlib
except ImportError:
    sys.exit("plot.py: error: matplotlib is missing: pip install matplotlib")

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def about(result: dict) -> str:
    """Returns what the figures are of: device, versions, date."""
    words = [result["device"], f"torch {result['torch']}", result["dtype"]]
    return ", ".join([*words, f"commit {result['commit'][:7]}", result["date"]])


def bars(axes, groups: dict[str, dict[str, float]], label: str) -> None:
    """Draws one group of horizontal bars per shape, with a colour per competitor."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [(y, values[name]) for y, values in enumerate(groups.values()) if name in values]
        places = [y + i * height for y, _ in rows]
        axes.barh(places, [value for _, value in rows], height, label=name)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=7)


def plot_attention(path: Path) -> None:
    """Draws the share of the ceiling that was measured in the same run (of a product's speed; when
    decoding of a copy's), and the time of forward + backward beside ours."""
    result = json.loads(path.read_text())
    shares, times = {}, {}
    for shape, found in result["shapes"].items():
        shares[shape] = {name: 100 * figures["share"] for name, figures in found.items()}
        ours = found.get("triton", {}).get("forward_backward_ms")
        if ours:  # not when decoding, which has no backward pass
            times[shape] = {
                name: figures["forward_backward_ms"] / ours for name, figures in found.items()
            }
    figure, axes = plt.subplots(1, 2, figsize=(13, 1 + 0.6 * len(shares)))
    bars(axes[0], shares, "forward: % of the measured ceiling")
    if times:
        bars(axes[1], times, "forward + backward: time in units of ours")
    figure.suptitle(about(result), fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def plot_logprob(path: Path) -> None:
    """Draws time and memory."""
    result = json.loads(path.read_text())
    forward, both, memory = {}, {}, {}
    for name, figures in result["ways"].items():
        forward[name] = figures["forward_ms"]
        both[name] = figures["forward_backward_ms"]
        memory[name] = figures["extra_bytes"] / 1e9
    figure, axes = plt.subplots(1, 2, figsize=(11, 3))
    bars(axes[0], {"forward": forward, "forward + backward": both}, "ms")
    bars(axes[1], {"": memory}, "GB beyond inputs and gradients")
    head = f"{result['tokens']} tokens, head {result['vocabulary']} x {result['width']}"
    figure.suptitle(f"{head}; {about(result)}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/gpu")
    for name, plot in (("attention", plot_attention), ("logprob", plot_logprob)):
        path = folder / f"{name}.json"
        if path.exists():
            plot(path)
            print(path.with_suffix(".png"))
        else:
            print(f"{path} is not there: run `make gpu` on a machine with a GPU")
