"""Rows about preferences, all of TRL: DPO, KTO, CPO, SimPO, ORPO and the reward model."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from agreement import peers
from agreement.batch import HALVES, LENGTH, LOGPROBS, MASK, REFERENCE, ROWS
from agreement.compare import Loss, Row, compare
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot, softplus

from taurl.functional.dpo import DPO_LOSSES, SMOOTHED_LOSSES, dpo_loss
from taurl.functional.kto import kl_baseline, kto_loss
from taurl.functional.log_ratios import length_desensitized_logprobs, sequence_logprobs
from taurl.functional.preference import pairwise_loss
from taurl.functional.reference_free import cpo_loss, orpo_loss, simpo_loss

LENGTHS = MASK.sum(1)
CHOSEN, REJECTED = LENGTHS.chunk(2)


# `alpha_rows` shows why float32.
ALPHA_DIVERGENCE = {"f_divergence_type": "alpha_divergence", "dtype": torch.float32}


def our_dpo(x: Tensor, loss_type: str | dict, reference: Tensor = REFERENCE, **options: object) -> Tensor:
    sums = [part for tensor in (x, reference) for part in sequence_logprobs(tensor, MASK).chunk(2)]
    options = {"chosen_lengths": CHOSEN, "rejected_lengths": REJECTED, **options}
    return dpo_loss(loss_type, *sums, **options).mean()


def their_dpo(x: Tensor, loss_type: str, reference: Tensor = REFERENCE, dtype=torch.float64, **options) -> Tensor:
    return peers.dpo_loss(x.to(dtype), reference.to(dtype), MASK, loss_type=[loss_type], **options)


def dpo_row(name: str, loss_type: str, ours: dict, theirs: dict, leaf: Tensor = LOGPROBS, **rest: object) -> Row:
    cases = [(lambda x: our_dpo(x, loss_type, **ours), lambda x: their_dpo(x, loss_type, **theirs))]
    return compare(name, cases, leaf, **rest)


def dpo_rows() -> Iterator[Row]:
    for name in sorted(DPO_LOSSES - {"sft"}):
        smoothing = {"label_smoothing": 0.1} if name in SMOOTHED_LOSSES - {"sigmoid", "sigmoid_norm"} else {}
        rest = {"expected": "float32", "why": "TRL takes the logarithms of ε in float32."} if name == "exo_pair" else {}
        yield dpo_row(f"DPO {name}" + (", ε 0.1" if smoothing else ""), name, smoothing, smoothing, **rest)
    lengths = CHOSEN.double().mean().expand(len(CHOSEN))
    yield dpo_row("DPO sft, given the mean length", "sft", {"chosen_lengths": lengths}, {})
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2}
    options = {"loss_type": list(mixture), "loss_weights": list(mixture.values())}
    yield compare(
        "DPO sigmoid + bco_pair (MPO)",
        [(lambda x: our_dpo(x, mixture), lambda x: peers.dpo_loss(x, REFERENCE, MASK, **options))],
        LOGPROBS,
    )
    public = torch.minimum(CHOSEN, REJECTED).repeat(2)

    def desensitised(x: Tensor) -> Tensor:
        kept = [length_desensitized_logprobs(tensor, MASK, public, alpha=0.3) for tensor in (x, REFERENCE)]
        return dpo_loss("sigmoid", *(part for sums in kept for part in sums.chunk(2))).mean()

    yield compare("LD-DPO, α 0.3", [(desensitised, lambda x: their_dpo(x, "sigmoid", ld_alpha=0.3))], LOGPROBS)
    for name in ("sigmoid", "ipo"):
        for divergence in ("forward_kl", "js_divergence"):
            option = {"f_divergence_type": divergence}
            yield dpo_row(f"DPO {name}, {divergence}", name, {"divergence": divergence}, option)
    yield from alpha_rows()
    yield from dpo_differences()


def alpha_rows() -> Iterator[Row]:
    try:
        their_dpo(LOGPROBS, "sigmoid", f_divergence_type="alpha_divergence")
    except KeyError as key:
        why = f"TRL runs in float32 here: its table of largest exponents has no entry for {key}, a KeyError."
    for name in ("sigmoid", "ipo"):
        yield dpo_row(
            f"DPO {name}, alpha_divergence, TRL's coefficient as 1 − α",
            name,
            {"divergence": "alpha_divergence", "alpha": 0.3},
            {**ALPHA_DIVERGENCE, "f_alpha_divergence_coef": 0.7},
            expected="float32",
            why=why,
        )


def log_ratios(x: Tensor, reference: Tensor = REFERENCE) -> tuple[Tensor, Tensor]:
    """h of the chosen and of the rejected answers, written out."""
    return torch.where(MASK, x - reference, 0.0).sum(1).chunk(2)


def dpo_differences() -> Iterator[Row]:
    def smoothed(x: Tensor) -> Tensor:
        logits = 0.1 * (log_ratios(x)[0] - log_ratios(x)[1])
        return (0.9 * softplus(-logits) + 0.1 * softplus(logits)).mean()

    yield dpo_row(
        "DPO sigmoid, ε 0.1",
        "sigmoid",
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1},
        expected="differs",
        judge=smoothed,
        why="taurl has cDPO; TRL accepts `label_smoothing` with this loss and ignores it.",
    )

    def by_autograd(x: Tensor) -> Tensor:
        chosen, rejected = (alpha_slope(each) for each in log_ratios(x))
        return softplus(-0.1 * (chosen - rejected)).mean()

    yield dpo_row(
        "DPO sigmoid, alpha_divergence, 0.3 given to both",
        "sigmoid",
        {"divergence": "alpha_divergence", "alpha": 0.3},
        {**ALPHA_DIVERGENCE, "f_alpha_divergence_coef": 0.3},
        expected="differs",
        judge=by_autograd,
        why="The slope of the α-divergence is (1 − u^−α)/α, in taurl too; TRL's help names u^−α, but its code has "
        "1 − α for α. The third computation differentiates f itself.",
    )
    yield dpo_row(
        "DPO sft, chosen answers of unequal length",
        "sft",
        {},
        {},
        expected="differs",
        judge=lambda x: -torch.stack([r[m].mean() for r, m in zip(x[:3], MASK[:3], strict=True)]).mean(),
        why="A matter of definition: taurl's mean over rows, which is the third computation, or TRL's over the tokens "
        "of the micro-batch, which depends on the cut. Given the mean length, taurl's is TRL's of the whole batch.",
    )
    wrong = REFERENCE.clone()
    wrong[:3, 0] += 3e4
    wrong[3:, 0] -= 3e4

    def logistic(x: Tensor) -> Tensor:
        chosen, rejected = log_ratios(x, wrong)
        return softplus(-0.1 * (chosen - rejected)).mean()

    yield dpo_row(
        "DPO discopop, Δ = −6·10⁴",
        "discopop",
        {"reference": wrong},
        {"reference": wrong},
        expected="differs",
        judge=logistic,
        why="Far to the left σ(x/τ)·e^−x is 0 and the logistic term remains, the third computation; TRL's 0 · ∞ is "
        "NaN.",
    )
    yield far_forward_kl(100.0, torch.float32, "TRL overflows float32; taurl runs in float64 here, and is exact.")


def far_forward_kl(nats: float, dtype: torch.dtype, why: str) -> Row:
    """Chosen answers that the policy finds far less likely than the reference does: −log σ(x) is −x there."""
    far = REFERENCE.clone()
    far[:3, 0] += nats

    def linear(x: Tensor) -> Tensor:
        chosen, rejected = log_ratios(x, far)
        return 0.1 * ((-chosen).exp() - (-rejected).exp()).mean()

    kind, options = str(dtype).removeprefix("torch."), {"reference": far, "f_divergence_type": "forward_kl"}
    return dpo_row(
        f"DPO sigmoid, forward_kl, h_w near −{nats:.0f}, TRL in {kind}",
        "sigmoid",
        {"reference": far, "divergence": "forward_kl"},
        {**options, "dtype": dtype},
        expected="differs",
        judge=linear,
        why=why,
    )


def alpha_slope(log_ratios: Tensor, alpha: float = 0.3) -> Tensor:
    """f'(e^x), by autograd, of f(u) = (u^(1−α) − (1 − α)u − α) / (α(α − 1))."""
    u = log_ratios.exp()
    f = (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))
    return torch.autograd.grad(f.sum(), u, create_graph=True)[0]


