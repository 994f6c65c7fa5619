"""Stage 2: the loss by hand, advantages, KL estimators, rollouts, updates, and whole runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo
import tiny
from data import (
    Example,
    ImageConfig,
    InputError,
    Prompt,
    Tokenizer,
    make_pack,
    make_prompt,
    make_row,
    sequences,
)
from grpo import group_advantages, grpo_loss, kl_penalty
from sample import Completion
from training.metrics import mean_metrics

CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}
METRICS = (
    "step epoch loss lr grad_norm tokens tokens_per_second seconds reward reward_std "
    "zero_std_groups advantage_mean response_length clipped_responses entropy kl ratio_mean "
    "clip_fraction logprob_diff rollout_seconds train_seconds rollout_tokens_per_second"
).split()


def logs(rows: list[list[float]]) -> torch.Tensor:
    """Log-probs of given probabilities, as a leaf."""
    return torch.tensor(rows).log().requires_grad_()


def loss_and_gradient(probs, old, advantages, mask, **options):
    log_probs = logs(probs)
    loss, metrics = grpo_loss(
        log_probs,
        logs(old).detach(),
        torch.tensor(advantages),
        torch.tensor(mask),
        **{**CLIP, **options},
    )
    loss.backward()
    return loss.item(), log_probs.grad, metrics


def random_batch(seed: int = 0, N: int = 6, T: int = 9) -> dict:
    """Stale log-probs, half of them outside the clip range, and rows of different lengths."""
    g = torch.Generator().manual_seed(seed)
    log_probs = -2 * torch.rand(N, T, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(2, T + 1, (N, 1), generator=g)
    mask[1, 0] = False  # a forced id in the middle is masked too
    return {
        "log_probs": log_probs,
        "old_log_probs": log_probs + 0.4 * torch.randn(N, T, generator=g, dtype=torch.float64),
        "ref_log_probs": log_probs + 0.4 * torch.randn(N, T, generator=g, dtype=torch.float64),
        "advantages": torch.randn(N, generator=g, dtype=torch.float64),
        "completion_mask": mask,
    }


# --- grpo_loss, by hand ---


def test_loss_on_policy_by_hand():
    """The ratio is 1: the loss is minus the tokens' mean advantage, a gradient -A / tokens."""
    loss, grad, metrics = loss_and_gradient([[0.5, 0.25]], [[0.5, 0.25]], [2.0], [[True, True]])
    assert loss == pytest.approx(-2.0) and torch.allclose(grad, torch.tensor([[-1.0, -1.0]]))
    assert metrics == pytest.approx({"ratio_mean": 1.0, "clip_fraction": 0.0})


def test_loss_is_a_mean_over_tokens_not_over_responses():
    """3 tokens of advantage 1, 1 token of advantage -3: the token mean is -(3 - 3) / 4 = 0, the
    mean of the responses' means 1."""
    loss, grad, _ = loss_and_gradient(
        [[0.5, 0.5, 0.5], [0.5, 0.9, 0.9]],
        [[0.5, 0.5, 0.5], [0.5, 0.9, 0.9]],
        [1.0, -3.0],
        [[True, True, True], [True, False, False]],
    )
    assert loss == pytest.approx(0.0, abs=1e-6)
    assert torch.allclose(grad, torch.tensor([[-0.25, -0.25, -0.25], [0.75, 0.0, 0.0]]))


def test_loss_with_stale_log_probs_by_hand():
    """Ratios 1.2, 1.4, 0.6 | 1.4, 0.6, advantages 1 | -0.5, range [0.8, 1.28]. Gains per token:
    1.2, min(1.4, 1.28), min(0.6, 0.8) | min(-0.7, -0.64), min(-0.3, -0.4); their sum is 1.98, over
    5 tokens."""
    loss, grad, metrics = loss_and_gradient(
        [[0.6, 0.7, 0.3], [0.7, 0.3, 0.1]],
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.9]],
        [1.0, -0.5],
        [[True, True, True], [True, True, False]],
    )
    assert loss == pytest.approx(-(1.2 + 1.28 + 0.6 - 0.7 - 0.4) / 5)  # -0.396
    assert torch.allclose(grad, torch.tensor([[-0.24, 0.0, -0.12], [0.14, 0.0, 0.0]]), atol=1e-6)
    assert metrics["ratio_mean"] == pytest.approx(1.04) and metrics[
        "clip_fraction"
    ] == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    "ratio, advantage, gradient",
    [
        (1.25, 1.0, -1.25),
        (1.30, 1.0, 0.0),  # above: a good token is not pushed further
        (0.75, 1.0, -0.75),
        (0.85, 1.0, -0.85),  # below: it is still brought back
        (0.85, -1.0, 0.85),
        (0.75, -1.0, 0.0),  # below: a bad token is not pushed further
        (1.25, -1.0, 1.25),
        (1.30, -1.0, 1.30),  # above: it is still brought back
    ],
)
def test_clipping_on_both_sides_of_both_bounds(ratio, advantage, gradient):
    _, grad, metrics = loss_and_gradient([[0.4 * ratio]], [[0.4]], [advantage], [[True]])
    assert grad.item() == pytest.approx(gradient, rel=1e-5)
    assert metrics["clip_fraction"] == float(gradient == 0.0)


