"""micro/stopping.py: the cases, the probe, and what it finds in the shipped base."""

import random

import pytest
import torch

from hub.options import MICRO_BASE
from micro.stopping import draw_case, probe_model, ranking, train_probe
from micro.world import TRAIN_BUCKETS


@pytest.mark.parametrize("domain, most", [("A", 7), ("L", 7), ("G", 5)])
def test_depth_does_not_tell_whether_another_step_follows(domain, most):
    rng = random.Random(0)
    cases = [draw_case(rng, domain, TRAIN_BUCKETS) for _ in range(2000)]
    for question, done, follows in cases:
        assert follows == (question.depth > done) and question.depth - done in (0, 1)
    assert {question.depth for question, _, _ in cases} == set(range(2, most + 1))
    for depth in range(2, most + 1):
        share = [follows for question, _, follows in cases if question.depth == depth]
        assert abs(sum(share) / len(share) - 0.5) < 0.1
    # The number of steps tells at its ends only.
    for steps in range(2, most):
        share = [follows for _, done, follows in cases if done == steps]
        assert abs(sum(share) / len(share) - 0.5) < 0.1


def test_a_probe_finds_a_direction_and_no_more():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(800, 16, generator=generator) * 3 + 1
    labels = states[:, 3] - states[:, 7] > 0.5
    probe = train_probe(states[:400], labels[:400])
    assert ranking(probe, states[400:], labels[400:]) > 0.95
    assert ranking(probe, states[400:], ~labels[400:]) < 0.05  # the sign is turned
    other = states[:, 1] > 1
    assert abs(ranking(probe, states[400:], other[400:]) - 0.5) < 0.1


def test_a_tie_counts_half():
    probe = (torch.zeros(1), torch.ones(1), torch.tensor([1.0, 0.0]))
    states = torch.tensor([[3.0], [1.0], [1.0], [0.0]])
    # 3 above 1 and 0, 1 beside 1 and above 0: three and a half of four pairs.
    assert ranking(probe, states, torch.tensor([True, True, False, False])) == 3.5 / 4


def test_the_base_knows_when_a_graph_ends_but_not_as_in_a():
    found = probe_model(str(MICRO_BASE), count=40)
    last = {name: {s: shares[-1] for s, shares in part.items()} for name, part in found.items()}
    assert last["own"]["A text"] == last["A's"]["A text"] > 0.75
    assert last["own"]["G text"] > 0.95 > 0.8 > last["A's"]["G text"]
    assert {len(shares) for part in found.values() for shares in part.values()} == {4}
