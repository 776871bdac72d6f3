"""The DPO family against plain loops written from probabilities, and the theorems behind it."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taurl.functional.direct_preference import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    discopop_loss,
    exo_pair_loss,
    ipo_loss,
    robust_loss,
    running_reward_shift,
    sft_loss,
    sigmoid_loss,
)
from taurl.functional.dpo import DIVERGENCE_LOSSES, DPO_LOSSES, SMOOTHED_LOSSES, WHOLE_BATCH_LOSSES, dpo_loss

ROWS = 5
NAMES = sorted(DPO_LOSSES)
margins_of = st.floats(-30, 30)
noise = st.floats(0.01, 0.45)


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def batch(rows: int = ROWS, scale: float = 3.0) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probabilities of the policy's chosen and rejected and the reference's, and lengths."""
    generator = torch.Generator().manual_seed(7)
    logprobs = [-20 + scale * torch.randn(rows, dtype=torch.float64, generator=generator) for _ in range(4)]
    chosen, rejected = torch.randint(1, 9, (2, rows), generator=generator)
    return logprobs, {"chosen_lengths": chosen, "rejected_lengths": rejected}


def smoothing(name: str) -> float:
    return 0.2 if name in SMOOTHED_LOSSES else 0.0


def preference(first: float, second: float) -> float:
    """The chance that the first reward wins, from strengths and not from a sigmoid."""
    return math.exp(first) / (math.exp(first) + math.exp(second))


def by_definition(name: str, w: float, r: float, lengths: tuple[int, int], beta: float, eps: float) -> float:
    """One pair's loss, written from each paper's definition, of log-ratios w and r."""
    q = preference(beta * w, beta * r)
    absolute_w, absolute_l = preference(beta * w, 0), preference(beta * r, 0)
    per_token = w / lengths[0], r / lengths[1]
    if name == "sigmoid":
        return -(1 - eps) * math.log(q) - eps * math.log(1 - q)
    if name == "sigmoid_norm":
        q = preference(beta * per_token[0], beta * per_token[1])
        return -(1 - eps) * math.log(q) - eps * math.log(1 - q)
    if name == "robust":
        return (-(1 - eps) * math.log(q) + eps * math.log(1 - q)) / (1 - 2 * eps)
    if name == "exo_pair":
        return sum(p * math.log(p / label) for p, label in ((q, 1 - eps), (1 - q, eps)))
    if name == "hinge":
        return max(0.0, 1 - beta * (w - r))
    if name == "ipo":
        return (per_token[0] - per_token[1] - 0.5 / beta) ** 2
    if name == "discopop":
        gate = preference(beta * (w - r) / 0.05, 0)
        return (1 - gate) * -math.log(q) + gate * (1 - q) / q
    if name == "nca_pair":
        return -math.log(absolute_w * math.sqrt(1 - absolute_w) * math.sqrt(1 - absolute_l))
    if name == "bco_pair":
        return -math.log(absolute_w * (1 - absolute_l))
    if name == "sppo_hard":
        return sum((h - (win - 0.5) / beta) ** 2 for h, win in ((w, 1), (r, 0)))
    if name == "apo_zero":
        return (1 - absolute_w) + absolute_l
    assert name == "apo_down"
    return absolute_w + (1 - q)


