"""Does a model know whether another step follows, and is it the same knowledge in every domain?

    python micro/stopping.py --model micro/base runs/reproduce/grpo/model [--out stopping.json]

A chain of thought is put in the model's mouth, right up to the end of some step. What comes next is
another step or `</think>`. A linear probe is trained to read which from the residual stream there,
layer by layer, on one setting (a domain, as text or as images), and tried on another:

    own      trained on the setting that it is tried on: is the knowledge there at all?
    A's      trained on A as text: is it there in the form in which training on A as text finds it?

A probe's figure is the chance that it ranks a chain that goes on above one that ends (the area
under the ROC curve): 0.5 is no knowledge, 1 all of it, and far below 0.5 is the knowledge with the
sign turned. Training on A can only teach the model to use what A shows. Where another domain has
its knowledge in another form (own good, A's poor), what is learned on A does not reach it.

The depth of the question is drawn first, and then whether all of its steps are done or all but one.
So the depth says nothing, and of the numbers of steps only the least and the most do: by the number
alone the figure is 0.65 in A and L, and 0.72 in G, whose questions have fewer steps. In G a probe
has it easy: the number of hops to go stands in the chain, just before the place that is read.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Tokenizer
from hub.options import MICRO_BASE, run_command
from micro.why import ask, read_on
from micro.world import TEST_BUCKETS, TRAIN_BUCKETS, Question, Walk, draw_question, max_depth
from model import Qwen2_5_VL
from training.journal import write_json

SETTINGS = [f"{domain} {modality}" for domain in "ALG" for modality in ("text", "image")]
COUNT = 400  # chains of a setting to train a probe on, and as many others to try it on
PENALTY = 1e-2  # on the squared weights of a probe, whose inputs have variance 1


def draw_case(rng: random.Random, domain: str, buckets: range) -> tuple[Question | Walk, int, bool]:
    """Returns (question, steps done, does another follow?): each half of the time."""
    depth = rng.randint(2, max_depth(domain))
    follows = rng.random() < 0.5
    return draw_question(rng, domain, depth, buckets), depth - follows, follows


@torch.no_grad()
def observe(
    model: Qwen2_5_VL,
    tokenizer: Tokenizer,
    rng: random.Random,
    setting: str,
    buckets: range,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Returns the residual stream behind each layer [layers, count, C] at the end of a step, and
    whether another step follows [count]."""
    domain, modality = setting.split()
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0, -1]))
        for layer, kept in zip(model.model.layers, seen)
    ]
    labels = []
    for _ in range(count):
        question, done, follows = draw_case(rng, domain, buckets)
        thought = question.chain(done).partition("</think>")[0]
        read_on(model, ask(question, modality, tokenizer, rng), tokenizer.encode(thought))
        labels.append(follows)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.stack(kept) for kept in seen]), torch.tensor(labels)


def train_probe(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (mean, scale, weights) of a logistic regression of labels [N] on states [N, C].

    The last weight is the bias.
    """
    mean, scale = states.mean(0), states.std(0) + 1e-6
    inputs = F.pad((states - mean) / scale, (0, 1), value=1.0)
    weights = torch.zeros(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        errors = F.binary_cross_entropy_with_logits(inputs @ weights, labels.float())
        total = errors + PENALTY * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return mean, scale, weights.detach()


def ranking(probe: tuple[Tensor, Tensor, Tensor], states: Tensor, labels: Tensor) -> float:
    """Returns the share of pairs, one that goes on and one that ends, that a probe ranks rightly.

    A tie counts half.
    """
    mean, scale, weights = probe
    scores = F.pad((states - mean) / scale, (0, 1), value=1.0) @ weights
    differences = scores[labels][:, None] - scores[~labels][None]
    return (differences.sign().mean().item() + 1) / 2


def probe_model(folder: str, seed: int = 0, count: int = COUNT) -> dict[str, dict]:
    """Returns {"own": {setting: its probes' figures by layer}, "A's": the same} of a model."""
    model = Qwen2_5_VL.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    found: dict[str, dict] = {"own": {}, "A's": {}}
    probes_of_a = None
    for setting in SETTINGS:
        rng = random.Random(f"{seed}/{setting}")
        states, labels = observe(model, tokenizer, rng, setting, TRAIN_BUCKETS, count)
        own = [train_probe(layer, labels) for layer in states]
        probes_of_a = probes_of_a or own  # A as text comes first
        states, labels = observe(model, tokenizer, rng, setting, TEST_BUCKETS, count)
        for name, probes in (("own", own), ("A's", probes_of_a)):
            shares = [ranking(probe, layer, labels) for probe, layer in zip(probes, states)]
            found[name][setting] = shares
    return found


def main(argv: list[str]) -> None:
    """Probes each model, prints the table, and writes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[str(MICRO_BASE)], help="model folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=COUNT, help="chains of each setting")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {folder: probe_model(folder, args.seed, args.count) for folder in args.model}
    for folder, found in results.items():
        print(f"{folder}: % of pairs ranked rightly, by layer")
        for name, columns in found.items():
            for setting, shares in columns.items():
                figures = " ".join(f"{100 * share:6.1f}" for share in shares)
                print(f"  {name:<5}{setting:<9}{figures}")
    if args.out:
        write_json(args.out, results)


if __name__ == "__main__":
    run_command(main)
