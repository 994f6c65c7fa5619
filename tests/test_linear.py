"""Linear maps with blocked weights against torch's own."""

import sys

import pytest
import torch

from kernels.linear import BlockedLinear, fast_linears, gains_by_blocks


@pytest.fixture
def block_all(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.linear"], "SMALLEST", 0)


def needs(dtype: torch.dtype) -> pytest.MarkDecorator:
    possible = gains_by_blocks(torch.empty(2**18, dtype=dtype))
    return pytest.mark.skipif(not possible, reason=f"no blocked {dtype} on this processor or torch")


@pytest.mark.parametrize(
    "dtype, error",
    [
        pytest.param(torch.float32, 1e-5, marks=needs(torch.float32)),
        pytest.param(torch.bfloat16, 1e-2, marks=needs(torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (17, 64), (2, 3, 64)])
def test_blocked_linear_equals_linear(block_all, shape, bias, dtype, error):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 50, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    with torch.inference_mode():
        out = BlockedLinear(linear)(x)
        wanted = linear.double()(x.double())
    assert out.dtype == dtype and out.shape == wanted.shape
    torch.testing.assert_close(out.double(), wanted, atol=error, rtol=error)


@needs(torch.float32)
def test_blocked_weights_follow_training(block_all):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    twin, x = fast_linears(model), torch.randn(5, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def load(change, **options) -> None:
        state = {key: change(value) for key, value in model.state_dict().items()}
        model.load_state_dict(state, **options)

    for change in (
        lambda: None,
        optimizer.step,
        lambda: load(lambda value: value + 1),
        lambda: load(lambda value: value * 2, assign=True),
    ):
        model(x).square().sum().backward()
        change()
        with torch.inference_mode():
            torch.testing.assert_close(twin(x), model(x))
    assert not any(isinstance(m, BlockedLinear) for m in model.modules())


@needs(torch.float32)
def test_released_weights_are_held_once(block_all):
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(3, 8)
    with torch.inference_mode():
        wanted = model(x)
        twin = fast_linears(model, release=True)
        assert model[0].weight is None
        torch.testing.assert_close(twin(x), wanted)


def test_small_weights_are_left_alone():
    linear = torch.nn.Linear(64, 64)
    twin = fast_linears(torch.nn.Sequential(linear), release=True)
    assert twin[0] is linear and linear.weight is not None


@needs(torch.float32)
@pytest.mark.parametrize("variant", ["text", "text_tied"])
def test_the_twin_of_a_model(block_all, tmp_path, variant):
    """The head is blocked too, tied or not; the model keeps its tree, and its embedding."""
    import tiny
    from model import Qwen2_5_VL

    model = Qwen2_5_VL.from_pretrained(tiny.make_folder(tmp_path, variant))
    ids, names = torch.tensor([tiny.row(0, 20)]), set(model.state_dict())
    with torch.inference_mode():
        wanted = model.logits(model(ids))
        twin = fast_linears(model)
        assert isinstance(twin.lm_head, BlockedLinear) and set(model.state_dict()) == names
        torch.testing.assert_close(twin.logits(twin(ids)), wanted, atol=1e-4, rtol=1e-5)
        released = fast_linears(model, release=True)
        torch.testing.assert_close(released.logits(released(ids)), wanted, atol=1e-4, rtol=1e-5)