@pytest.mark.parametrize("name", sorted(DPO_LOSSES - WHOLE_BATCH_LOSSES - {"sft"}))
def test_every_loss_equals_its_definition(name):
    (pi_w, pi_l, ref_w, ref_l), lengths = batch()
    result = dpo_loss(name, pi_w, pi_l, ref_w, ref_l, beta=0.3, label_smoothing=smoothing(name), **lengths)
    for n in range(ROWS):
        w, r = (pi_w - ref_w)[n].item(), (pi_l - ref_l)[n].item()
        both = lengths["chosen_lengths"][n].item(), lengths["rejected_lengths"][n].item()
        expected = by_definition(name, w, r, both, 0.3, smoothing(name))
        assert result[n].item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_by_hand():
    # βΔ = log 3, so that q = 3/4; h_w = log 3, h_l = 0 with β = 1
    chosen, zero = double(math.log(3) - 5), double(-5.0)
    arguments = chosen, zero, zero, zero
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}
    expected = {
        "sigmoid": math.log(4 / 3),
        "sigmoid_norm": math.log(1 + 3**-0.5),
        "robust": math.log(4 / 3),  # ε = 0
        "hinge": 0.0,
        "ipo": (math.log(3) / 2 - 0.5) ** 2,
        "nca_pair": math.log(4 / 3) + math.log(4) / 2 + math.log(2) / 2,
        "bco_pair": math.log(4 / 3) + math.log(2),
        "sppo_hard": (math.log(3) - 0.5) ** 2 + 0.25,
        "apo_zero": 1 / 4 + 1 / 2,
        "apo_down": 3 / 4 + 1 / 4,
        "aot": math.log(4 / 3),
        "aot_unpaired": math.log(4 / 3),
        "discopop": 1 / 3,  # the gate is open: σ(22) ≈ 1
        "sft": (5 - math.log(3)) / 2,
    }
    for name, value in expected.items():
        assert dpo_loss(name, *arguments, beta=1.0, **lengths).item() == pytest.approx(value, rel=1e-8), name
    smoothed = dpo_loss("exo_pair", *arguments, beta=1.0, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.75 * math.log(0.75 / 0.9) + 0.25 * math.log(0.25 / 0.1), rel=1e-12)
    assert set(expected) | {"exo_pair"} == DPO_LOSSES


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_cheapest_of_all_pairings(name):
    """For a convex cost the sorted pairing solves the transport problem: try every permutation."""
    (pi_w, pi_l, ref_w, ref_l), _ = batch()
    result = dpo_loss(name, pi_w, pi_l, ref_w, ref_l, beta=0.3, label_smoothing=0.2)
    upper = (pi_w - pi_l if name == "aot" else pi_w - ref_w).tolist()
    lower = (ref_w - ref_l if name == "aot" else pi_l - ref_l).tolist()

    def cost(order: tuple[int, ...]) -> float:
        return sum(by_definition("sigmoid", upper[n], lower[m], (1, 1), 0.3, 0.2) for n, m in enumerate(order))

    best = min(permutations(range(ROWS)), key=cost)
    assert result.sum().item() == pytest.approx(cost(best), rel=1e-12)
    assert best != tuple(range(ROWS))  # it is not the plain loss
    for n, m in enumerate(best):
        assert result[n].item() == pytest.approx(by_definition("sigmoid", upper[n], lower[m], (1, 1), 0.3, 0.2))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences(name):
    (pi_w, pi_l, ref_w, ref_l), lengths = batch()

    def loss(w: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return dpo_loss(name, w, r, ref_w, ref_l, beta=0.3, label_smoothing=smoothing(name), **lengths)

    assert torch.autograd.gradcheck(loss, (pi_w.requires_grad_(), pi_l.requires_grad_()))


@pytest.mark.parametrize("divergence", ["js_divergence", "forward_kl", "alpha_divergence"])
@pytest.mark.parametrize("name", sorted(DIVERGENCE_LOSSES))
def test_divergences_replace_the_log_ratio(name, divergence):
    (pi_w, pi_l, ref_w, ref_l), lengths = batch(scale=1.0)

    def score(x: float) -> float:
        u = math.exp(x)
        return {
            "js_divergence": math.log(2 * u / (1 + u)),
            "forward_kl": 1 - 1 / u,
            "alpha_divergence": (1 - u**-0.25) / 0.25,
        }[divergence]

    options = {"beta": 0.3, "label_smoothing": smoothing(name), "divergence": divergence}
    options |= {"alpha": 0.25} if divergence == "alpha_divergence" else {}
    result = dpo_loss(name, pi_w, pi_l, ref_w, ref_l, **options, **lengths)
    for n in range(ROWS):
        w, r = score((pi_w - ref_w)[n].item()), score((pi_l - ref_l)[n].item())
        both = lengths["chosen_lengths"][n].item(), lengths["rejected_lengths"][n].item()
        assert result[n].item() == pytest.approx(by_definition(name, w, r, both, 0.3, smoothing(name)), rel=1e-10)
    reverse = dpo_loss(
        name,
        *(pi_w, pi_l, ref_w, ref_l),
        beta=0.3,
        label_smoothing=smoothing(name),
        divergence="reverse_kl",
        **lengths,
    )
    plain = dpo_loss(name, pi_w, pi_l, ref_w, ref_l, beta=0.3, label_smoothing=smoothing(name), **lengths)
    assert torch.equal(reverse, plain)
    assert not torch.allclose(result, plain)


@given(margins_of, st.floats(0.05, 2))
def test_expected_gradient_vanishes_when_labels_follow_bradley_terry_at_the_implicit_rewards(margin, beta):
    policy = double(-30.0 + margin, -30.0).requires_grad_()
    reference = double(-30.0, -30.0)
    first, second = beta * margin, 0.0
    shift = max(first, second)
    p = preference(first - shift, second - shift)

    def loss(winner: int) -> torch.Tensor:
        order = [winner, 1 - winner]
        w, r = policy[order].split(1)
        return dpo_loss("sigmoid", w, r, *reference.split(1), beta=beta)

    (gradient,) = torch.autograd.grad((p * loss(0) + (1 - p) * loss(1)).sum(), policy)
    assert gradient.abs().max().item() < 1e-12
    (one_label,) = torch.autograd.grad(loss(1).sum(), policy)
    assert one_label[0].item() == pytest.approx(beta * p, rel=1e-9)


@given(margins_of, noise)
def test_robust_is_unbiased_under_flipped_labels(margin, flip_rate):
    kept = robust_loss(double(margin), beta=0.4, label_smoothing=flip_rate).item()
    flipped = robust_loss(double(-margin), beta=0.4, label_smoothing=flip_rate).item()
    clean = sigmoid_loss(double(margin), beta=0.4).item()
    assert (1 - flip_rate) * kept + flip_rate * flipped == pytest.approx(clean, rel=1e-9, abs=1e-11)


@given(noise, st.floats(0.05, 2))
def test_smoothed_losses_are_least_where_the_policy_believes_the_smoothed_label(eps, beta):
    best = math.log((1 - eps) / eps) / beta
    for loss in (sigmoid_loss, exo_pair_loss):
        margins = double(best).requires_grad_()
        value = loss(margins, beta=beta, label_smoothing=eps)
        (slope,) = torch.autograd.grad(value.sum(), margins)
        assert abs(slope.item()) < 1e-12
        around = loss(double(best - 0.1, best + 0.1), beta=beta, label_smoothing=eps)
        assert (around > value).all()
    assert exo_pair_loss(double(best), beta=beta, label_smoothing=eps).item() == pytest.approx(0, abs=1e-12)
    margins = double(best).requires_grad_()
    robust_loss(margins, beta=beta, label_smoothing=eps).sum().backward()
    assert margins.grad.item() < 0  # robust DPO goes on: its best margin is infinite


@given(st.floats(0.01, 2))
def test_ipo_wants_a_margin_and_no_more(beta):
    best = 1 / (2 * beta)
    margins = double(best, best - 0.5, best + 0.5).requires_grad_()
    loss = ipo_loss(margins, beta=beta)
    assert loss.tolist() == pytest.approx([0.0, 0.25, 0.25], abs=1e-9)
    loss.sum().backward()
    assert margins.grad.tolist() == pytest.approx([0.0, -1.0, 1.0], abs=1e-9)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_which_way_each_answer_is_pushed(w, r):
    def signs(loss) -> list[int]:
        chosen, rejected = double(w).requires_grad_(), double(r).requires_grad_()
        gradients = torch.autograd.grad(loss(chosen, rejected, beta=0.5).sum(), (chosen, rejected))
        return [int(gradient.sign().item()) for gradient in gradients]

    assert signs(bco_pair_loss) == [-1, 1]  # chosen up, rejected down
    assert signs(apo_zero_loss) == [-1, 1]
    assert signs(apo_down_loss)[1] == 1  # rejected down; chosen down too once both are alike:
    chosen = double(w).requires_grad_()
    apo_down_loss(chosen, double(w - 40), beta=0.5).sum().backward()
    assert chosen.grad.item() > 0


def test_bco_shift_moves_both_answers_and_follows_every_batch():
    w, r = double(2.0), double(-1.0)
    shifted = bco_pair_loss(w, r, beta=0.5, reward_shift=0.3).item()
    assert shifted == pytest.approx(-math.log(preference(0.7, 0) * preference(0, -0.8)), rel=1e-12)
    state = running_reward_shift((0.0, 0), double(1.0, 2.0), double(0.0, -1.0))
    assert state == (0.5, 4)
    mean, count = running_reward_shift(state, torch.tensor([4.0]), torch.tensor([3.0]))
    assert (mean, count) == (pytest.approx(1.5), 6)
    assert running_reward_shift((0.0, 0), torch.zeros(0), torch.zeros(0)) == (0.0, 0)
    (pi_w, pi_l, ref_w, ref_l), _ = batch()
    through_the_door = dpo_loss("bco_pair", pi_w, pi_l, ref_w, ref_l, beta=0.5, reward_shift=0.3)
    alone = bco_pair_loss(pi_w - ref_w, pi_l - ref_l, beta=0.5, reward_shift=0.3)
    assert torch.equal(through_the_door, alone)


def test_sft_with_the_mean_length_is_the_mean_over_all_tokens():
    (pi_w, *_), lengths = batch()
    counts = lengths["chosen_lengths"]
    mean_length = counts.double().mean().expand(ROWS)
    over_tokens = -sum(pi_w.tolist()) / sum(counts.tolist())
    assert sft_loss(pi_w, mean_length).mean().item() == pytest.approx(over_tokens, rel=1e-13)
    assert sft_loss(double(0.0), torch.tensor([0])).item() == 0


def test_mixtures_are_weighted_sums():
    (pi_w, pi_l, ref_w, ref_l), lengths = batch()
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}
    result = dpo_loss(mixture, pi_w, pi_l, ref_w, ref_l, **lengths)
    parts = [weight * dpo_loss(name, pi_w, pi_l, ref_w, ref_l, **lengths) for name, weight in mixture.items()]
    torch.testing.assert_close(result, parts[0] + parts[1] + parts[2], rtol=1e-14, atol=0)
    with_divergence = dpo_loss({"sigmoid": 1.0, "sft": 0.0}, *batch()[0], divergence="forward_kl", **lengths)
    alone = dpo_loss("sigmoid", *batch()[0], divergence="forward_kl")
    torch.testing.assert_close(with_divergence, alone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up_except_where_the_name_says_so(name):
    logprobs, lengths = batch(rows=8)
    options = {"beta": 0.3, "label_smoothing": smoothing(name)}
    whole = dpo_loss(name, *logprobs, **options, **lengths)
    parts = [
        dpo_loss(name, *(t[rows] for t in logprobs), **options, **{key: t[rows] for key, t in lengths.items()})
        for rows in (slice(0, 3), slice(3, 8))
    ]
    equal = torch.allclose(torch.cat(parts), whole, rtol=1e-12)
    assert equal == (name not in WHOLE_BATCH_LOSSES)


@pytest.mark.parametrize("name", NAMES)
def test_far_apart_policies_stay_finite(name):
    far = torch.tensor([1e4, -1e4, 0.0, 1e4, -1e4])
    other = torch.tensor([-1e4, 1e4, 0.0, 1e4, -1e4])
    pi_w, pi_l = far.requires_grad_(), other.requires_grad_()
    lengths = {"chosen_lengths": torch.ones(5).long(), "rejected_lengths": torch.ones(5).long()}
    for beta in (0.01, 1.0):
        loss = dpo_loss(
            name, pi_w, pi_l, torch.zeros(5), torch.zeros(5), beta=beta, label_smoothing=smoothing(name), **lengths
        )
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()
        for gradient in torch.autograd.grad(loss.sum(), (pi_w, pi_l), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()
    if name in DIVERGENCE_LOSSES:
        for divergence in ("js_divergence", "forward_kl", "alpha_divergence"):
            loss = dpo_loss(
                name,
                pi_w,
                pi_l,
                torch.zeros(5),
                torch.zeros(5),
                label_smoothing=smoothing(name),
                divergence=divergence,
                **lengths,
            )
            assert loss.isfinite().all()
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (pi_w, pi_l)))


