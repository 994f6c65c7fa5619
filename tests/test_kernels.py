"""kernels/ against oracles written as loops in float64, and against their own references."""

import sys

import pytest
import torch

from kernels import attention, token_log_probs
from kernels.attention import attention_decode, attention_packed, attention_reference
from kernels.logprob import token_log_probs_reference


def oracle(q, k, v, *, causal, key_lengths=None, cu_seqlens=None):
    """Attention by its definition, one query of one head at a time."""
    B, T, H, D = q.shape
    S, group = k.shape[1], H // k.shape[2]
    rows = []
    for b in range(B):
        keys = S if key_lengths is None else int(key_lengths[b])
        for t in range(T):
            seen = [s for s in range(keys) if not causal or s <= t + keys - T]
            if cu_seqlens is not None:
                borders = cu_seqlens.tolist()
                ((first, last),) = [(i, j) for i, j in zip(borders, borders[1:]) if i <= t < j]
                seen = [s for s in seen if first <= s < last]
            for h in range(H):
                scores = (k[b, seen, h // group] @ q[b, t, h]) * D**-0.5
                rows.append(scores.softmax(0) @ v[b, seen, h // group] if seen else q[b, t, h] * 0)
    return torch.stack(rows).view(B, T, H, D)


def inputs(B, T, S, H, K, D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(B + 10 * T + 100 * S + 1000 * H + K + D)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    ]


def run(function, tensors, **kwargs):
    """Output, and gradients under a fixed upstream gradient."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors, **kwargs)
    upstream = (
        torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    )
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def tensor(*values):
    return torch.tensor(values)


CASES = {  # (B, T, S, H, K, D), mask
    "full": ((2, 5, 5, 4, 2, 8), dict(causal=False)),
    "cross": ((2, 3, 9, 4, 2, 8), dict(causal=False)),
    "causal": ((2, 9, 9, 4, 4, 8), dict(causal=True)),
    "group 7": ((1, 6, 6, 7, 1, 4), dict(causal=True)),
    "group 8": ((2, 6, 6, 16, 2, 4), dict(causal=True)),
    "one token": ((1, 1, 1, 2, 1, 4), dict(causal=True)),
    "causal, few queries": ((2, 3, 10, 7, 1, 4), dict(causal=True)),
    "causal, one query": ((3, 1, 10, 16, 2, 4), dict(causal=True)),
    "causal, more queries than keys": ((1, 6, 4, 2, 1, 4), dict(causal=True)),
    "decode, ragged": ((4, 1, 9, 4, 2, 8), dict(causal=True, key_lengths=tensor(1, 9, 4, 7))),
    "several tokens, ragged": ((3, 4, 9, 7, 1, 4), dict(causal=True, key_lengths=tensor(4, 9, 6))),
    "rows with no key": ((4, 3, 6, 2, 1, 4), dict(causal=True, key_lengths=tensor(0, 1, 2, 6))),
    "key lengths, not causal": (
        (3, 4, 7, 4, 2, 4),
        dict(causal=False, key_lengths=tensor(7, 1, 0)),
    ),
    "packed": ((1, 12, 12, 4, 2, 8), dict(causal=False, cu_seqlens=tensor(0, 4, 8, 12))),
    "packed, ragged and empty": (
        (1, 13, 13, 7, 1, 4),
        dict(causal=False, cu_seqlens=tensor(0, 0, 5, 6, 6, 11, 12, 13, 13)),
    ),
    "packed, causal": ((1, 11, 11, 4, 1, 8), dict(causal=True, cu_seqlens=tensor(0, 3, 4, 11))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("function", [attention, attention_reference])
def test_attention_equals_a_loop(name, function):
    sizes, mask = CASES[name]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        expected = run(oracle, inputs(*sizes), **mask)
        found = run(function, inputs(*sizes, dtype), **mask)
        for one, other in zip(found, expected):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)
        with torch.no_grad():  # takes other paths
            out = function(*inputs(*sizes, dtype), **mask)
        torch.testing.assert_close(out.double(), expected[0], atol=tolerance, rtol=tolerance)


def test_attention_paths_agree_on_long_rows():
    """Beyond 256 tokens the training path is SDPA: same values and gradients as the reference."""
    tensors = inputs(1, 300, 300, 14, 2, 16, torch.float32)
    for one, other in zip(
        run(attention, tensors, causal=True), run(attention_reference, tensors, causal=True)
    ):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_a_query_without_keys_gets_zeros_and_finite_gradients():
    found = run(attention, inputs(2, 3, 5, 4, 2, 8), causal=True, key_lengths=tensor(0, 2))
    assert not found[0][0].any() and not found[0][1, 0].any() and found[0][1, 1:].all()
    assert all(t.isfinite().all() for t in found)


def test_keys_behind_the_length_are_never_read():
    """What a cache holds behind a row's length may be anything: NaN-free garbage of any size."""
    q, k, v = inputs(2, 1, 8, 4, 2, 8)
    lengths = tensor(3, 6)
    out = attention(q, k, v, causal=True, key_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        k[b, n:], v[b, n:] = 1e30, -1e30
    assert torch.equal(out, attention(q, k, v, causal=True, key_lengths=lengths))


def test_attention_gradcheck():
    for name in ("group 7", "several tokens, ragged", "packed, ragged and empty"):
        (B, T, S, H, K, D), mask = CASES[name]
        tensors = [t.requires_grad_() for t in inputs(B, T, S, H, K, 2)]
        assert torch.autograd.gradcheck(lambda *t: attention(*t, **mask), tensors)


def test_neighbours_of_one_length_share_a_call(monkeypatch):
    module, calls = sys.modules["kernels.attention"], []
    original = module.attention

    def attention(q, k, v, **mask):
        calls.append(q.shape[:2])
        return original(q, k, v, **mask)

    monkeypatch.setattr(module, "attention", attention)
    tensors = inputs(1, 20, 20, 2, 2, 4)
    attention_packed(*tensors, tensor(0, 4, 8, 10, 10, 12, 16, 20), causal=False)
    assert calls == [(2, 4), (2, 2), (2, 4)]


def test_attention_bfloat16():
    tensors = inputs(2, 20, 20, 4, 2, 16, torch.bfloat16)
    expected = oracle(*(t.double() for t in tensors), causal=True)
    for function in (attention, attention_reference):
        out = function(*tensors, causal=True)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("heads", [(4, 4), (14, 2), (7, 1)])
def test_decode_equals_the_reference_on_a_cache(dtype, error, heads):
    """Keys as slices of a cache, heads before tokens, whose unused part is filled with anything."""
    H, K = heads
    q = inputs(5, 1, 1, H, K, 16, dtype)[0]
    cache = torch.randn(
        2, 5, K, 40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)
    lengths = tensor(1, 23, 7, 12, 22)
    k, v = cache[:, :, :, :23].transpose(2, 3)
    out = attention_decode(q, k, v, lengths)
    wanted = attention_reference(
        q.double(), k.double(), v.double(), causal=True, key_lengths=lengths
    )
    torch.testing.assert_close(out.double(), wanted, atol=error, rtol=error)
    for b, length in enumerate(lengths.tolist()):
        cache[:, b, :, length:] = 1e30
    assert torch.equal(out, attention_decode(q, k, v, lengths))


def log_prob_oracle(hidden, weight, targets, *, temperature=1.0, masked_ids=None):
    kept = [i for i in range(len(weight)) if masked_ids is None or i not in masked_ids.tolist()]
    log_probs = (hidden @ weight[kept].T / temperature).log_softmax(-1)
    columns = torch.tensor([kept.index(t) for t in targets.tolist()])
    return log_probs[torch.arange(len(targets)), columns], -(log_probs.exp() * log_probs).sum(-1)


def log_prob_inputs(N=11, C=6, V=17, dtype=torch.float64):
    generator = torch.Generator().manual_seed(N + V)
    hidden, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((N, C), (V, C))
    )
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(0, V - 4, (N,), generator=generator),
    )


def use_chunks(monkeypatch, elements: int) -> None:
    """Has the log-probs on a CPU computed in chunks of so many logits, few as they are."""
    module = sys.modules["kernels.logprob"]
    monkeypatch.setattr(module, "SMALL_ELEMENTS", 0)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)


@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 11])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=0.6),
        dict(masked_ids=tensor(13, 14, 16)),
        dict(temperature=1.7, masked_ids=tensor(15)),
    ],
)
def test_token_log_probs_equal_log_softmax(monkeypatch, chunk_rows, options):
    if chunk_rows:
        use_chunks(monkeypatch, chunk_rows * 17 + 3)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        results = []
        for function, kind in ((log_prob_oracle, torch.float64), (token_log_probs, dtype)):
            hidden, weight, targets = log_prob_inputs(dtype=kind)
            outputs = function(hidden, weight, targets, **options)
            upstream = torch.linspace(-1, 2, 11).cos().to(kind)
            results.append([*outputs, *torch.autograd.grad(outputs[0], (hidden, weight), upstream)])
        for expected, found in zip(*results):
            assert found.dtype == dtype
            torch.testing.assert_close(
                found.double(), expected.double(), atol=tolerance, rtol=tolerance
            )


