"""The Triton kernel of kernels/adamw_triton.py against the definition in training/compact.py: in
Triton's interpreter, or on a GPU (TEST_ON=gpu, tests/conftest.py)."""

import pytest
import torch
from torch import Tensor, nn

from kernels import triton_or_none
from kernels.adamw_triton import adamw_triton
from kernels.triton_or_none import AVAILABLE, standing_for_a_gpu
from training import compact
from training.compact import CompactAdamW, adamw_reference, join, random_low

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(n: int, *, size: float = 0.02, pull: float = 1e-3) -> list[Tensor]:
    """Weights of about `size` and both signs, every seventh 0; gradients of about `pull`, every
    fifth 0; states as a run leaves them; random bits."""
    g = seeded(n)
    weight = (size * torch.randn(n, generator=g)).to(torch.bfloat16)
    grad = (pull * torch.randn(n, generator=g)).to(torch.bfloat16)
    weight[::7], grad[::5] = 0, 0
    exp_avg = (pull * torch.randn(n, generator=g)).to(torch.bfloat16)
    exp_avg_sq = (pull**2 * torch.rand(n, generator=g)).to(torch.bfloat16)
    noise = torch.empty(n, dtype=torch.int32).random_(generator=g)
    tensors = [weight, grad, random_low(weight, g), exp_avg, exp_avg_sq, noise]
    return [x.to(DEVICE) for x in tensors]


def run(path, tensors: list[Tensor], clip: float | None, **settings) -> list[Tensor]:
    """weight, low, exp_avg and exp_avg_sq behind a step. What was given stays as it was."""
    weight, grad, low, exp_avg, exp_avg_sq, noise = (x.clone() for x in tensors)
    factor = None if clip is None else torch.tensor(clip, device=DEVICE)
    path(weight, grad, low, exp_avg, exp_avg_sq, noise, factor, **settings)
    assert torch.equal(grad, tensors[1]) and torch.equal(noise, tensors[5])
    return [weight, low, exp_avg, exp_avg_sq]


def assert_near(found: Tensor, wanted: Tensor, unit: float, terms: Tensor) -> None:
    """Within so many parts of the result; and, where the terms that it is the sum of cancel, within
    what float32's rounding makes of those."""
    found, wanted = found.double(), wanted.double()
    assert found.isfinite().all()
    allowed = unit * torch.maximum(found.abs(), wanted.abs()) + 2**-22 * terms
    assert ((found - wanted).abs() <= allowed).all()


def check(tensors: list[Tensor], *, step: int = 1, clip: float | None = None, **changes) -> None:
    """The kernel's step beside the definition's; twice, bit for bit."""
    settings = SETTINGS | {"step": step} | changes
    wanted = run(adamw_reference, tensors, clip, **settings)
    found = run(adamw_triton, tensors, clip, **settings)
    again = run(adamw_triton, tensors, clip, **settings)
    assert all(torch.equal(one, other) for one, other in zip(found, again))
    # 1. The terms of each sum, in float64: of the first moment, and of the master.
    before = join(tensors[0], tensors[2]).double()
    grad, _, m, v = (x.double() for x in tensors[1:5])
    grad = grad * (clip or 1.0)
    beta1, beta2 = settings["betas"]
    v = (beta2 * v + (1 - beta2) * grad.square()) / (1 - beta2**step)
    rate = settings["lr"] / (1 - beta1**step) / (v.sqrt() + settings["eps"])
    moment_terms = grad.abs() + m.abs()
    master_terms = before.abs() + rate * moment_terms
    # 2. Masters: within 2 units of their 24 bits, of which 16 are the mantissa's. Moments: within
    #    one bfloat16 step, which is at most 2^-7 of the number.
    masters = [join(*result[:2]) for result in (found, wanted)]
    assert_near(*masters, 2 * 2**-15, master_terms)
    assert_near(found[2], wanted[2], 2**-7, moment_terms)
    assert_near(found[3], wanted[3], 2**-7, torch.zeros_like(before))
    # 3. Nearly all are the same, to the last bit.
    for one, other in zip(found, wanted):
        assert one.dtype == other.dtype and (one == other).double().mean() > 0.97


@pytest.mark.parametrize("clip", [None, 0.37])
@pytest.mark.parametrize("n", [1, 15, 1000, 1024, 1025, 5000])
def test_sizes(n, clip):
    check(inputs(n), clip=clip)


@pytest.mark.parametrize("step", [1, 2, 1000])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_and_decay(step, decay):
    check(inputs(3000), step=step, weight_decay=decay, betas=(0.9, 0.95), clip=0.5)


@pytest.mark.parametrize("pull", [1e-12, 1e-6, 1e4])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_magnitudes(size, pull):
    """Gradients that are lost beside eps, and such that their squares are large."""
    check(inputs(3000, size=size, pull=pull), step=3, weight_decay=0.01)


def test_other_settings():
    check(inputs(3000), step=5, lr=0.5, betas=(0.3, 0.6), eps=1e-3, weight_decay=1.0)
    check(inputs(3000), step=5, betas=(0.0, 0.0))


def test_no_learning_rate_leaves_masters_to_the_bit():
    tensors = inputs(3000)
    weight, low, *_ = run(adamw_triton, tensors, None, **SETTINGS | {"step": 4, "lr": 0.0})
    assert torch.equal(weight, tensors[0]) and torch.equal(low, tensors[2])


