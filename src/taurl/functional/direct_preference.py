"""Direct preference optimization and its family: a policy learns from pairs, without a reward model.

With h = log π(y) − log π_ref(y) of a whole completion y, w the chosen one and l the rejected one:

    margins   Δ = h_w − h_l, in nats; under another divergence than the reverse KL the difference of `divergence_scores`

`dpo.dpo_loss` is the door for trainers: it takes log-probabilities and a name, or several names with weights. The
losses here take Δ, or h_w and h_l, and can be called alone. All return one loss per pair, [N], to be minimized; a row's
loss depends on that row alone, except in `aot_loss`. None overflows for log-ratios of ±10⁴.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from taurl.functional._inputs import at_least_float32, require_label_smoothing, require_positive, require_rows
from taurl.functional.importance import LARGEST_LOG_RATIO


def sigmoid_loss(margins: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: −(1 − ε) log σ(βΔ) − ε log σ(−βΔ).

    ε = 0 is DPO, ε > 0 conservative DPO (cDPO): a label is wrong with probability ε, and the best Δ is no longer
    infinite but log((1 − ε)/ε) / β. TRL 1.16 has no ε here. β is 0.1 in the paper; "sigmoid_norm", the same loss of
    log-ratios per token, takes about 5.

    Args:
        margins: float [N], Δ.
        beta: β > 0.
        label_smoothing: ε in [0, ½).
    Returns: loss, [N]; float32, or float64 for float64. So for every loss of this file.
    Raises: ValueError if shapes differ or a number is out of range. So for every loss of this file.
    Source: Rafailov et al. 2023, arXiv:2305.18290; ε: Mitchell 2023, "A note on DPO with noisy preferences",
        https://ericmitchell.ai/cdpo.pdf; per token: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124.
    """
    require_label_smoothing(label_smoothing)
    logits = _logits(margins, beta)
    if label_smoothing == 0:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust_loss(margins: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: −[ (1 − ε) log σ(βΔ) − ε log σ(−βΔ) ] / (1 − 2ε).

    Over labels that were flipped with probability ε its expectation is the DPO loss of the true labels. Unlike
    `sigmoid_loss` with the same ε it is not bounded below: the best Δ for any one pair is infinite.

    Args: as `sigmoid_loss`; the paper has ε = 0.1 and β = 0.01.
    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    require_label_smoothing(label_smoothing)
    logits = _logits(margins, beta)
    as_labelled, flipped = -logsigmoid(logits), -logsigmoid(-logits)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair_loss(margins: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs, the reverse KL of the policy's preference and the smoothed label.

        loss = KL( (q, 1 − q) ‖ (1 − ε, ε) ),   q = σ(βΔ)

    cDPO is the same divergence the other way round, up to a constant; both are least where q = 1 − ε, there this is 0.

    Args: as `sigmoid_loss`, but ε > 0: the divergence from a label that rules one answer out is infinite. The paper
        has ε = 10⁻³ and β = 0.1.
    Source: Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    require_label_smoothing(label_smoothing)
    require_positive(label_smoothing=label_smoothing)
    logits = _logits(margins, beta)
    label = logits.new_tensor(label_smoothing)
    chosen = logits.sigmoid() * (logsigmoid(logits) - torch.log1p(-label))
    rejected = (-logits).sigmoid() * (logsigmoid(-logits) - label.log())
    return chosen + rejected


def hinge_loss(margins: Tensor, *, beta: float) -> Tensor:
    """Hinge: max(0, 1 − βΔ); a pair told apart by 1/β nats is left alone.

    Args: as `sigmoid_loss`.
    Source: Liu et al. 2023 (RSO), arXiv:2309.06657; without reference: Zhao et al. 2023 (SLiC), arXiv:2305.10425.
    """
    return (1 - _logits(margins, beta)).relu()


def ipo_loss(margins: Tensor, *, beta: float) -> Tensor:
    """IPO: (Δ − 1/(2β))², which wants a margin of 1/(2β) and no more.

    `dpo_loss` gives it log-ratios per token, h/|y|, as TRL does on the word of the paper's authors, so that β (the
    paper's τ) means the same at every length. It is then the margin per token that 1/(2β) sets: 5 nats for 0.1.

    Args: as `sigmoid_loss`.
    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    require_positive(beta=beta)
    require_rows(margins=margins)
    return (at_least_float32(margins) - 1 / (2 * beta)).square()


def discopop_loss(margins: Tensor, *, beta: float, temperature: float = 0.05) -> Tensor:
    """DiscoPOP, log-ratio modulated: (1 − σ(x/τ)) · (−log σ(x)) + σ(x/τ) · e^−x,   x = βΔ.

    Logistic where the pair is ordered wrongly, exponential where rightly, and with a dent in between: not convex.

    Args: as `sigmoid_loss`; temperature τ > 0. β is 0.05 in the paper.
    Source: Lu et al. 2024, arXiv:2406.08414, eq. 5.
    """
    require_positive(temperature=temperature)
    logits = _logits(margins, beta)
    # σ(x/τ) · e^−x in one exponent: far to the left it is 0 · ∞ otherwise.
    exponential = (logsigmoid(logits / temperature) - logits).clamp(max=LARGEST_LOG_RATIO).exp()
    return -logsigmoid(logits) * (-logits / temperature).sigmoid() + exponential


def nca_pair_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """NCA for pairs: −log σ(βh_w) − ½ log σ(−βh_w) − ½ log σ(−βh_l).

    Each answer's own likelihood is held in place, not only the difference. β is 0.01 in the paper.

    Args:
        chosen_log_ratios, rejected_log_ratios: float [N], h_w and h_l.
        beta: β > 0.
    Source: Chen et al. 2024, arXiv:2402.05369.
    """
    chosen, rejected = _rewards(chosen_log_ratios, rejected_log_ratios, beta)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair_loss(
    chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float, reward_shift: float = 0.0
) -> Tensor:
    """BCO for pairs: −log σ(βh_w − δ) − log σ(−(βh_l − δ)), a classifier of single answers.

    δ is a mean of rewards that `running_reward_shift` takes over whole optimizer batches; the default 0 is TRL 1.16's.
    β is 0.01 in the paper.

    Args: as `nca_pair_loss`; reward_shift δ, in units of the reward βh.
    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    chosen, rejected = _rewards(chosen_log_ratios, rejected_log_ratios, beta)
    return -logsigmoid(chosen - reward_shift) - logsigmoid(reward_shift - rejected)


def running_reward_shift(
    state: tuple[float, int], chosen_rewards: Tensor, rejected_rewards: Tensor
) -> tuple[float, int]:
    """BCO's δ: the mean of every reward seen so far, chosen and rejected.

    Args:
        state: (δ, how many rewards it is the mean of), at first (0.0, 0).
        chosen_rewards, rejected_rewards: float [N] of the whole optimizer batch, from `implicit_rewards`.
    Returns: the new state; its first number is δ for this batch, every micro-batch alike.
    Raises: ValueError if shapes differ.
    Source: Jung et al. 2024, arXiv:2404.04656; the plain running mean is that of TRL's earlier releases.
    """
    require_rows(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    mean, count = state
    rewards = torch.cat([chosen_rewards.detach(), rejected_rewards.detach()]).double()
    total = count + rewards.numel()
    return (mean + float((rewards - mean).sum()) / total, total) if total else state


def sppo_hard_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """SPPO with labels for probabilities: (h_w − 1/(2β))² + (h_l + 1/(2β))².

    The paper's target is η(P − ½), η = 1/β, with P the estimated chance to beat the policy; here P is 1 or 0.

    Args: as `nca_pair_loss`.
    Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7.
    """
    require_positive(beta=beta)
    require_rows(chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    target = 1 / (2 * beta)
    return (at_least_float32(chosen_log_ratios) - target).square() + (
        at_least_float32(rejected_log_ratios) + target
    ).square()


def apo_zero_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """APO-zero: σ(−βh_w) + σ(βh_l): chosen up, rejected down. For data better than the policy.

    Args: as `nca_pair_loss`; β is 0.1 in the paper.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    chosen, rejected = _rewards(chosen_log_ratios, rejected_log_ratios, beta)
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down_loss(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, *, beta: float) -> Tensor:
    """APO-down: σ(βh_w) + σ(−β(h_w − h_l)): both down, rejected further. For a policy better than its data.

    Args: as `nca_pair_loss`.
    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    chosen, rejected = _rewards(chosen_log_ratios, rejected_log_ratios, beta)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def aot_loss(upper: Tensor, lower: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Alignment by optimal transport: `sigmoid_loss` of the k-th smallest against the k-th smallest.

        Δ_k = upper_(k) − lower_(k),   both sorted over the batch

    so that the distribution of `upper` comes to dominate that of `lower`. "aot" (paired) compares the policy's margins
    log π(y_w) − log π(y_l) with the reference's; "aot_unpaired" compares h_w with h_l, of answers that need not share
    a prompt, and is what TRL's older releases called `aot_pair`. Row n holds the loss of upper's n-th entry, whichever
    its partner. Sorting pairs rows across the batch, so parts of it do not add up to the whole.

    Args: upper, lower: float [N], of the whole optimizer batch; otherwise as `sigmoid_loss`.
    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    require_rows(upper=upper, lower=lower)
    partners = torch.zeros_like(lower).scatter(0, upper.argsort(), lower.sort().values)
    return sigmoid_loss(
        at_least_float32(upper) - at_least_float32(partners), beta=beta, label_smoothing=label_smoothing
    )


def sft_loss(chosen_logprobs: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Mean negative log-likelihood of the chosen answer's tokens, −log π(y_w) / |y_w|, to be mixed with another loss.

    The mean over rows is a mean of means. TRL's is over the tokens of its micro-batch, which depends on the split; for
    a mean over all tokens of the optimizer batch pass the batch's mean length, the same number in every row.

    Args:
        chosen_logprobs: float [N].
        chosen_lengths: int or float [N], > 0; an empty answer counts as one token.
    """
    return -per_token(chosen_logprobs, chosen_lengths)


def per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    """Sums over tokens divided by how many there are; by 1 where there is none.

    Args:
        sums: float [N].
        lengths: int or float [N], ≥ 0.
    """
    require_rows(sums=sums, lengths=lengths)
    return at_least_float32(sums) / lengths.clamp(min=1)


def _logits(margins: Tensor, beta: float) -> Tensor:
    require_positive(beta=beta)
    require_rows(margins=margins)
    return beta * at_least_float32(margins)


def _rewards(chosen_log_ratios: Tensor, rejected_log_ratios: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    require_positive(beta=beta)
    require_rows(chosen_log_ratios=chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    return beta * at_least_float32(chosen_log_ratios), beta * at_least_float32(rejected_log_ratios)
