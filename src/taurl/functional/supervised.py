"""Losses of supervised fine-tuning, one per token, from what `logprobs.score_tokens` gives. p is the model's
distribution, y the token that the data has; the mean over the tokens of the whole batch is descended.
"""

import torch
from torch import Tensor

from taurl.functional._inputs import at_least_float32, require_label_smoothing, require_same_shape


def nll_loss(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood, −log p_y. Its mean is the cross-entropy, and exp of that the perplexity.

    Args:
        logprobs: float, any shape.
    Returns: loss, of that shape; float32, or float64 for float64.
    """
    return -at_least_float32(logprobs)


def smoothed_loss(logprobs: Tensor, mean_logprobs: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross-entropy against a share ε of all tokens alike: −(1 − ε) log p_y − ε · 1/V Σ_v log p_v.

    Args:
        logprobs: float, any shape.
        mean_logprobs: of that shape, the mean over the vocabulary.
        label_smoothing: ε in [0, ½).
    Returns: loss, of that shape; float32, or float64 for float64.
    Raises: ValueError if shapes differ or ε is out of range.
    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7; the convention of torch's cross_entropy.
    """
    require_same_shape(logprobs=logprobs, mean_logprobs=mean_logprobs)
    require_label_smoothing(label_smoothing)
    losses = nll_loss(logprobs)
    if label_smoothing == 0:  # a mean of −∞ (forbidden tokens) times 0 would be NaN
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * at_least_float32(mean_logprobs)


def dft_loss(logprobs: Tensor) -> Tensor:
    """Dynamic fine-tuning: −p_y log p_y with p_y as a constant, so that its gradient is −∇p_y.

    The gradient of −log p_y is that of a policy gradient with the reward 1/p_y, which is wild where a token is
    unlikely; times p_y the reward is 1 everywhere.

    Args:
        logprobs: float, any shape.
    Returns: loss, of that shape; float32, or float64 for float64.
    Source: Wu et al. 2025, arXiv:2508.05629, eq. 8.
    """
    losses = nll_loss(logprobs)
    probabilities = (-losses.detach()).exp()
    return probabilities * torch.where(probabilities == 0, 0.0, losses)  # the limit of −p log p


def z_loss(log_normalizers: Tensor, *, coefficient: float) -> Tensor:
    """c · (log Z)², added to another loss: it holds log Z near 0, so that the logits do not drift off.

    Args:
        log_normalizers: float, any shape, log Σ_v exp z_v.
        coefficient: c ≥ 0; PaLM has 1e-4.
    Returns: loss, of that shape; float32, or float64 for float64.
    Raises: ValueError if the coefficient is negative.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, section 5.
    """
    if not coefficient >= 0:
        raise ValueError(f"coefficient is {coefficient}, expected at least 0")
    return coefficient * at_least_float32(log_normalizers).square()
