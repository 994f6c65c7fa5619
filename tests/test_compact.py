"""The compact optimiser: its bits, its mathematics beside torch's AdamW, its dead zone cured."""

import pytest
import torch
from torch import Tensor, nn

from training import compact
from training.compact import CompactAdamW, join, off_the_grid, random_low, split

NEAREST = 0x80  # the noise with which `split` rounds to the nearest


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_bfloat16() -> Tensor:
    """Returns all finite bfloat16 numbers: both signs and zeros, all exponents, subnormals."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def make(*weights: Tensor, lr: float = 1e-3, **changes) -> tuple[list[nn.Parameter], CompactAdamW]:
    """Returns weights in bfloat16, and their optimiser."""
    parameters = [nn.Parameter(weight.to(torch.bfloat16, copy=True)) for weight in weights]
    return parameters, CompactAdamW(parameters, lr, **changes)


def master(optimizer: CompactAdamW, weight: nn.Parameter) -> Tensor:
    return join(weight.detach(), optimizer.state[weight]["low"])


def train(optimizer: CompactAdamW, steps: range) -> None:
    """Takes clipped steps on gradients that are a function of the weight's number and the step."""
    for step in steps:
        for number, weight, _ in optimizer.weights():
            noise = torch.randn(weight.shape, generator=seeded(1000 * step + number))
            weight.grad = noise.to(weight.device, torch.bfloat16)
        optimizer.clip(1.0)
        optimizer.step()


def tensors(optimizer: CompactAdamW) -> list[Tensor]:
    """Returns all weights and states."""
    found = []
    for _, weight, _ in optimizer.weights():
        found += [weight.detach(), *optimizer.state[weight].values()]
    return found


def assert_same_bits(first: CompactAdamW, second: CompactAdamW) -> None:
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


# --- Bits ---


@pytest.mark.parametrize("noise", [0, NEAREST, 0xFF])
def test_what_was_joined_is_split_into_the_same(noise):
    high = every_bfloat16()
    for value in (-128, -127, -1, 0, 1, 126, 127):
        low = torch.full(high.shape, value, dtype=torch.int8) * (high != 0)
        whole = join(high, low)
        assert whole.isfinite().all()  # the largest number with the largest rest, too
        again, rest = split(whole, noise)
        assert torch.equal(again.view(torch.int16), high.view(torch.int16))
        assert torch.equal(rest, low)


def test_split_rounds_any_float_to_the_nearest_of_24_bits():
    pattern = torch.randint(-(2**31), 2**31, (200_000,), generator=seeded(), dtype=torch.int64)
    x = pattern.to(torch.int32).view(torch.float32)
    x = x[x.abs() < 3.38e38]  # what rounds to infinity is not to be asked for
    high, low = split(x, NEAREST)
    distance = join(high, low).view(torch.int32).long() - x.view(torch.int32).long()
    assert distance.min() == -0x7F and distance.max() == 0x80
    # The upper half is the nearest bfloat16 number, but where rounding twice meets a tie.
    assert (high == x.to(torch.bfloat16)).float().mean() > 0.99
    assert (high.float() - x).abs().le(x.abs() * 2.0**-8 * 1.01 + 1e-40).all()


def test_rounding_is_right_on_average():
    count = 200_000
    for part in (0.0, 0.1, 0.5, 0.93):
        # A second moment between 1 and the next bfloat16 number.
        x = torch.full((count,), 1 + part * 2**-7)
        noise = torch.randint(0, 2**16, (count,), generator=seeded(), dtype=torch.int32)
        rounded = compact.round_stochastically(x, noise).float()
        assert set(rounded.tolist()) <= {1.0, 1 + 2**-7}
        assert abs((rounded.mean().item() - 1) * 2**7 - part) < 0.005
        # A master between -1 and the next 24-bit number.
        x = torch.full((count,), -1 - part * 2**-15)
        rounded = join(*split(x, noise & 0xFF))
        assert set(rounded.tolist()) <= {-1.0, -1 - 2**-15}
        assert abs((-1 - rounded.double().mean().item()) * 2**15 - part) < 0.01


# --- Where masters begin ---