def kto_rows() -> Iterator[Row]:
    desirable = torch.tensor([True, False, True, True, False, False])
    foreign = (-torch.rand(ROWS, 1, dtype=torch.float64), -1 - torch.rand(ROWS, 1, dtype=torch.float64))
    reference = sequence_logprobs(REFERENCE, MASK)
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.3}

    def ours(x: Tensor, z: float) -> Tensor:
        return kto_loss(sequence_logprobs(x, MASK), reference, desirable, kl_baseline=z, **weights).mean()

    def theirs(x: Tensor, **options: object) -> Tensor:
        return peers.kto_loss(x, REFERENCE, foreign, desirable, MASK, **weights, **options)

    z = kl_baseline(foreign[0][:, 0], foreign[1][:, 0])
    yield compare("KTO", [(lambda x: ours(x, z), theirs)], LOGPROBS)
    cases = [(lambda x: ours(x, 0.0), lambda x: theirs(x, loss_type="apo_zero_unpaired"))]
    yield compare("KTO with z₀ = 0, apo_zero_unpaired", cases, LOGPROBS)
    yield compare(
        "KTO, two micro-batches",
        [(lambda x: ours(x, z), lambda x: theirs(x, parts=HALVES))],
        LOGPROBS,
        expected="differs",
        judge=theirs,
        why="z₀ is a mean over the data, in taurl over the optimiser batch; TRL takes it of each micro-batch, so that "
        "the loss depends on the cut. The third computation is TRL's own of the uncut batch.",
    )