@pytest.mark.parametrize("kernels", ["auto", "sdpa", "triton", "reference"])
@pytest.mark.parametrize("borders", [None, [0], [0, 0], [0, 0, 0]])
def test_attention_of_no_tokens(monkeypatch, kernels, borders):
    monkeypatch.setenv("KERNELS", kernels)
    q, k, v = (torch.zeros(1, 0, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = None if borders is None else torch.tensor(borders)
    out = attention(q, k, v, causal=True, cu_seqlens=cu_seqlens)
    assert out.shape == q.shape
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in (q, k, v))
    no_rows = attention(torch.zeros(0, 3, 4, 16), *[torch.zeros(0, 3, 2, 16)] * 2, causal=True)
    assert no_rows.shape == (0, 3, 4, 16)


@pytest.mark.parametrize("kernels", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(temperature=0.5, masked_ids=tensor(13, 14))])
def test_token_log_probs_of_no_tokens(monkeypatch, kernels, dtype, options):
    """Nothing comes out, and the gradients are zeros: one of several processes may be idle."""
    monkeypatch.setenv("KERNELS", kernels)
    _, weight, _ = log_prob_inputs(dtype=dtype)
    hidden = torch.zeros((0, weight.shape[1]), dtype=dtype, requires_grad=True)
    nothing = token_log_probs(hidden, weight, torch.zeros(0, dtype=torch.long), **options)
    assert [(x.shape, x.dtype) for x in nothing] == [((0,), torch.float32)] * 2
    nothing[0].sum().backward()
    assert hidden.grad.shape == hidden.shape and not weight.grad.any()