def test_zeros_without_a_gradient_stay_zeros():
    """Whatever the random bits: 0 is its own nearest number in few bits."""
    tensors = inputs(3000)
    for x in tensors[:5]:
        x.zero_()
    for result in run(adamw_triton, tensors, 1.0, **SETTINGS | {"step": 1}):
        assert not result.any()


def test_all_bits_of_a_master_are_used():
    """Weights of every finite exponent, and every low: joined and split exactly."""
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    weight = weight[weight.isfinite() & (weight != 0)].to(DEVICE)
    low = (torch.arange(len(weight)) % 256 - 128).to(torch.int8).to(DEVICE)
    zeros, noise = torch.zeros_like(weight), torch.full_like(weight, 0xFFFFFF, dtype=torch.int32)
    tensors = [weight, zeros, low, zeros, zeros, noise]
    found = run(adamw_triton, tensors, None, **SETTINGS | {"step": 1})
    wanted = run(adamw_reference, tensors, None, **SETTINGS | {"step": 1})
    assert torch.equal(join(*found[:2]), join(*wanted[:2]))
    # A low of -128 lies half way: the nearest weight may be the neighbour, as `split` decides.
    assert torch.equal(join(*found[:2]), join(weight, low))


def test_the_second_moment_is_right_on_average():
    """It moves by a thousandth of itself, less than a bfloat16 step: chance has to decide."""
    tensors = inputs(20_000)
    tensors[1].zero_()
    tensors[4].fill_(1.0)
    *_, v = run(adamw_triton, tensors, None, **SETTINGS | {"step": 1000})
    assert set(v.tolist()) == {1.0, 1 - 2**-8}
    assert v.double().mean().item() == pytest.approx(0.999, abs=1e-4)


# --- In the optimiser ---


def train(weights: list[Tensor], steps: int, **settings) -> CompactAdamW:
    """CompactAdamW behind clipped steps on gradients that are a function of weight and step."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = CompactAdamW(parameters, 1e-3, weight_decay=0.1, **settings)
    for step in range(steps):
        for number, weight in enumerate(parameters):
            gradient = torch.randn(weight.shape, generator=seeded(100 * step + number)) + 0.3
            weight.grad = gradient.to(weight.device, torch.bfloat16)
        optimizer.clip(1.0)
        version = parameters[0]._version
        optimizer.step()
        assert parameters[0]._version > version  # kernels/linear.py relies on it
    return optimizer


def test_the_optimiser_follows_the_definition(monkeypatch):
    """Also in chunks, of which none but the first begins at a multiple of 16 bytes."""
    monkeypatch.setattr(compact, "CHUNK", 1001)
    shapes = [(60, 70), (7,), (3, 5, 2)]
    weights = [0.02 * torch.randn(shape, generator=seeded(len(shape))) for shape in shapes]
    weights = [weight.to(DEVICE, torch.bfloat16) for weight in weights]
    runs = {}
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        runs[kernels] = train(weights, 12)
    for (_, one, _), (_, other, _) in zip(*(run.weights() for run in runs.values())):
        states = [runs["reference"].state[one], runs["triton"].state[other]]
        assert [state["step"].item() for state in states] == [12, 12]
        wanted = join(one.detach(), states[0]["low"])
        found = join(other.detach(), states[1]["low"])
        # What differs by a unit once, goes on so: a few units, beside twelve steps of 1e-3.
        torch.testing.assert_close(found, wanted, rtol=2**-13, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(states[1][name], states[0][name], rtol=2**-6, atol=1e-6)


def test_who_computes(monkeypatch):
    """A GPU takes the kernel by default, and so does the memory plan; a CPU the definition."""
    taken = []
    monkeypatch.setattr(compact, "adamw_triton", lambda *_, **__: taken.append("triton"))
    monkeypatch.setattr(compact, "adamw_reference", lambda *_, **__: taken.append("reference"))
    weight = nn.Parameter(torch.ones(5, dtype=torch.bfloat16, device=DEVICE))
    weight.grad = torch.ones_like(weight)
    optimizer = CompactAdamW([weight], 1e-3)
    monkeypatch.delenv("KERNELS", raising=False)
    optimizer.step()
    for kernels in ("reference", "sdpa", "triton"):
        monkeypatch.setenv("KERNELS", kernels)
        optimizer.step()
    monkeypatch.delenv("KERNELS")
    with standing_for_a_gpu():
        optimizer.step()
    default = "triton" if GPU else "reference"
    asked = "triton" if triton_or_none.triton_runs_on(weight) else "reference"
    assert taken == [default, "reference", "reference", asked, "triton"]


@pytest.mark.gpu
def test_gpu_states_on_the_host_give_the_same_bits(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")
    weights = [torch.randn(shape, generator=seeded()) for shape in ((33, 31), (7,), (1000, 1000))]
    weights = [weight.to(DEVICE, torch.bfloat16) for weight in weights]
    beside, on_host = train(weights, 3), train(weights, 3, states_on=torch.device("cpu"))
    for (_, one, _), (_, other, _) in zip(beside.weights(), on_host.weights()):
        assert torch.equal(one, other)
        for name in compact.STATES:
            assert torch.equal(beside.state[one][name].cpu(), on_host.state[other][name])