def test_masters_begin_anywhere_within_the_step_of_a_weight_that_stays():
    weights = every_bfloat16()
    (weight,), optimizer = make(weights)
    low = optimizer.state[weight]["low"]
    assert torch.equal(weight.detach().view(torch.int16), weights.view(torch.int16))
    assert master(optimizer, weight).isfinite().all()
    high, _ = split(master(optimizer, weight), NEAREST)
    assert torch.equal(high.view(torch.int16), weights.view(torch.int16))
    # Uniform: mean -0.5, standard deviation 256 / sqrt(12), all 256 values.
    assert abs(low.float().mean() + 0.5) < 1.5 and abs(low.float().std() - 73.9) < 1
    assert len(low.unique()) == 256
    # 0 and -0 have no smaller magnitude, and remain exact.
    assert low[weights == 0].tolist() == [0, 0]
    # It is the seed that decides, and the number of the weight.
    (same, neighbour), first = make(weights, weights)
    (other,), second = make(weights, seed=1)
    assert torch.equal(first.state[same]["low"], low)
    assert not torch.equal(first.state[neighbour]["low"], low)
    assert not torch.equal(second.state[other]["low"], low)


def test_a_weight_of_zero_learns_and_never_becomes_nan():
    (weight,), optimizer = make(torch.zeros(64) * torch.tensor([1.0, -1.0]).repeat(32), lr=1e-3)
    for sign in (1, -1, -1, 1):
        weight.grad = torch.full_like(weight, sign)
        optimizer.step()
        assert master(optimizer, weight).isfinite().all()
        assert weight.isfinite().all()
    train(optimizer, range(50))
    assert master(optimizer, weight).isfinite().all() and (weight != 0).all()


def test_off_the_grid_rounds_to_the_same_weights(monkeypatch):
    monkeypatch.setattr(compact, "CHUNK", 100_000)
    grid = every_bfloat16().float().repeat(20, 1)  # enough to meet the ends of the steps, too
    kept = grid.clone()
    moved = off_the_grid(grid, seeded())
    assert torch.equal(grid, kept)
    assert torch.equal(
        moved.to(torch.bfloat16).view(torch.int16), grid.to(torch.bfloat16).view(torch.int16)
    )
    assert torch.equal(moved[grid == 0], grid[grid == 0])
    # Uniform within half a step to either side, in units of a step of the bit pattern.
    away = (moved.view(torch.int32) - grid.view(torch.int32)) / 2**16
    assert away.abs().max() < 0.5 and abs(away.mean()) < 0.005
    assert abs(away.std() - 12**-0.5) < 0.005
    assert torch.equal(off_the_grid(grid, seeded()), moved)
    assert not torch.equal(off_the_grid(grid, seeded(1)), moved)


# --- The mathematics ---


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_same_gradients_move_masters_as_adamw_moves_float32(decay):
    settings = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": decay}
    start = torch.randn(300, 20, generator=seeded())
    (weight,), optimizer = make(start, **settings)
    plain = nn.Parameter(master(optimizer, weight))
    adamw = torch.optim.AdamW([plain], **settings)
    before = plain.detach().clone()
    for step in range(100):
        gradient = torch.randn(start.shape, generator=seeded(step)) + 0.3
        weight.grad = gradient.to(torch.bfloat16)
        plain.grad = weight.grad.float()
        optimizer.step()
        adamw.step()
    moved, wanted = master(optimizer, weight) - before, plain.detach() - before
    error = (moved - wanted).norm() / wanted.norm()
    slope = (moved * wanted).sum() / wanted.square().sum()
    assert error < 0.01 and abs(slope - 1) < 1e-3
    # What the forward pass sees is the master, rounded; and it can see that it has changed.
    assert weight._version > 0
    assert torch.equal(split(master(optimizer, weight), NEAREST)[0], weight)
    assert optimizer.state[weight]["step"].item() == 100


def test_it_learns_what_adamw_learns():
    generator = seeded()
    inputs = torch.randn(256, 32, generator=generator)
    targets = inputs @ torch.randn(32, 4, generator=generator)
    losses = {}
    for name in ("compact", "float32"):
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4))
        for number, weight in enumerate(model.parameters()):
            values = torch.randn(weight.shape, generator=seeded(number)) * 0.1
            weight.data = values.to(torch.bfloat16).float()
        dtype = torch.bfloat16 if name == "compact" else torch.float32
        model.to(dtype)
        Optimizer = CompactAdamW if name == "compact" else torch.optim.AdamW
        optimizer = Optimizer(model.parameters(), lr=1e-2, weight_decay=0.0)
        losses[name] = []
        for _ in range(80):
            loss = (model(inputs.to(dtype)).float() - targets).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["float32"][-1] < 0.1 * losses["float32"][0]
    for step in (10, 20, 40, 79):
        assert losses["compact"][step] == pytest.approx(losses["float32"][step], rel=0.05)


def test_the_second_moment_shrinks_as_float32s():
    (weight,), optimizer = make(torch.ones(20_000), betas=(0.9, 0.999))
    v = 0.0
    for step in range(400):
        gradient = 1.0 if step < 20 else 0.01
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        v = 0.999 * v + 0.001 * weight.grad[0].double().item() ** 2
    stored = optimizer.state[weight]["exp_avg_sq"].float()
    assert stored.mean().item() == pytest.approx(v, rel=0.005)
    assert v < 0.7 * 0.02  # rounded to the nearest it would have stayed where it was