def test_clip_higher_moves_only_the_upper_bound():
    for ratio, symmetric, higher in ((1.25, 0.0, -1.25), (1.19, -1.19, -1.19)):
        for eps_high, wanted in ((0.2, symmetric), (0.28, higher)):
            grad = loss_and_gradient(
                [[0.4 * ratio]], [[0.4]], [1.0], [[True]], clip_eps_high=eps_high
            )[1]
            assert grad.item() == pytest.approx(wanted, rel=1e-5)
    for eps_high in (0.2, 0.28):  # the lower bound stays at 0.8
        assert (
            loss_and_gradient([[0.4 * 0.79]], [[0.4]], [-1.0], [[True]], clip_eps_high=eps_high)[
                1
            ].item()
            == 0.0
        )


def test_a_step_raises_good_tokens_and_lowers_bad_ones():
    logits = torch.zeros(2, 5, requires_grad=True)
    log_probs = logits.log_softmax(-1)[:, :1]  # each response is the one token 0
    loss, _ = grpo_loss(
        log_probs,
        log_probs.detach(),
        torch.tensor([1.0, -1.0]),
        torch.ones(2, 1, dtype=torch.bool),
        **CLIP,
    )
    loss.backward()
    after = (logits - 0.1 * logits.grad).softmax(-1)[:, 0]
    assert after[0] > 0.2 > after[1]


def test_groups_without_spread_count_in_the_denominator():
    advantages = group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).flatten()
    probs = [[0.5, 0.5]] * 4
    loss, grad, _ = loss_and_gradient(
        probs, probs, advantages.tolist(), [[True, False], [True, True], [True, True], [True, True]]
    )
    a = 0.5**0.5
    assert loss == pytest.approx((-1 * a + 2 * a) / 7)
    assert torch.allclose(grad, torch.tensor([[-a, 0.0], [a, a], [0.0, 0.0], [0.0, 0.0]]) / 7)


def test_everything_masked_is_zero_loss_and_zero_gradient():
    loss, grad, metrics = loss_and_gradient([[0.5, 0.2]], [[0.1, 0.9]], [1.0], [[False, False]])
    assert loss == 0.0 and not grad.any() and all(value == 0.0 for value in metrics.values())
    loss, grad, _ = loss_and_gradient(
        [[0.5, 0.2]], [[0.1, 0.9]], [1.0], [[False, False]], num_tokens=0
    )
    assert loss == 0.0 and not grad.any()


@pytest.mark.parametrize("bad", [float("-inf"), float("inf"), float("nan"), -1e30, 200.0])
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_values_at_masked_positions_do_not_leak(bad, kl_type):
    batch = random_batch()
    hidden = ~batch["completion_mask"]
    names = ("log_probs", "old_log_probs", "ref_log_probs")
    results = []
    for subset in ((), names, names[:1], names[1:2], names[2:]):
        spoilt = {
            k: v.masked_fill(hidden, bad) if k in subset else v.clone() for k, v in batch.items()
        }
        spoilt["log_probs"].requires_grad_()
        loss, metrics = grpo_loss(**spoilt, **CLIP, kl_coef=0.5, kl_type=kl_type)
        loss.backward()
        assert not spoilt["log_probs"].grad[hidden].any()
        results.append((loss.item(), metrics, spoilt["log_probs"].grad))
    assert all(
        loss == results[0][0] and m == results[0][1] and torch.equal(g, results[0][2])
        for loss, m, g in results[1:]
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_metrics_and_gradient_do_not_depend_on_micro_batches(size):
    batch = random_batch()
    batch["log_probs"].requires_grad_()
    whole, metrics = grpo_loss(**batch, **CLIP, kl_coef=0.1)
    (wanted,) = torch.autograd.grad(whole, batch["log_probs"])
    parts = [
        grpo_loss(
            **{k: v[i : i + size] for k, v in batch.items()},
            **CLIP,
            kl_coef=0.1,
            num_tokens=batch["completion_mask"].sum(),
        )
        for i in range(0, 6, size)
    ]
    loss = sum(p[0] for p in parts)
    (found,) = torch.autograd.grad(loss, batch["log_probs"])
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12) and torch.allclose(
        found, wanted, rtol=1e-12, atol=0
    )
    assert {k: sum(p[1][k] for p in parts) for k in metrics} == pytest.approx(metrics, rel=1e-12)
    assert (
        metrics.keys() == {"ratio_mean", "clip_fraction", "kl"} and 0 < metrics["clip_fraction"] < 1
    )


def test_mask_may_be_of_numbers():
    batch = random_batch()
    wanted, _ = grpo_loss(**batch, **CLIP)
    assert (
        grpo_loss(**{**batch, "completion_mask": batch["completion_mask"].long()}, **CLIP)[0]
        == wanted
    )


# --- The KL penalty ---


@pytest.mark.parametrize(
    "kl_type, value, gradient",
    [("k1", 0.6931472, 1.0), ("k2", 0.2402265, 0.6931472), ("k3", 0.1931472, 0.5)],
)
def test_kl_estimators_by_hand(kl_type, value, gradient):
    """p = 1/2, r = 1/4: k1 = log p/r = log 2; k2 = log^2 2 / 2; k3 = 1/2 - 1 + log 2. Their
    derivatives by log p: 1; log 2; 1 - r/p."""
    log_probs, ref = logs([[0.5, 0.5]]), logs([[0.25, 0.25]]).detach()
    loss, metrics = grpo_loss(
        log_probs,
        log_probs.detach(),
        torch.zeros(1),
        torch.tensor([[True, False]]),
        **CLIP,
        kl_coef=0.1,
        ref_log_probs=ref,
        kl_type=kl_type,
    )
    loss.backward()
    assert metrics["kl"] == pytest.approx(value) and loss.item() == pytest.approx(0.1 * value)
    assert torch.allclose(log_probs.grad, torch.tensor([[0.1 * gradient, 0.0]]))


