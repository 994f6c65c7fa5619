"""Packed linear maps against torch's own."""
import sys

import pytest
import torch

from kernels.linear import PackedLinear, can_pack, packed_twin


@pytest.fixture
def pack_all(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.linear"], "SMALLEST", 0)


needs_packing = pytest.mark.skipif(not can_pack(torch.empty(2**18)), reason="this processor or torch cannot pack")


@needs_packing
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (17, 64), (2, 3, 64)])
def test_packed_linear_equals_linear(pack_all, shape, bias, dtype, error):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(64, 50, bias=bias).to(dtype), torch.randn(shape).to(dtype)
    with torch.inference_mode():
        out, wanted = PackedLinear(linear, release=False)(x), linear.double()(x.double())
    assert out.dtype == dtype and out.shape == wanted.shape
    torch.testing.assert_close(out.double(), wanted, atol=error, rtol=error)


@needs_packing
def test_packed_weights_follow_training(pack_all):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    twin, x = packed_twin(model, release=False), torch.randn(5, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for change in (lambda: None, optimizer.step, lambda: model.load_state_dict(
            {key: value + 1 for key, value in model.state_dict().items()}), lambda: model.load_state_dict(
            {key: value * 2 for key, value in model.state_dict().items()}, assign=True)):
        model(x).square().sum().backward()
        change()
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), model(x))
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


@needs_packing
def test_released_weights_are_held_once(pack_all):
    linear, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    with torch.inference_mode():
        wanted = linear(x)
        packed = PackedLinear(linear, release=True)
        assert linear.weight is None
        torch.testing.assert_close(packed(x), wanted)


def test_small_weights_are_left_alone():
    linear = torch.nn.Linear(64, 64)
    assert packed_twin(torch.nn.Sequential(linear), release=True)[0] is linear and linear.weight is not None
