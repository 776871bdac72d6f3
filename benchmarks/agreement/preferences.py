"""Rows about preferences, all of TRL: DPO, KTO, CPO, SimPO, ORPO and the reward model."""

from collections.abc import Callable, Iterator

import torch
from agreement import peers
from agreement.batch import HALVES, LENGTH, LOGPROBS, MASK, REFERENCE, ROWS
from agreement.compare import Loss, Row, compare
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot, softplus

from taurl.functional.dpo import SMOOTHED_LOSSES, dpo_loss
from taurl.functional.kto import kl_baseline, kto_loss
from taurl.functional.log_ratios import length_desensitised_logprobs, sequence_logprobs
from taurl.functional.preference import pairwise_loss
from taurl.functional.reference_free import cpo_loss, orpo_loss, simpo_loss

LENGTHS = MASK.sum(1)
CHOSEN, REJECTED = LENGTHS.chunk(2)


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
    exo = {"expected": "float32", "why": "TRL holds ε of exo_pair in a float32 tensor."}
    for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
                 "discopop", "aot", "aot_unpaired", "robust", "exo_pair"):  # fmt: skip
        smoothed = {"label_smoothing": 0.1} if name in SMOOTHED_LOSSES - {"sigmoid", "sigmoid_norm"} else {}
        label = f"DPO {name}" + (", ε 0.1" if smoothed else "")
        yield dpo_row(label, name, smoothed, smoothed, **(exo if name == "exo_pair" else {}))
    lengths = CHOSEN.double().mean().expand(len(CHOSEN))
    yield dpo_row("DPO sft, lengths their mean", "sft", {"chosen_lengths": lengths}, {})
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2}
    options = {"loss_type": list(mixture), "loss_weights": list(mixture.values())}
    yield compare("DPO sigmoid + bco_pair (MPO)",
        [(lambda x: our_dpo(x, mixture), lambda x: peers.dpo_loss(x, REFERENCE, MASK, **options))], LOGPROBS)  # fmt: skip
    public = torch.minimum(CHOSEN, REJECTED).repeat(2)

    def desensitised(x: Tensor) -> Tensor:
        kept = [length_desensitised_logprobs(tensor, MASK, public, alpha=0.3) for tensor in (x, REFERENCE)]
        return dpo_loss("sigmoid", *(part for sums in kept for part in sums.chunk(2))).mean()

    yield compare("LD-DPO, α 0.3", [(desensitised, lambda x: their_dpo(x, "sigmoid", ld_alpha=0.3))], LOGPROBS)
    for name in ("sigmoid", "ipo"):
        for divergence in ("forward_kl", "js_divergence"):
            option = {"f_divergence_type": divergence}
            yield dpo_row(f"DPO {name}, {divergence}", name, {"divergence": divergence}, option)
        option = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7, "dtype": torch.float32}
        ours = {"divergence": "alpha_divergence", "alpha": 0.3}
        yield dpo_row(f"DPO {name}, alpha_divergence, TRL's coefficient 1 − α", name, ours, option, expected="float32",
            why="TRL run in float32: its table of clamps has no entry for float64, which raises KeyError.")  # fmt: skip
    yield from dpo_differences()