def expected_gradient(
    kl_type: str, logits: torch.Tensor, ref: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Exactly, over all actions sampled from the policy: the estimator's gradient as a loss, and
    its value."""
    leaf = logits.clone().requires_grad_()
    log_probs = leaf.log_softmax(-1)
    penalty = (log_probs.detach().exp() * kl_penalty(log_probs, ref.log_softmax(-1), kl_type)).sum()
    (gradient,) = torch.autograd.grad(penalty, leaf)
    return gradient, penalty.item()


def test_expected_gradients_of_the_kl_estimators():
    g = torch.Generator().manual_seed(1)
    logits, ref = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(2))
    leaf = logits.clone().requires_grad_()
    log_p, log_r = leaf.log_softmax(-1), ref.log_softmax(-1)
    reverse, forward = (log_p.exp() * (log_p - log_r)).sum(), (log_r.exp() * (log_r - log_p)).sum()
    (reverse_gradient,) = torch.autograd.grad(reverse, leaf, retain_graph=True)
    (forward_gradient,) = torch.autograd.grad(forward, leaf)
    assert (
        reverse_gradient - forward_gradient
    ).abs().max() > 0.05  # they differ: the test can tell them apart
    gradient, value = expected_gradient("k1", logits, ref)
    assert gradient.abs().max() < 1e-15 and value == pytest.approx(
        reverse.item()
    )  # right value, no gradient
    assert torch.allclose(expected_gradient("k2", logits, ref)[0], reverse_gradient)
    gradient, value = expected_gradient("k3", logits, ref)
    assert torch.allclose(gradient, forward_gradient) and value == pytest.approx(reverse.item())


def test_k3_is_never_negative_and_stays_finite():
    log_probs, ref = torch.tensor([-100.0, -1.0, 0.0]), torch.tensor([0.0, -1.0, -100.0])
    penalty = kl_penalty(log_probs, ref, "k3")
    assert penalty.isfinite().all() and (penalty >= 0).all() and penalty[1] == 0


def test_kl_needs_its_reference_and_zero_weight_needs_none():
    log_probs, mask = logs([[0.5]]), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(
        ValueError, match="ref_log_probs"
    ):  # a coefficient that does nothing would go unseen
        grpo_loss(log_probs, log_probs.detach(), torch.ones(1), mask, **CLIP, kl_coef=0.1)
    assert "kl" not in grpo_loss(log_probs, log_probs.detach(), torch.ones(1), mask, **CLIP)[1]


# --- Advantages ---


def test_group_advantages_by_hand():
    """Each group by itself: mean 1/4, deviations 3/4 and -1/4 (x 3), variance (9 + 3) / 16 / 3 =
    1/4, so std 1/2."""
    found = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]))
    a = 0.5 / (1 / 3) ** 0.5
    assert torch.allclose(found, torch.tensor([[1.5, -0.5, -0.5, -0.5], [a, a, -a, -a]]))
    found = group_advantages(
        torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]), normalize_std=False
    )
    assert torch.equal(found, torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]]))


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1 / 3])
def test_equal_rewards_give_exactly_zero(reward, normalize_std):
    for shape in (
        (1, 2),
        (1, 3),
        (1, 7),
        (1, 8),
        (2, 8),
    ):  # 0.1 is no binary fraction: its mean differs from it by rounding
        found = group_advantages(torch.full(shape, reward), normalize_std=normalize_std)
        assert torch.equal(found, torch.zeros(shape))


# --- Rollouts and updates ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"), "vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rl.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "id": f"q{i}",
                    "question": "the " * i + f"sum of {i} and {i}",
                    "answer": str(2 * i),
                }
            )
            + "\n"
            for i in range(1, 6)
        )
    )
    return path


@pytest.fixture
def options(folder, data, tmp_path):
    """Makes options for a run in the test's own folder."""

    def make(**changes) -> grpo.GRPOOptions:
        return grpo.GRPOOptions(
            **{
                "model": str(folder),
                "data": str(data),
                "out": str(tmp_path / "run"),
                "device": "cpu",
                "questions_per_step": 2,
                "group_size": 3,
                "max_new_tokens": 6,
                "max_steps": 3,
                **changes,
            }
        )

    return make


@pytest.fixture
def rewarded(monkeypatch):
    """About half of the responses are right."""
    monkeypatch.setattr(
        grpo, "accuracy_reward", lambda response, *_, **__: sum(map(ord, response)) % 2.0
    )


def metrics(o: grpo.GRPOOptions, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(o.out) / name).read_text().splitlines()]


def make_trainer(o: grpo.GRPOOptions) -> tuple[grpo.Trainer, list[grpo.Question]]:
    tokenizer = Tokenizer.from_pretrained(o.model)
    return grpo.Trainer(o, tokenizer), grpo.load_questions(o, tokenizer)


def rollout(
    trainer: grpo.Trainer, questions: list[grpo.Question], number: int = 0
) -> tuple[list[grpo.Response], dict, list[dict]]:
    """A step without its update: the responses to learn from, its metrics and records."""
    seen, update = [], trainer.update
    trainer.update = lambda responses, learning_rate: seen.extend(responses) or {}
    metrics, records = trainer.step(questions, number, 1e-3)
    trainer.update = update
    return seen, metrics, records