def test_discopop_exponential_branch_is_the_definition_and_no_overflow():
    margins = torch.tensor([-1e4, -300.0, 300.0, 1e4])
    assert discopop_loss(margins, beta=1.0).tolist() == pytest.approx([1e4, 300.0, 0.0, 0.0], abs=1e-30)
    assert discopop_loss(margins, beta=1.0, temperature=3.0).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_widened_and_the_reference_gets_no_gradient(name):
    logprobs, lengths = batch()
    options = {"label_smoothing": smoothing(name), **lengths}
    halves = [tensor.bfloat16() for tensor in logprobs]
    result = dpo_loss(name, *halves, **options)
    assert result.dtype == torch.float32
    exact = dpo_loss(name, *(half.double() for half in halves), **options)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5)
    leaves = [tensor.clone().requires_grad_() for tensor in logprobs]
    dpo_loss(name, *leaves, **options).sum().backward()
    assert leaves[0].grad is not None
    assert leaves[2].grad is None
    assert leaves[3].grad is None
    single = dpo_loss(
        name, *(tensor[:1] for tensor in logprobs), **{**options, **{k: v[:1] for k, v in lengths.items()}}
    )
    assert single.shape == (1,)


@settings(max_examples=20)
@given(st.permutations(range(ROWS)))
def test_order_of_rows_does_not_matter(order):
    logprobs, lengths = batch()
    for name in NAMES:
        options = {"beta": 0.3, "label_smoothing": smoothing(name)}
        whole = dpo_loss(name, *logprobs, **options, **lengths)
        shuffled = dpo_loss(
            name, *(t[list(order)] for t in logprobs), **options, **{k: t[list(order)] for k, t in lengths.items()}
        )
        torch.testing.assert_close(shuffled, whole[list(order)], rtol=1e-12, atol=1e-14)


