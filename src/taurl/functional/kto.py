"""KTO: a policy learns from single answers that were liked or not, without pairs."""

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, require_positive, require_rows


def kl_baseline(logprobs: Tensor, reference_logprobs: Tensor) -> float:
    """KTO's reference point z₀, an estimate of KL(π ‖ π_ref), once over the whole optimizer batch.

        z₀ = max( 0, mean_i [ log π(y'_i | x_i) − log π_ref(y'_i | x_i) ] )

    y'_i is an answer that does not belong to x_i: that of another row of the batch, by convention the next. It is a
    biased, cheap stand-in for a sample of π. Every micro-batch gets the same z₀; TRL takes it over each micro-batch.

    Args:
        logprobs, reference_logprobs: float [N], of the mismatched answers.
    Returns: z₀ in nats (without β), a number; 0 for an empty batch, NaN if a log-probability is.
    Raises: ValueError if shapes differ.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    require_rows(logprobs=logprobs, reference_logprobs=reference_logprobs)
    log_ratios = logprobs.detach().double() - reference_logprobs.detach().double()
    return log_ratios.mean().clamp(min=0.0).item() if len(log_ratios) else 0.0


def kto_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    desirable: Tensor,
    *,
    kl_baseline: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman–Tversky optimization, one loss per answer.

        h = log π(y) − log π_ref(y)
        loss = λ_D · σ( −β(h − z₀) )   liked: a gain over z₀ that levels off
               λ_U · σ(  β(h − z₀) )   disliked: a loss that levels off

    The gradient is strongest where h is near z₀, and gone for answers far on either side. The weights even out unequal
    numbers: TRL 1.16 warns unless λ_D · (number liked) is 1 to 1.33 times λ_U · (number disliked), and names the
    paper's eq. 8 for it. A kl_baseline of 0 is TRL's `apo_zero_unpaired`.

    Args:
        logprobs, reference_logprobs: float [N], of whole answers.
        desirable: bool [N].
        kl_baseline: z₀ ≥ 0, from `kl_baseline` over the whole optimizer batch.
        beta: β > 0.
        desirable_weight, undesirable_weight: λ_D, λ_U ≥ 0.
    Returns: loss, [N]; float32, or float64 for float64; NaN for a kl_baseline of NaN. The constants of the paper's
        λ − v are in it: the loss is in [0, λ].
    Raises: ValueError if shapes differ, desirable is not boolean or a number is out of range.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    require_rows(logprobs=logprobs, reference_logprobs=reference_logprobs, desirable=desirable)
    require_positive(beta=beta)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable is {desirable.dtype}, expected torch.bool")
    if kl_baseline < 0:  # NaN, of log-probabilities that are not finite, goes on into the losses
        raise ValueError(f"kl_baseline is {kl_baseline}, expected a number of at least 0")
    if not (desirable_weight >= 0 and undesirable_weight >= 0):
        raise ValueError(f"weights are {desirable_weight} and {undesirable_weight}, expected both to be at least 0")
    gains = beta * (at_least_float32(logprobs) - at_least_float32(reference_logprobs.detach()) - kl_baseline)
    return torch.where(desirable, desirable_weight * (-gains).sigmoid(), undesirable_weight * gains.sigmoid())