def naive_log_probs(trainer: grpo.Trainer, ids: list[int], temperature: float) -> torch.Tensor:
    """Of every id given those before, by one full log-softmax [T]; entry 0 is 0."""
    logits = trainer.model.logits(trainer.model(torch.tensor([ids])))[0].clone()
    logits[:, trainer.masked_ids] = float("-inf")
    log_probs = (logits / temperature).log_softmax(-1)
    following = torch.tensor(ids[1:])[:, None]
    return torch.cat((torch.zeros(1), log_probs[:-1].gather(1, following)[:, 0]))


def completion(ids: list[int], forced: list[int] = ()) -> Completion:
    return Completion(ids, [-0.5] * len(ids), [i in forced for i in range(len(ids))], "", "stop")


def respond(prompt: list[int], ids: list[int], advantage: float = 0.0, forced: list[int] = ()):
    return grpo.make_response(Prompt(prompt), completion(ids, forced), advantage)


def one_pack(responses: list[grpo.Response]) -> grpo.ResponsePack:
    (pack,) = grpo.make_response_packs(responses, 10**6)
    return pack


def test_scores_equal_a_full_log_softmax(options):
    trainer, _ = make_trainer(options(temperature=0.7))
    pairs = [(tiny.row(1, 5), tiny.row(3, 4)), (tiny.row(2, 9), tiny.row(4, 2))]
    responses = [respond(prompt, ids) for prompt, ids in pairs]
    found, entropy = trainer.score(trainer.model, one_pack(responses).pack)
    wanted = [naive_log_probs(trainer, prompt + ids, 0.7)[len(prompt) :] for prompt, ids in pairs]
    wanted = torch.cat(wanted)
    assert found.shape == wanted.shape == (6,) and torch.allclose(found, wanted, atol=1e-5)
    assert 0 < entropy.sum().item() < 6 * math.log(tiny.VOCAB_ROWS) and not entropy.requires_grad


def test_one_token_completion_is_scored_where_it_stands(options):
    trainer, _ = make_trainer(options())
    prompt, token = tiny.row(1, 7), 42
    response = respond(prompt, [token])
    found, _ = trainer.score(trainer.model, one_pack([response]).pack)
    # Its distribution is the one behind the prompt's last token.
    logits = trainer.model.logits(trainer.model(torch.tensor([prompt])))[0, -1].clone()
    logits[trainer.masked_ids] = float("-inf")
    assert found.tolist() == pytest.approx([logits.log_softmax(-1)[token].item()], abs=1e-5)
    assert response.row.scored.tolist() == [False] * 7 + [True]


def test_stop_tokens_are_scored_and_forced_ids_are_not():
    ids = tiny.special_ids()
    end = ids["endoftext"]
    o, x = True, False
    response = respond([1, end], [5, ids["im_end"]])
    assert response.row.scored.tolist() == [x, x, o, o]
    assert response.row.ids.tolist() == [1, end, 5, ids["im_end"]]
    assert respond([1, end], [6, end]).row.scored.tolist() == [x, x, o, o]
    response = respond([1, 2, 3], [7, 8, 9, 10], forced=[1, 2])
    assert response.row.scored.tolist() == [x, x, x, o, x, x, o]
    assert response.row.ids.tolist() == [1, 2, 3, 7, 8, 9, 10]
    assert response.sampler_log_probs.tolist() == [-0.5, -0.5]


def test_packs_hold_each_response_with_its_advantage():
    responses = [
        respond([1], [2, 3], 1.0),
        respond([4, 5], [6, 7, 8], -2.0, forced=[1]),
        respond([9], [10], 3.0),
    ]
    responses[1].sampler_log_probs = torch.tensor([-0.1, -0.2])
    second, first = grpo.make_response_packs(responses, 7)
    assert first.pack.input_ids.tolist() == [[4, 5, 6, 7, 8, 9, 10]]
    assert first.pack.cu_seqlens.tolist() == [0, 5, 7]
    assert first.pack.position_ids[0].tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert first.pack.targets.tolist() == [2, 4, 6]
    assert first.advantages.tolist() == [-2.0, -2.0, 3.0]
    assert first.sampler_log_probs.tolist() == pytest.approx([-0.1, -0.2, -0.5])
    assert second.pack.input_ids.tolist() == [[1, 2, 3]] and second.advantages.tolist() == [1, 1]