def dpo_differences() -> Iterator[Row]:
    differs = {"expected": "differs"}
    margins = lambda x: torch.stack([*torch.where(MASK, x - REFERENCE, 0.0).sum(1).chunk(2)])  # noqa: E731

    def smoothed(x: Tensor) -> Tensor:
        logits = 0.1 * (margins(x)[0] - margins(x)[1])
        return (0.9 * softplus(-logits) + 0.1 * softplus(logits)).mean()

    yield dpo_row("DPO sigmoid, ε 0.1", "sigmoid", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}, **differs,
        judge=smoothed, why="cDPO's formula; TRL accepts `label_smoothing` here and ignores it.")  # fmt: skip
    yield dpo_row("DPO sigmoid, alpha_divergence, 0.3 given to both", "sigmoid",
        {"divergence": "alpha_divergence", "alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "dtype": torch.float32}, **differs,
        judge=lambda x: softplus(-0.1 * (alpha_slope(margins(x)[0]) - alpha_slope(margins(x)[1]))).mean(),
        why="The slope of the α-divergence is (1 − u^−α)/α, as TRL's help has it; its code is that for 1 − α. The "
        "third number takes the derivative of f by autograd.")  # fmt: skip
    yield dpo_row("DPO sft, rows of unequal length", "sft", {}, {}, **differs,
        judge=lambda x: -torch.stack([r[m].mean() for r, m in zip(x[:3], MASK[:3], strict=True)]).mean(),
        why="A mean over rows here, over the tokens of the micro-batch in TRL, which depends on the cut; either is "
        "a choice (the row above agrees). The third number is the mean over rows.")  # fmt: skip
    wrong = REFERENCE.clone()
    wrong[:3, 0] += 3e4
    wrong[3:, 0] -= 3e4
    yield dpo_row("DPO discopop, Δ = −6·10⁴", "discopop", {"reference": wrong}, {"reference": wrong}, **differs,
        judge=lambda x: softplus(-0.1 * (margins(x)[0] - margins(x)[1] - 6e4)).mean(),
        why="Far to the left σ(x/τ)·e^−x tends to 0 and the logistic term remains; TRL has 0 · ∞ = NaN.")  # fmt: skip
    for nats, dtype, why in (
        (60.0, torch.float64, "taurl stops the exponent at 40, with gradient 0 beyond; TRL is exact in float64."),
        (100.0, torch.float32, "Neither: taurl stops the exponent at 40, with gradient 0 beyond; TRL overflows float32."),
    ):
        far = REFERENCE.clone()
        far[:3, 0] += nats
        options = {"reference": far, "f_divergence_type": "forward_kl", "dtype": dtype}
        kind = str(dtype).removeprefix("torch.")
        yield dpo_row(f"DPO sigmoid, forward_kl, h_w about −{nats:.0f}, TRL in {kind}", "sigmoid",
            {"reference": far, "divergence": "forward_kl"}, options, **differs, why=why,
            judge=lambda x, nats=nats: (0.1 * ((nats - margins(x)[0]).exp() - (-margins(x)[1]).exp())).mean())  # fmt: skip


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
    unpaired = lambda x: theirs(x, loss_type="apo_zero_unpaired")  # noqa: E731
    yield compare("KTO, apo_zero_unpaired as z₀ = 0", [(lambda x: ours(x, 0.0), unpaired)], LOGPROBS)
    yield compare("KTO, two micro-batches", [(lambda x: ours(x, z), lambda x: theirs(x, parts=HALVES))], LOGPROBS,
        expected="differs", judge=theirs,
        why="z₀ is an expectation over the data; TRL takes it of each micro-batch, so the loss depends on the cut. The "
        "third number is TRL's own of the uncut batch.")  # fmt: skip


def reference_free_rows() -> Iterator[Row]:
    tokens = torch.randint(3, peers.WORDS, (ROWS, LENGTH + 1))
    logits = torch.randn(ROWS, LENGTH + 1, peers.WORDS, dtype=torch.float64)
    uneven = torch.arange(LENGTH) < torch.tensor([7, 3, 5, 1, 6, 2])[:, None]
    even = torch.arange(LENGTH) < torch.tensor([4, 4, 4, 1, 6, 2])[:, None]

    def parts(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        chosen = x[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return *sequence_logprobs(chosen, mask).chunk(2), *mask.sum(1).chunk(2)

    def case(method: str, ours: Callable, mask: Tensor, **options: object) -> list[tuple[Loss, Loss]]:
        theirs = lambda x: peers.reference_free_loss(method, x, tokens, mask, **options)  # noqa: E731
        return [(lambda x: ours(*parts(x, mask)).mean(), theirs)]

    mean = uneven.sum(1)[: ROWS // 2].double().mean().expand(ROWS // 2)
    for epsilon in (0.0, 0.1):
        smoothing = {"label_smoothing": epsilon}
        cpo = case("cpo", lambda w, l, *_, s=smoothing: cpo_loss(w, l, mean, **s), uneven, **smoothing)  # noqa: E741
        yield compare(f"CPO, ε {epsilon:g}, lengths their mean", cpo, logits)
        options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0, **smoothing}
        ours = lambda *pairs, s=smoothing: simpo_loss(*pairs, beta=2.0, target_margin=1.0, **s)  # noqa: E731
        yield compare(f"SimPO, ε {epsilon:g}", case("cpo", ours, uneven, **options), logits)
    yield compare("ORPO, chosen of equal length", case("orpo", orpo_loss, even), logits, expected="float32",
        why="TRL takes the odds of ORPO in float32 whatever the model's dtype.")  # fmt: skip

    def by_hand(x: Tensor) -> Tensor:
        w, l, n, m = parts(x, uneven)  # noqa: E741
        odds = [p.exp() / (1 - p.exp()) for p in (w / n, l / m)]
        return (-w / n - 0.1 * logsigmoid(odds[0].log() - odds[1].log())).mean()

    yield compare("ORPO, chosen of unequal length", case("orpo", orpo_loss, uneven), logits, expected="differs",
        judge=by_hand, why="The paper's loss is an expectation over pairs of a likelihood per token; TRL's likelihood is "
        "a mean over all tokens of the micro-batch, prompts included.")  # fmt: skip
    certain = logits.clone()
    certain[:3, :-1] += 100 * one_hot(tokens[:3, 1:], peers.WORDS)
    yield compare("ORPO, chosen answers certain", case("orpo", orpo_loss, even), certain, expected="differs",
        why="The odds are then infinite; taurl stops one rounding short and stays finite, TRL's gradient is NaN.")  # fmt: skip


def reward_rows() -> Iterator[Row]:
    rewards, margins = torch.randn(ROWS, dtype=torch.float64), torch.rand(ROWS // 2, dtype=torch.float64)
    for name, margin, centring in (("plain", None, 0.0), ("margin", margins, 0.0), ("margin, centring", margins, 0.01)):
        ours = lambda x, m=margin, c=centring: pairwise_loss(*x.chunk(2), margins=m, centring=c).mean()  # noqa: E731
        theirs = lambda x, m=margin, c=centring: peers.reward_loss(x, m, center_rewards_coefficient=c or None)  # noqa: E731
        yield compare(f"reward model, pairs, {name}", [(ours, theirs)], rewards)