# --- The dead zone ---


def moved_share(weight: Tensor, before: Tensor) -> float:
    return (weight.detach() != before).float().mean().item()


def push(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Takes steps of the learning rate upwards: a gradient that stays gives just that."""
    for _ in range(steps):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step()


def test_a_low_rate_moves_as_many_visible_weights_as_it_should():
    # At 0.02 bfloat16's steps are 2^-13 = 1.2e-4, and twelve steps of 3e-6 go 0.295 of one.
    before = torch.full((10_000,), 0.02, dtype=torch.bfloat16)
    share = 12 * 3e-6 * 2**13
    # 1. AdamW on bfloat16 weights never gets anywhere.
    weight = nn.Parameter(before.clone())
    push(weight, torch.optim.AdamW([weight], lr=3e-6, weight_decay=0.0), 12)
    assert moved_share(weight, before) == 0
    # 2. Nor do masters that begin on the grid, for as long as they are within half a step of it.
    (weight,), optimizer = make(before, lr=3e-6)
    optimizer.state[weight]["low"].zero_()
    push(weight, optimizer, 12)
    assert moved_share(weight, before) == 0
    # 3. Masters that begin anywhere cross over at once, as many as should.
    (weight,), optimizer = make(before, lr=3e-6)
    push(weight, optimizer, 12)
    assert moved_share(weight, before) == pytest.approx(share, abs=0.02)
    assert (weight.detach() - before).float().mean() == pytest.approx(12 * 3e-6, rel=0.07)


def test_a_low_rate_moves_masters_of_one(monkeypatch):
    # At 1 even a master's steps are 2^-15 = 3e-5, ten times the rate: chance has to decide.
    (weight,), optimizer = make(torch.ones(10_000), lr=3e-6)
    before = master(optimizer, weight)
    push(weight, optimizer, 40)
    moved = (master(optimizer, weight) - before).double().mean()
    assert moved.item() == pytest.approx(40 * 3e-6, rel=0.02)
    # Rounded to the nearest, they never get anywhere.
    monkeypatch.setattr(compact, "split", lambda whole, _: split(whole, NEAREST))
    before = master(optimizer, weight)
    push(weight, optimizer, 40)
    assert torch.equal(master(optimizer, weight), before)


# --- Clipping ---


def test_clip_gives_the_norm_in_float32_and_scales_the_step_alone():
    shapes = [(300, 100), (7,), (2, 3, 5)]
    weights, optimizer = make(*(torch.ones(shape) for shape in shapes), eps=1.0)
    _, scaled = make(*(torch.ones(shape) for shape in shapes), eps=1.0)
    for number, weight in enumerate(weights):
        weight.grad = torch.randn(weight.shape, generator=seeded(number)).to(torch.bfloat16)
    kept = [weight.grad.clone() for weight in weights]
    exact = torch.cat([gradient.double().flatten() for gradient in kept]).norm()
    norm = optimizer.clip(0.5)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact.item(), rel=1e-5)
    # A step on gradients that are scaled in float32: the moments tell.
    optimizer.step()
    for weight, gradient in zip(weights, kept):
        assert torch.equal(weight.grad, gradient)
        wanted = (gradient.float() * (0.5 / exact.item()) * 0.1).to(torch.bfloat16)
        difference = optimizer.state[weight]["exp_avg"].float() - wanted.float()
        assert difference.abs().max() <= 2**-8 * wanted.float().abs().max()
    # It is for one step only, and shorter gradients stay as they are.
    first = optimizer.state[weights[1]]["exp_avg"].clone()
    optimizer.step()
    wanted = 0.9 * first.float() + 0.1 * kept[1].float()
    torch.testing.assert_close(
        optimizer.state[weights[1]]["exp_avg"].float(), wanted, rtol=2**-7, atol=1e-6
    )
    for _, weight, _ in scaled.weights():
        weight.grad = torch.full_like(weight, 1e-4)
    scaled.clip(0.5)
    assert scaled.clip_factor == 1.0


def test_clip_says_what_is_not_finite_and_zero_without_gradients():
    (first, second), optimizer = make(torch.ones(5), torch.ones(3))
    assert optimizer.clip(1.0).item() == 0.0
    first.grad = torch.ones_like(first)
    second.grad = torch.tensor([1.0, float("nan"), 1.0], dtype=torch.bfloat16)
    assert not optimizer.clip(1.0).isfinite()
    second.grad = torch.full_like(second, float("inf"))
    assert not optimizer.clip(1.0).isfinite()


# --- What a run relies on ---


def test_a_resumed_run_goes_on_bit_for_bit():
    shapes = [torch.randn(40, 30, generator=seeded()), torch.ones(17), torch.zeros(3, 2, 2)]
    _, whole = make(*shapes, seed=7)
    train(whole, range(9))
    _, first = make(*shapes, seed=7)
    train(first, range(4))
    # Loaded in place into an optimiser of other weights.
    _, second = make(*(torch.full_like(weight, 3.0) for weight in shapes), seed=7)
    for target, value in zip(tensors(second), tensors(first), strict=True):
        target.copy_(value)
    train(second, range(4, 9))
    assert_same_bits(whole, second)


def test_another_seed_rounds_otherwise():
    _, first = make(torch.ones(1000), seed=0)
    _, second = make(torch.ones(1000), seed=1)
    for target, value in zip(tensors(second), tensors(first), strict=True):
        target.copy_(value)
    train(first, range(2))
    train(second, range(2))
    assert not torch.equal(tensors(first)[2], tensors(second)[2])


def test_the_size_of_chunks_does_not_matter(monkeypatch):
    shapes = [torch.randn(33, 31, generator=seeded()), torch.randn(7, generator=seeded())]
    _, whole = make(*shapes)
    train(whole, range(3))
    monkeypatch.setattr(compact, "CHUNK", 100)
    _, cut = make(*shapes)
    train(cut, range(3))
    # The norm is summed in other pieces: the last bit of the factor may differ, hardly more.
    for (_, a, _), (_, b, _) in zip(whole.weights(), cut.weights()):
        assert torch.equal(whole.state[a]["step"], cut.state[b]["step"])
        torch.testing.assert_close(master(whole, a), master(cut, b), rtol=2**-14, atol=0)
        assert (a == b).float().mean() > 0.99


def test_weights_without_a_gradient_are_passed_over():
    (first, second), optimizer = make(torch.ones(50), torch.ones(50))
    _, alone = make(torch.ones(50), torch.ones(50))
    train(optimizer, range(2))
    train(alone, range(2))
    kept = [tensor.clone() for tensor in tensors(optimizer)[5:]]
    second.grad = None
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert optimizer.state[first]["step"] == 3 and optimizer.state[second]["step"] == 2
    for value, before in zip(tensors(optimizer)[5:], kept, strict=True):
        assert torch.equal(value, before)
    # Nor does the neighbour's random stream shift by it.
    for _, weight, _ in alone.weights():
        weight.grad = torch.ones_like(weight)
    alone.step()
    for value, other in zip(tensors(optimizer)[:5], tensors(alone)[:5], strict=True):
        assert torch.equal(value, other)


def test_states_are_small_and_complete_before_the_first_step():
    (weight,), optimizer = make(torch.randn(10, 3, generator=seeded()))
    state = optimizer.state[weight]
    assert list(state) == ["step", "low", "exp_avg", "exp_avg_sq"]
    assert state["step"].dtype == torch.float32 and state["step"].dim() == 0
    assert state["low"].dtype == torch.int8
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert {state[name].shape for name in compact.STATES} == {weight.shape}
    per_parameter = 2 * weight.element_size()  # the weight and its gradient
    per_parameter += sum(state[name].element_size() for name in compact.STATES)
    assert per_parameter == 9


def test_other_weights_are_refused():
    for weight in (torch.ones(3), torch.ones(4, 3, dtype=torch.bfloat16).t()):
        with pytest.raises(ValueError, match="contiguous bfloat16"):
            CompactAdamW([nn.Parameter(weight)], 1e-3)


# --- On a GPU ---


@pytest.mark.gpu
def test_gpu_states_on_the_host_give_the_same_bits():
    shapes = [torch.randn(33, 31, generator=seeded()), torch.ones(7), torch.randn(5000, 7000)]
    weights = [shape.cuda() for shape in shapes]
    _, beside = make(*weights)
    (_, _, large), on_host = make(*weights, states_on=torch.device("cpu"))
    assert on_host.state[large]["exp_avg"].is_pinned()
    train(beside, range(3))
    train(on_host, range(3))
    assert {on_host.state[large][name].device.type for name in compact.STATES} == {"cpu"}
    assert_same_bits(beside, on_host)


@pytest.mark.gpu
def test_gpu_masters_begin_within_the_step():
    weight = every_bfloat16().cuda()
    low = random_low(weight, torch.Generator("cuda").manual_seed(0))
    high, rest = split(join(weight, low), NEAREST)
    assert torch.equal(high.view(torch.int16), weight.view(torch.int16))
    assert torch.equal(rest, low) and low.min() == -128 and low.max() == 127