def test_responses_to_one_question_share_its_tokens():
    responses = [
        respond([1, 2, 3], [4, 5, 6], 1.0),
        respond([1, 2, 3], [4, 7], -1.0),  # and their first token, too
        respond([1, 2, 3], [8], -2.0),
        respond([1, 9], [3, 3], 3.0),
    ]
    [part] = grpo.make_response_packs(responses, 100)
    pack = part.pack
    assert pack.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 3]]
    assert pack.position_ids[0].tolist() == [[0, 1, 2, 3, 4, 5, 4, 3, 1, 2, 3]]
    assert pack.cu_seqlens.tolist() == [0, 6, 11, 15, 19]
    in_full = [0, 1, 2, 3, 4, 5] + [0, 1, 2, 3, 6] + [0, 1, 2, 7] + [0, 8, 9, 10]
    assert pack.in_full.tolist() == in_full
    assert pack.first.tolist() == [0, 1, 2, 3, 4, 5, 10, 14, 16, 17, 18]
    assert pack.targets.tolist() == [3, 4, 5, 3, 6, 7, 9, 10]
    assert pack.sources.tolist() == [2, 3, 4, 2, 3, 2, 8, 9]
    assert part.advantages.tolist() == [1.0] * 3 + [-1.0] * 2 + [-2.0] + [3.0] * 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_shared_prefixes_change_nothing(options, checkpointed, monkeypatch):
    """Log-probs, entropies and every weight's gradient are those of rows that share nothing."""
    trainer, _ = make_trainer(options(checkpointing="on" if checkpointed else "off"))
    model = trainer.model.double()
    prompts = [tiny.row(1, 12), tiny.row(2, 7)]
    answers = [tiny.row(seed, 3 + seed) for seed in range(3, 7)]
    rows = [
        make_row(prompt + ids, [False] * len(prompt) + [True] * len(ids))
        for prompt in prompts
        for ids in answers + [answers[0][:2]]  # a beginning of another, and all of it shared
    ]
    found = {}
    for share in (False, True):
        if not share:
            monkeypatch.setattr(sequences, "common_prefix", lambda a, b: 0)
        pack = make_pack(rows)
        monkeypatch.undo()
        log_probs, entropy = trainer.score(model, pack)
        weights = torch.linspace(-1, 2, len(log_probs), dtype=torch.float64)
        (log_probs * weights + entropy).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found[share] = (log_probs.detach(), entropy.detach(), gradients, pack)
    assert found[True][3].input_ids.shape[1] < 0.7 * found[False][3].input_ids.shape[1]
    assert torch.allclose(found[True][0], found[False][0], rtol=0, atol=1e-10)
    assert torch.allclose(found[True][1], found[False][1], rtol=0, atol=1e-10)
    assert found[True][2].keys() == found[False][2].keys() and len(found[True][2]) > 20
    for name, wanted in found[False][2].items():
        assert (found[True][2][name] - wanted).abs().max() <= 1e-9 * wanted.abs().max(), name


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree_on_log_probs(options, rewarded, temperature):
    o = options(temperature=temperature, max_new_tokens=12, group_size=4, questions_per_step=4)
    trainer, questions = make_trainer(o)
    responses, _, _ = rollout(trainer, questions[:4])
    part = one_pack(responses)
    found, _ = trainer.score(trainer.model, part.pack)
    assert len(found) > 60 and (found - part.sampler_log_probs).abs().max() < 1e-5
    result = trainer.update(responses, 1e-5)
    assert result["logprob_diff"] <= result["logprob_diff_max"] < 1e-5
    wrong, _, _ = rollout(trainer, questions[:2], 1)
    for response in wrong:  # the metric does see a difference
        response.sampler_log_probs = response.sampler_log_probs * 1.1
    assert trainer.update(wrong, 1e-5)["logprob_diff"] > 0.1


def gradient(
    trainer: grpo.Trainer, responses: list[grpo.Response], pack_tokens: int, monkeypatch
) -> tuple[dict[str, torch.Tensor], dict]:
    """The gradient that update hands to the optimiser, and its metrics."""
    out = {}

    def catch(model, *_):
        for name, p in model.named_parameters():
            if p.grad is not None:
                out[name] = p.grad.clone()
        model.zero_grad()
        return 0.0

    monkeypatch.setattr(grpo, "optimizer_step", catch)
    trainer.options.pack_tokens = pack_tokens
    return out, trainer.update(responses, 1e-3)


def test_update_does_not_depend_on_packs(options, rewarded, monkeypatch):
    trainer, questions = make_trainer(options(kl_coef=0.1, group_size=8))
    responses, _, _ = rollout(trainer, questions[:2])
    assert any(response.advantage for response in responses)
    trainer.model.double()
    trainer.reference.double()
    with torch.no_grad():
        trainer.reference.lm_head.weight.mul_(0.9)  # else the KL term is zero
    for response in responses:
        response.sampler_log_probs = response.sampler_log_probs.double()
    wanted, wanted_metrics = gradient(trainer, responses, 10**6, monkeypatch)
    assert wanted_metrics["kl"] > 1e-3
    for pack_tokens in (1, 200):
        found, found_metrics = gradient(trainer, responses, pack_tokens, monkeypatch)
        assert found_metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-7)
        assert found.keys() == wanted.keys()
        assert not any(name.startswith("visual") for name in found)
        for name, value in wanted.items():
            assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


