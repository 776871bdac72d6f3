"""Losses of pairs without a reference model: CPO, SimPO, ORPO. One per pair, to be minimized, each of its row alone.

w is the chosen answer, l the rejected one, ℓ = log π(y) of a whole answer and ℓ̄ = ℓ/|y| per token. Where a likelihood
of the chosen answer is added it is −ℓ̄_w, whose mean over rows is a mean of means; `direct_preference.sft_loss` says
how to get a mean over all tokens instead.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from taurl.functional._inputs import at_least_float32, require_positive, require_rows
from taurl.functional.direct_preference import per_token, sft_loss, sigmoid_loss


def cpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float = 0.1,
    likelihood_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """CPO: −log σ( β(ℓ_w − ℓ_l) ) − α ℓ̄_w; DPO with a uniform reference, and a likelihood to hold the policy in place.

    Args:
        chosen_logprobs, rejected_logprobs: float [N], ℓ_w and ℓ_l, sums over tokens.
        chosen_lengths: int [N].
        beta: β > 0.
        likelihood_weight: α ≥ 0; TRL calls it `cpo_alpha`. Its likelihood is a mean over the tokens of the micro-batch.
        label_smoothing: ε in [0, ½), as `sigmoid_loss`.
    Returns: loss, [N]; float32, or float64 for float64.
    Raises: ValueError if shapes differ or a number is out of range.
    Source: Xu et al. 2024, arXiv:2401.08417.
    """
    require_rows(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs, chosen_lengths=chosen_lengths)
    if not likelihood_weight >= 0:
        raise ValueError(f"likelihood_weight is {likelihood_weight}, expected at least 0")
    margins = at_least_float32(chosen_logprobs) - at_least_float32(rejected_logprobs)
    preference = sigmoid_loss(margins, beta=beta, label_smoothing=label_smoothing)
    return preference + likelihood_weight * sft_loss(chosen_logprobs, chosen_lengths)


def simpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    target_margin: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO: −log σ( β(ℓ̄_w − ℓ̄_l) − γ ).

    Rewards are per token, so β is 2 and more; TRL's default of 0.1, DPO's, leaves the sigmoid nearly flat.

    Args:
        chosen_logprobs, rejected_logprobs: float [N], ℓ_w and ℓ_l, sums over tokens.
        chosen_lengths, rejected_lengths: int [N].
        beta: β > 0.
        target_margin: γ, in units of the reward βℓ̄; TRL calls it `simpo_gamma` and has 0.5.
        label_smoothing: ε in [0, ½), as `sigmoid_loss`.
    Returns: loss, [N]; float32, or float64 for float64.
    Raises: ValueError if shapes differ or a number is out of range.
    Source: Meng et al. 2024, arXiv:2405.14734.
    """
    require_positive(beta=beta)
    require_rows(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    margins = per_token(chosen_logprobs, chosen_lengths) - per_token(rejected_logprobs, rejected_lengths)
    return sigmoid_loss(margins - target_margin / beta, beta=beta, label_smoothing=label_smoothing)


def orpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    odds_weight: float = 0.1,
) -> Tensor:
    """ORPO: likelihood of the chosen answer, plus an odds ratio.

        loss = −ℓ̄_w − λ log σ( log odds_w − log odds_l ),   odds = p/(1 − p),   p = e^ℓ̄

    An answer of probability 1 has infinite odds: p stops one rounding below 1, where its gradient becomes 0 (TRL gives
    NaN there). TRL's likelihood is a mean over the tokens of the micro-batch, those of the prompt included; here it is
    the answer's.

    Args:
        chosen_logprobs, rejected_logprobs: float [N], ℓ_w and ℓ_l, sums over tokens.
        chosen_lengths, rejected_lengths: int [N].
        odds_weight: λ; TRL calls it `beta`.
    Returns: loss, [N]; float32, or float64 for float64.
    Raises: ValueError if shapes differ.
    Source: Hong et al. 2024, arXiv:2403.07691, eq. 4 and 7.
    """
    require_rows(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    chosen, rejected = per_token(chosen_logprobs, chosen_lengths), per_token(rejected_logprobs, rejected_lengths)
    return -chosen - odds_weight * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprobs: Tensor) -> Tensor:
    bounded = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    # log(1 − p): near p = 1 from expm1, which keeps 1 − p exact; far below from log1p, which keeps a small p.
    near = (-torch.expm1(bounded.clamp(min=-1.0))).log()
    far = torch.log1p(-bounded.clamp(max=-0.5).exp())
    return bounded - torch.where(bounded > -0.7, near, far)