def test_bad_input_is_named():
    rows = torch.zeros(3)
    good = (rows, rows, rows, rows)
    lengths = {"chosen_lengths": torch.ones(3), "rejected_lengths": torch.ones(3)}
    for match, name, arguments, options in [
        (r"loss_type is \['dpo'\], expected one or more of aot, ", "dpo", good, {}),
        (r"loss_type is \[\]", {}, good, {}),
        ("the weight of 'sigmoid' is nan", {"sigmoid": math.nan}, good, {}),
        (r"rejected_logprobs \[1\]", "sigmoid", (rows, rows[:1], rows, rows), {}),
        (r"chosen_logprobs has shape \[3, 1\]", "sigmoid", (rows[:, None],) * 4, {}),
        ("beta is 0", "sigmoid", good, {"beta": 0}),
        (r"label_smoothing is 0\.5, expected", "sigmoid", good, {"label_smoothing": 0.5}),
        (r"label_smoothing is 0\.1, but none of \['hinge'\]", "hinge", good, {"label_smoothing": 0.1}),
        (r"label_smoothing is 0\.0, expected a positive", "exo_pair", good, {}),
        (r"divergence is 'forward_kl', but \['aot'\]", "aot", good, {"divergence": "forward_kl"}),
        ("divergence is 'kl', expected", "sigmoid", good, {"divergence": "kl"}),
        (r"reward_shift is 0\.1", "sigmoid", good, {"reward_shift": 0.1}),
        ("need chosen_lengths and rejected_lengths", "ipo", good, {"chosen_lengths": rows}),
        ("'sft' needs chosen_lengths", {"sigmoid": 1.0, "sft": 1.0}, good, {}),
        (r"lengths \[2\]", "ipo", good, {**lengths, "chosen_lengths": torch.ones(2)}),
        ("temperature is 0", "discopop", good, {"discopop_temperature": 0}),
        (r"discopop_temperature is 0\.1, but only 'discopop'", "sigmoid", good, {"discopop_temperature": 0.1}),
        (r"alpha is 0\.3, but divergence 'reverse_kl'", "sigmoid", good, {"alpha": 0.3}),
        (r"alpha is 0\.3, but divergence 'forward_kl'", "hinge", good, {"alpha": 0.3, "divergence": "forward_kl"}),
        (r"alpha is 1\.3, expected", "hinge", good, {"alpha": 1.3, "divergence": "alpha_divergence"}),
    ]:
        with pytest.raises(ValueError, match=match) as error:
            dpo_loss(name, *arguments, **options)
        assert "\n" not in str(error.value)