def test_recomputed_old_log_probs_give_the_same_gradient(options, rewarded):
    trainer, questions = make_trainer(options())
    responses, _, _ = rollout(trainer, questions[:2])
    assert any(response.advantage for response in responses)
    part, found = one_pack(responses), []
    for old in (None, trainer.score(trainer.model, part.pack)[0].detach()):
        part.old_log_probs = old
        trainer.accumulate(part, len(part.advantages))
        grads = trainer.model.named_parameters()
        found.append({name: p.grad.clone() for name, p in grads if p.grad is not None})
        trainer.model.zero_grad()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, value in found[0].items():
        assert (found[1][name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_responses_without_advantage_are_not_run_and_the_gradient_stays(
    options, rewarded, monkeypatch
):
    trainer, questions = make_trainer(options(group_size=8))
    responses, _, _ = rollout(trainer, questions[:2])
    for response in responses[:8]:
        response.advantage = 0.0  # a group whose responses were all right
    assert any(response.advantage for response in responses[8:])
    everything = one_pack(responses)
    trainer.accumulate(everything, len(everything.advantages))
    grads = trainer.model.named_parameters()
    wanted = {name: p.grad.clone() for name, p in grads if p.grad is not None}
    trainer.model.zero_grad()
    run, accumulate = [], trainer.accumulate
    monkeypatch.setattr(
        trainer, "accumulate", lambda part, n: run.append(part) or accumulate(part, n)
    )
    found, metrics = gradient(trainer, responses, 10**6, monkeypatch)
    learning = [response for response in responses if response.advantage != 0]
    assert [len(part.pack.cu_seqlens) - 1 for part in run] == [len(learning)]
    assert found.keys() == wanted.keys() and len(wanted) > 20
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert metrics["ratio_mean"] == pytest.approx(1.0) and metrics["entropy"] > 0.1


def test_a_step_without_advantages_changes_nothing(options, rewarded):
    trainer, questions = make_trainer(options(group_size=8, weight_decay=0.1))
    responses, _, _ = rollout(trainer, questions[:2])
    trainer.update(responses, 1e-3)  # so that Adam has moments, which would move the weights

    def everything():
        moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
        return [x.clone() for x in [*trainer.model.parameters(), *moments]]

    before = everything()
    for response in responses:
        response.advantage = 0.0
    metrics = trainer.update(responses, 1e-3)
    assert len(before) > 60 and all(torch.equal(a, b) for a, b in zip(before, everything()))
    assert metrics["grad_norm"] == metrics["loss"] == 0.0 and metrics["entropy"] is None


def test_several_updates_per_rollout(options, rewarded, monkeypatch):
    trainer, questions = make_trainer(options(updates_per_rollout=2, group_size=8))
    responses, _, _ = rollout(trainer, questions[:2])
    for i, response in enumerate(responses):
        response.advantage = 1.0 - i % 3  # also 0: a reference would have to be there to run it
    steps, parts = [], []
    original, accumulate = grpo.optimizer_step, trainer.accumulate
    monkeypatch.setattr(
        grpo, "optimizer_step", lambda *args: steps.append(len(parts)) or original(*args)
    )
    monkeypatch.setattr(
        trainer,
        "accumulate",
        lambda part, n: parts.append((part, accumulate(part, n))) or parts[-1][1],
    )
    trainer.update(responses, 1e-2)
    assert steps == [1, 2]  # a step after each half
    (first, m1), (second, m2) = parts
    found = sorted(torch.cat((first.advantages, second.advantages)).tolist())
    wanted = [r.advantage for r in responses for _ in r.sampler_log_probs if r.advantage]
    assert found == sorted(wanted)
    # The first half is run by the policy that sampled; the second one step later.
    assert m1["ratio_mean"] / len(first.advantages) == pytest.approx(1.0, abs=1e-5)
    assert abs(m2["ratio_mean"] / len(second.advantages) - 1.0) > 1e-3
    # Sampler against trainer is about the old policy, so this says nothing about the step.
    assert m2["logprob_diff"] / len(second.advantages) < 1e-5


@pytest.mark.parametrize(
    "count, updates, sizes", [(9, 4, [2, 2, 2, 3]), (6, 2, [3, 3]), (2, 5, [1, 1])]
)
def test_shares_are_even(count, updates, sizes):
    responses = [respond([1], [2], float(i)) for i in range(count)]
    shares = grpo.split_evenly(responses, updates)
    assert [len(share) for share in shares] == sizes
    assert [r.advantage for share in shares for r in share] == list(range(count))


def test_empty_completions_single_rows_and_nothing_to_learn_do_not_crash(options):
    for kl_coef, pack_tokens in ((0.0, 1), (0.1, 4)):
        trainer, _ = make_trainer(options(pack_tokens=pack_tokens, kl_coef=kl_coef))
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        empty = respond([1, 2, 3], [], 1.0)
        forced = respond([1, 2, 3], [5, 6], 1.0, forced=[0, 1])
        for responses in ([empty], [forced], [empty, empty]):
            result = trainer.update(responses, 1e-2)
            assert result["loss"] == 0.0 and result["grad_norm"] == 0.0
        for name, p in trainer.model.named_parameters():
            assert torch.equal(p, before[name])
        result = trainer.update([empty, respond([1, 2, 3], [5], 2.0)], 1e-2)
        assert result["loss"] == pytest.approx(-2.0)
        assert math.isfinite(result["grad_norm"]) and result["grad_norm"] > 0


def test_options_reach_the_loss(options, rewarded, monkeypatch):
    wanted = {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "kl_coef": 0.02, "kl_type": "k2"}
    trainer, questions = make_trainer(options(**wanted))
    seen, original = [], grpo.grpo_loss
    monkeypatch.setattr(
        grpo, "grpo_loss", lambda *args, **rest: seen.append(rest) or original(*args, **rest)
    )
    trainer.step(questions[:1], 0, 1e-3)
    assert {key: seen[0][key] for key in wanted} == wanted
    assert seen[0]["ref_log_probs"] is not None


def test_no_reference_without_kl_and_a_frozen_one_with_it(options):
    assert make_trainer(options())[0].reference is None
    trainer, _ = make_trainer(options(kl_coef=0.01))
    assert not any(p.requires_grad for p in trainer.reference.parameters())
    assert trainer.reference.head_weight is not trainer.model.head_weight


def test_questions_with_images_or_too_long_are_refused(options, folder, tmp_path):
    path, tokenizer = tmp_path / "bad.jsonl", Tokenizer.from_pretrained(folder)
    path.write_text(
        json.dumps({"id": "x", "question": "q", "answer": "1", "image": "cat.png"}) + "\n"
    )
    with pytest.raises(InputError, match="x has an image"):
        grpo.load_questions(options(data=str(path)), tokenizer)
    with pytest.raises(InputError, match="the prompt is over 5 tokens"):
        grpo.load_questions(options(max_prompt_tokens=5), tokenizer)


def test_over_long_questions_are_dropped_and_counted(options, folder, tmp_path, capsys):
    path, tokenizer = tmp_path / "long.jsonl", Tokenizer.from_pretrained(folder)
    texts = ["short?", "a longer one?", "?" * 600]  # the last is over the context
    records = [{"id": text[:3], "question": text, "answer": 1, "x": "y"} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lengths = [len(make_prompt(text, [], tokenizer, ImageConfig()).ids) for text in texts]
    for limit, kept in ((None, 2), (lengths[1], 2), (lengths[1] - 1, 1), (10_000, 2)):
        o = options(data=str(path), max_prompt_tokens=limit)
        questions = grpo.load_questions(o, tokenizer)
        assert [q.example.question for q in questions] == texts[:kept]
        assert [len(q.prompt.ids) for q in questions] == lengths[:kept]
        assert not questions[0].example.meta
        bound = min(limit or 511, 511)
        message = f"{3 - kept} of 3 examples dropped: the prompt is over {bound} tokens"
        assert message in capsys.readouterr().err


def test_bad_records_are_left_out_if_asked(options, folder, tmp_path, capsys):
    path, tokenizer = tmp_path / "bad.jsonl", Tokenizer.from_pretrained(folder)
    path.write_text(
        '{"question": "q", "answer": 1}\n{"question": "q"}\n'
        '{"question": "q", "answer": 1, "image": "x"}\n['
    )
    with pytest.raises(InputError, match="bad.jsonl: line 2: field 'answer' is missing"):
        grpo.load_questions(options(data=str(path)), tokenizer)
    o = options(data=str(path), skip_bad_lines=True)
    assert len(grpo.load_questions(o, tokenizer)) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"{path}: 3 bad records left out\n")
    assert "question bad-3 has an image" in err and "line 4" in err


def scripted(trainer: grpo.Trainer, monkeypatch, groups: list[list[str]]) -> None:
    """Has the sampler give these texts."""
    completions = [[Completion([5], [-1.0], [False], text, "stop") for text in g] for g in groups]
    monkeypatch.setattr("sample.Sampler.generate", lambda *_, **__: completions)


def test_reward_knows_every_right_answer_and_its_precision(options, monkeypatch):
    """Any accepted answer counts, and a number to the decimals that the record names."""
    trainer, _ = make_trainer(options(group_size=2))
    examples = [Example("x", "q", "six", accepted=["7"]), Example("y", "q", "2.35", precision=1)]
    answers = [["7", "8"], ["2.4", "2.3"]]
    texts = [[f"<answer>{answer}</answer>" for answer in group] for group in answers]
    scripted(trainer, monkeypatch, texts)
    questions = [grpo.Question(example, Prompt([1, 2])) for example in examples]
    _, _, records = rollout(trainer, questions)
    assert [r["reward"] for r in records] == [1.0, 0.0, 1.0, 0.0]


# --- Whole runs ---


def test_run_writes_metrics_samples_and_warms_up(options, rewarded):
    o = options(epochs=4, max_steps=10, learning_rate=1e-3, warmup_ratio=0.4)
    grpo.train(o)
    found = metrics(o)
    assert all(set(METRICS) <= m.keys() for m in found) and [m["step"] for m in found] == list(
        range(1, 11)
    )
    assert [m["lr"] for m in found] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3] + [1e-3] * 7)
    assert [m["epoch"] for m in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    samples = metrics(o, "samples.jsonl")
    assert len(samples) == sum(
        [6, 6, 3] * 3 + [6]
    )  # 5 questions: the third rollout of an epoch has only one
    assert set(samples[0]) == {
        "step",
        "id",
        "question",
        "response",
        "extracted",
        "answer",
        "reward",
        "finish_reason",
    }
    for m in found:
        group = [s for s in samples if s["step"] == m["step"]]
        assert m["reward"] == pytest.approx(sum(s["reward"] for s in group) / len(group))
        assert m["clipped_responses"] == pytest.approx(
            sum(s["finish_reason"] == "length" for s in group) / len(group)
        )
        if m["entropy"] is None:  # no group had an advantage: nothing was run
            assert m["zero_std_groups"] == 1.0 and m["grad_norm"] == 0.0
            continue
        assert m["ratio_mean"] == pytest.approx(1.0) and m["clip_fraction"] == 0.0
        assert m["logprob_diff"] < 1e-5
    assert all(s["question"].endswith(f"sum of {s['id'][1:]} and {s['id'][1:]}") for s in samples)
    assert all(s["reward"] == sum(map(ord, s["response"])) % 2 for s in samples)
    first = [s for s in samples if s["step"] == 1]
    assert (
        len({s["id"] for s in first}) == 2 and len({s["response"] for s in first}) == 6
    )  # n different samples each


def test_a_rollout_is_a_function_of_seed_and_step(options):
    trainer, questions = make_trainer(options())
    texts = []
    for step in (4, 4, 5):
        _, _, records = rollout(trainer, questions[:1], step)
        texts.append([r["response"] for r in records])
    assert texts[0] == texts[1] and not set(texts[1]) & set(
        texts[2]
    )  # resumed runs repeat it, later epochs sample anew


def test_samples_record_what_was_extracted(options, monkeypatch):
    trainer, questions = make_trainer(options())
    answer = "<think>so</think><answer>{}</answer>"
    scripted(trainer, monkeypatch, [[answer.format(4), "no answer", answer.format("4.0")]])
    responses, found, records = rollout(trainer, questions[1:2], 6)
    assert [r["extracted"] for r in records] == ["4", None, "4.0"]
    assert [r["reward"] for r in records] == [1.0, 0.0, 1.0]
    assert (records[0]["answer"], records[0]["step"], records[0]["id"]) == ("4", 7, "q2")
    assert found["reward"] == pytest.approx(2 / 3) and found["zero_std_groups"] == 0.0
    assert found["response_length"] == 1.0
    assert found["reward_std"] == pytest.approx((1 / 3) ** 0.5)
    assert found["advantage_mean"] == pytest.approx(0.0, abs=1e-6)
    wanted = [1 / 3**0.5, -2 / 3**0.5, 1 / 3**0.5]
    assert [r.advantage for r in responses] == pytest.approx(wanted)

    texts = [answer.format("B: four"), answer.format("A"), answer.format("four")]
    scripted(trainer, monkeypatch, [texts])
    trainer.options.normalize_std = False
    questions[1].example.answer = "B"
    questions[1].example.options = {"A": "five", "B": "four"}
    responses, _, records = rollout(trainer, questions[1:2], 6)
    assert [r["reward"] for r in records] == [1.0, 0.0, 1.0]
    assert [r.advantage for r in responses] == pytest.approx([1 / 3, -2 / 3, 1 / 3])


def test_reward_rises(options, monkeypatch):
    """Responses with an "e" in them are right: from one in six at the start to nearly all."""
    monkeypatch.setattr(grpo, "accuracy_reward", lambda response, *_, **__: float("e" in response))
    o = options(
        epochs=100,
        max_steps=20,
        questions_per_step=5,
        group_size=8,
        max_new_tokens=8,
        learning_rate=3e-3,
    )
    grpo.train(o)
    rewards = [m["reward"] for m in metrics(o)]
    assert sum(rewards[:2]) / 2 < 0.3 and sum(rewards[-5:]) / 5 > 0.9, rewards


def test_resumed_run_equals_an_uninterrupted_one(options, rewarded, tmp_path, monkeypatch):
    settings = {"max_steps": 5, "epochs": 3, "save_every": 2, "learning_rate": 1e-3, "kl_coef": 0.1}
    whole, broken = options(**settings), options(**settings, out=str(tmp_path / "broken"))
    grpo.train(whole)
    original, count = grpo.Trainer.update, iter(range(100))

    def stop_in_the_fourth(*args):
        if next(count) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(grpo.Trainer, "update", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(broken)
    assert len(metrics(broken)) == 3
    monkeypatch.setattr(grpo.Trainer, "update", original)
    grpo.train(options(**settings, out=broken.out, resume=True))
    assert metrics(broken, "samples.jsonl") == metrics(whole, "samples.jsonl")
    for ours, wanted in zip(metrics(broken), metrics(whole), strict=True):
        assert {k: v for k, v in ours.items() if "second" not in k} == {
            k: v for k, v in wanted.items() if "second" not in k
        }
    assert metrics(whole)[-1]["kl"] > 0
    weights = [load_file(Path(o.out) / "model" / "model.safetensors") for o in (whole, broken)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_recipes_and_command_line(folder, data, tmp_path):
    o = grpo.parse_options(grpo.GRPOOptions, ["--recipe", "paper"], grpo.RECIPES)
    assert (o.epochs, o.max_steps, o.group_size, o.temperature, o.max_new_tokens) == (
        3,
        None,
        8,
        1.0,
        4096,
    )
    assert (o.learning_rate, o.weight_decay, o.max_grad_norm, o.warmup_ratio) == (
        3e-6,
        1e-2,
        1.0,
        0.1,
    )
    assert (o.clip_eps_low, o.clip_eps_high, o.kl_type, o.questions_per_step) == (
        0.2,
        0.28,
        "k3",
        128,
    )
    assert (
        grpo.parse_options(grpo.GRPOOptions, ["--recipe", "med"], grpo.RECIPES).prompt_style
        == "mcq"
    )
    grpo.main(
        [
            "--model",
            str(folder),
            "--data",
            str(data),
            "--out",
            str(tmp_path / "run"),
            "--max-steps",
            "1",
            "--device",
            "cpu",
            "--max-new-tokens",
            "3",
            "--group-size",
            "2",
            "--no-normalize-std",
            "--kl-coef",
            "0.1",
            "--kl-type",
            "k2",
        ]
    )
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["options"]["normalize_std"]
        is False
    )


@pytest.mark.parametrize("value", [1, True, 0.5])
def test_a_reward_may_be_any_number(options, monkeypatch, value):
    monkeypatch.setattr(grpo, "reward", lambda example, response: value)
    trainer, questions = make_trainer(options())
    _, metrics, _ = rollout(trainer, questions[:2])
    assert metrics["reward"] == value


def test_a_reward_that_is_no_finite_number_stops_the_run(options, monkeypatch):
    monkeypatch.setattr(grpo, "reward", lambda example, response: float("nan"))
    trainer, questions = make_trainer(options())
    with pytest.raises(InputError, match="response 1 to question 1 of the batch is nan"):
        rollout(trainer, questions[:2])


def test_the_greatest_difference_of_several_updates_is_kept():
    steps = [{"loss": 1.0, "logprob_diff_max": 1.0}, {"loss": 2.0, "logprob_diff_max": 3.0}]
    assert mean_metrics(steps) == {"loss": 1.5, "logprob_diff_max": 3.0}