@pytest.mark.parametrize("rows", [2, 100])
def test_token_log_probs_of_bfloat16(monkeypatch, rows):
    """From the same numbers in float64: log-probs to float32's rounding, gradients to bfloat16's,
    in chunks of tokens too."""
    use_chunks(monkeypatch, rows * 17)
    narrow = [x.detach().bfloat16().requires_grad_() for x in log_prob_inputs()[:2]]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    targets = log_prob_inputs()[2]
    found, wanted = token_log_probs(*narrow, targets), log_prob_oracle(*wide, targets)
    for one, other in zip(found, wanted):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)
    upstream = torch.linspace(-1, 2, 11).cos()
    found = torch.autograd.grad(found[0], narrow, upstream)
    wanted = torch.autograd.grad(wanted[0], wide, upstream.double())
    for one, other in zip(found, wanted):
        assert one.dtype == torch.bfloat16
        error = 1.6e-2 * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, atol=error, rtol=0)


def test_token_log_probs_of_part_of_the_outputs(monkeypatch):
    """A loss on the log-probs alone, or with frozen weights, has the right gradient in the chunked
    path too."""
    hidden, weight, targets = log_prob_inputs()
    (expected,) = torch.autograd.grad(
        token_log_probs_reference(hidden, weight, targets)[0].sum(), hidden
    )
    use_chunks(monkeypatch, 40)
    (found,) = torch.autograd.grad(
        token_log_probs(hidden, weight.detach(), targets)[0].sum(), hidden
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            token_log_probs(hidden, weight, targets),
            token_log_probs_reference(hidden, weight, targets),
        )


def test_a_masked_id_has_probability_zero():
    hidden, weight, targets = log_prob_inputs()
    log_probs, entropy = token_log_probs(hidden, weight, targets, masked_ids=targets[:1])
    assert log_probs[0] == float("-inf") and log_probs[targets != targets[0]].isfinite().all()
    assert entropy.isfinite().all()


def test_token_log_probs_never_hold_all_logits(monkeypatch):
    """In the chunked path no tensor of N x V values is saved for the backward pass."""
    hidden, weight, targets = log_prob_inputs(N=64, V=50)
    use_chunks(monkeypatch, 50 * 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        token_log_probs(hidden, weight, targets)
    assert max(saved) < 64 * 50 / 4


def test_token_log_probs_gradcheck(monkeypatch):
    use_chunks(monkeypatch, 3 * 7)
    hidden, weight, _ = log_prob_inputs(N=5, C=3, V=7)
    options = dict(temperature=0.8, masked_ids=tensor(5))
    targets = tensor(0, 1, 2, 3, 6)
    assert torch.autograd.gradcheck(
        lambda h, w: token_log_probs(h, w, targets, **options), (hidden, weight)
    )


def test_token_log_probs_bfloat16_are_float32():
    """float32 results; bf16 products: about 3 significant digits."""
    hidden, weight, targets = log_prob_inputs(dtype=torch.bfloat16)
    found = token_log_probs(hidden, weight, targets)
    expected = log_prob_oracle(hidden.double(), weight.double(), targets)
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, atol=0.03, rtol=0.03)