def reference_free_rows() -> Iterator[Row]:
    tokens = torch.randint(3, peers.WORDS, (ROWS, LENGTH + 1))
    logits = torch.randn(ROWS, LENGTH + 1, peers.WORDS, dtype=torch.float64)
    uneven = torch.arange(LENGTH) < torch.tensor([7, 3, 5, 1, 6, 2])[:, None]
    even = torch.arange(LENGTH) < torch.tensor([4, 4, 4, 1, 6, 2])[:, None]

    def parts(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        chosen = x[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return *sequence_logprobs(chosen, mask).chunk(2), *mask.sum(1).chunk(2)

    def case(ours: Callable, mask: Tensor, **options: object) -> list[tuple[Loss, Loss]]:
        theirs = partial(peers.reference_free_loss, tokens=tokens, mask=mask, **options)
        return [(lambda x: ours(*parts(x, mask)).mean(), theirs)]

    mean_length = uneven.sum(1)[: ROWS // 2].double().mean().expand(ROWS // 2)

    def cpo(chosen: Tensor, rejected: Tensor, *_: Tensor, label_smoothing: float) -> Tensor:
        return cpo_loss(chosen, rejected, mean_length, label_smoothing=label_smoothing)

    for epsilon in (0.0, 0.1):
        smoothing, simpo = {"label_smoothing": epsilon}, {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0}
        cases = case(partial(cpo, **smoothing), uneven, method="cpo", **smoothing)
        yield compare(f"CPO, ε {epsilon:g}, given the mean length", cases, logits)
        cases = case(partial(simpo_loss, **smoothing), uneven, method="cpo", beta=2.0, **simpo, **smoothing)
        yield compare(f"SimPO, ε {epsilon:g}", cases, logits)
    yield compare(
        "ORPO, chosen of equal length",
        case(orpo_loss, even, method="orpo"),
        logits,
        expected="float32",
        why="TRL takes the odds of ORPO in float32 whatever the model's dtype.",
    )

    def by_hand(x: Tensor) -> Tensor:
        chosen, rejected, *lengths = parts(x, uneven)
        better, worse = chosen / lengths[0], rejected / lengths[1]
        odds = [mean.exp() / (1 - mean.exp()) for mean in (better, worse)]
        return (-better - 0.1 * logsigmoid(odds[0].log() - odds[1].log())).mean()

    yield compare(
        "ORPO, chosen of unequal length",
        case(orpo_loss, uneven, method="orpo"),
        logits,
        expected="differs",
        judge=by_hand,
        why="The paper's loss is a mean over pairs (eq. 6), as taurl's; TRL's likelihood is a mean over all tokens of "
        "the micro-batch, and those of longer prompts would be in it.",
    )
    certain = logits.clone()
    certain[:3, :-1] += 100 * one_hot(tokens[:3, 1:], peers.WORDS)
    yield compare(
        "ORPO, chosen answers certain",
        case(orpo_loss, even, method="orpo"),
        certain,
        expected="differs",
        why="The odds are then infinite; taurl stops one rounding short and stays finite, TRL's gradient is NaN; "
        "both values are next to 0.",
    )


def reward_rows() -> Iterator[Row]:
    rewards, margins = torch.randn(ROWS, dtype=torch.float64), torch.rand(ROWS // 2, dtype=torch.float64)
    for name, margin, centring in (("plain", None, 0.0), ("margin", margins, 0.0), ("margin, centring", margins, 0.01)):

        def ours(x: Tensor, margin: Tensor | None = margin, centring: float = centring) -> Tensor:
            return pairwise_loss(*x.chunk(2), margins=margin, centering=centring).mean()

        theirs = partial(peers.reward_loss, margins=margin, center_rewards_coefficient=centring or None)
        yield compare(f"reward model, pairs, {name}", [(ours, theirs)], rewards)
