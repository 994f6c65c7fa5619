"""The model as training loads it, the optimiser, and its step."""

from pathlib import Path

import pytest
import torch

import tiny
from hub.config import Config
from hub.errors import InputError
from training.optimizer import forward_dtype, load_for_training, make_optimizer, optimizer_step
from training.options import TrainOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "vl_tied")


@pytest.fixture
def options(folder):
    def make(**changes) -> TrainOptions:
        return TrainOptions(**{"model": str(folder), "device": "cpu", **changes})

    return make


def test_optimiser_has_the_options_and_leaves_the_vision_tower_out(options):
    o = options(weight_decay=0.03, beta1=0.8, beta2=0.95)
    model = load_for_training(o)
    (group,) = make_optimizer(model, o).param_groups
    assert (group["weight_decay"], group["betas"]) == (0.03, (0.8, 0.95))
    named = {id(p): name for name, p in model.named_parameters()}
    assert {named[id(p)] for p in group["params"]} == {
        name for name in named.values() if not name.startswith("visual.")
    }


def test_fused_adamw_of_larger_models_is_adamw(options, monkeypatch):
    """Small models keep torch's plain one; from the same gradients both go the same way."""
    o = options(weight_decay=0.03, learning_rate=1e-3)
    trained = {}
    for small in (True, False):
        monkeypatch.setattr(Config, "is_small", small)
        model = load_for_training(o)
        optimizer = make_optimizer(model, o)
        assert optimizer.defaults["fused"] is not small
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer_step(model, optimizer, 1e-3, 1.0)
        trained[small] = model.state_dict()
    start = load_for_training(o).state_dict()
    moved = [name for name in start if not torch.equal(start[name], trained[True][name])]
    assert len(moved) > 10
    for name in moved:
        assert torch.allclose(trained[True][name], trained[False][name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("max_norm, factor", [(100.0, 1.0), (1.0, 0.2)])
def test_optimizer_step_clips_the_gradient_and_says_its_norm(max_norm, factor):
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = optimizer_step(layer, torch.optim.SGD(layer.parameters(), lr=99.0), 0.1, max_norm)
    assert norm == pytest.approx(5.0)  # before clipping
    assert torch.allclose(
        layer.weight, before - 0.1 * factor * torch.tensor([[3.0, 4.0]]), atol=1e-5
    )
    assert layer.weight.grad is None


def test_a_step_without_a_gradient_changes_nothing(options):
    """Not the weights, not Adam's moments, not its count of steps, and there is no weight decay."""
    o = options(weight_decay=0.1)
    model = load_for_training(o)
    optimizer = make_optimizer(model, o)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    assert optimizer_step(model, optimizer, 1e-3, 1.0) > 0
    weights = {name: p.clone() for name, p in model.named_parameters()}
    moments = [{k: v.clone() for k, v in state.items()} for state in optimizer.state.values()]
    assert moments and all(state["step"] == 1 for state in moments)
    assert optimizer_step(model, optimizer, 1e-3, 1.0) == 0.0
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    for before, now in zip(moments, optimizer.state.values()):
        assert before.keys() == now.keys()
        assert all(torch.equal(before[k], now[k]) for k in before)


@pytest.mark.parametrize(
    "dtype, wanted",
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_one_option_decides_the_dtype_of_the_weights(options, dtype, wanted):
    o = options(dtype=dtype)
    assert forward_dtype(o) == wanted
    weights = dict(load_for_training(o).named_parameters())
    assert {p.dtype for name, p in weights.items() if "visual." not in name} == {wanted}


def test_a_gradient_that_is_not_finite_changes_no_weight(options):
    model = load_for_training(options())
    optimizer = make_optimizer(model, options())
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan")) if p.requires_grad else None
    with pytest.raises(InputError, match="diverged"):
        optimizer_step(model, optimizer, 1e-3, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
