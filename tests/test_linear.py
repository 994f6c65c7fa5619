"""The logits of the head, and linear maps with blocked weights, against torch's own."""

import sys

import pytest
import torch
import torch.nn.functional as F

import tiny
from kernels import sampling_log_probs, token_log_probs
from kernels.linear import BlockedLinear, fast_linears, gains_by_blocks, logits_float32
from model import Qwen2_5_VL

HALVES = [torch.bfloat16, torch.float16]


def random_logits(dtype: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of this shape and a head of 50 rows, for logits of about 16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(dtype)
    weight = (2 * torch.randn(50, shape[-1], generator=generator)).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (0, 64)])
def test_logits_of_16_bits_are_as_exact_as_float32(shape, dtype):
    """And the gradients as exact as 16 bits can be."""
    hidden, weight = random_logits(dtype, *shape)
    logits = logits_float32(hidden, weight)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = wide[0] @ wide[1].T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), wanted, atol=2e-5, rtol=1e-6)

    upstream = torch.linspace(-1, 2, logits.numel()).cos().view(logits.shape)
    logits.backward(upstream)
    wanted.backward(upstream.double())
    for one, other in zip((hidden, weight), wide):
        assert one.grad.dtype == dtype
        if other.grad.numel() > 0:
            error = 8e-3 * other.grad.abs().max().item()
            torch.testing.assert_close(one.grad.double(), other.grad, atol=error, rtol=0)


def test_logits_of_a_frozen_factor():
    hidden, weight = random_logits(torch.bfloat16, 5, 64)
    logits_float32(hidden, weight.detach()).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    hidden.grad = None
    logits_float32(hidden.detach(), weight).sum().backward()
    assert hidden.grad is None and weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_wider_numbers_are_those_of_linear_to_the_bit(dtype):
    hidden, weight = random_logits(dtype, 2, 3, 64)
    assert torch.equal(logits_float32(hidden, weight), F.linear(hidden, weight))


@pytest.mark.parametrize("variant", ["text", "text_tied"])
@pytest.mark.parametrize("blocked", [False, True])
def test_sampler_and_trainer_score_a_bfloat16_state_alike(tmp_path, monkeypatch, variant, blocked):
    """Rounded to bfloat16, logits of about 16 would differ by 0.06."""
    monkeypatch.setattr(sys.modules["kernels.linear"], "SMALLEST", 0 if blocked else 2**40)
    folder = tiny.make_folder(tmp_path, variant)
    model = Qwen2_5_VL.from_pretrained(folder, dtype=torch.bfloat16)
    none = torch.tensor([], dtype=torch.long)
    with torch.inference_mode():
        model.head_weight.mul_(16)
        hidden = model(torch.tensor([tiny.row(0, 20)]))[0]
        targets = torch.arange(20)
        trained, _ = token_log_probs(hidden, model.head_weight, targets)
        logits = fast_linears(model).logits(hidden)
        sampled = sampling_log_probs(logits, masked_ids=none)[targets, targets]
        exact = hidden.double() @ model.head_weight.double().T
    assert logits.dtype == torch.float32 and logits.abs().max() > 16
    exact = exact.log_softmax(-1)[targets, targets]
    torch.testing.assert_close(sampled.double(), exact, atol=5e-5, rtol=1e-6)
    torch.testing.assert_close(trained.double(), exact, atol=5e-5, rtol=1e-6)


@pytest.mark.parametrize("variant", ["text", "text_tied"])
def test_the_head_of_a_twin_is_float32_unless_it_is_only_sampled_from(
    tmp_path, monkeypatch, variant
):
    linear = sys.modules["kernels.linear"]
    monkeypatch.setattr(linear, "gains_by_blocks", lambda weight, dtype: True)
    monkeypatch.setattr(BlockedLinear, "rearrange", lambda self: None)
    folder = tiny.make_folder(tmp_path, variant)
    for release, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        model = Qwen2_5_VL.from_pretrained(folder, dtype=torch.bfloat16)
        twin = fast_linears(model, release=release)
        assert twin.lm_head.dtype == dtype
        assert twin.model.layers[0].mlp.up_proj.dtype == torch.bfloat16


@pytest.fixture
def block_all(monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.linear"], "SMALLEST", 0)


def needs(dtype: torch.dtype) -> pytest.MarkDecorator:
    possible = gains_by_blocks(torch.empty(2**18), dtype)
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
        out = BlockedLinear(linear, dtype)(x)
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
    model = Qwen2_5_VL.from_pretrained(tiny.make_folder(tmp_path, variant))
    ids, names = torch.tensor([tiny.row(0, 20)]), set(model.state_dict())
    with torch.inference_mode():
        wanted = model.logits(model(ids))
        twin = fast_linears(model)
        assert isinstance(twin.lm_head, BlockedLinear) and set(model.state_dict()) == names
        torch.testing.assert_close(twin.logits(twin(ids)), wanted, atol=1e-4, rtol=1e-5)
        released = fast_linears(model, release=True)
        torch.testing.assert_close(released.logits(released(ids)), wanted, atol=1e-4, rtol=1e-5)
