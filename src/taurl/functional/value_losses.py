"""How far values are off: losses of V (or Q, or of any score) against targets, and the variance that they explain.

Losses are per element, any shape, and the caller weighs them; an element of weight 0 must still be finite, as a
network's output at padding and the 0 that the token returns have there are. Only the values get a gradient. Every
squared error has the factor ½, so that its slope is the error itself, Huber's loss is the same near the target, and one
coefficient fits all of them.
"""

import torch
from torch import Tensor

from taurl.functional._inputs import of_one_dtype, require_same_shape


def squared_value_loss(values: Tensor, targets: Tensor) -> Tensor:
    """½ (V − target)² per element, with gradient V − target.

    Stable-Baselines3's PPO and A2C leave out the half: a value coefficient of theirs is twice as much here (its 0.5 is
    1).

    Args:
        values: float, any shape.
        targets: float, the same shape; gets no gradient.
    Returns: loss, the same shape.
    Raises: ValueError if shapes differ.
    """
    return 0.5 * _value_errors(values, targets).square()


def huber_value_loss(values: Tensor, targets: Tensor, *, threshold: float = 1.0) -> Tensor:
    """Huber's loss: squared near the target, linear beyond, so that one outlier does not rule the gradient.

        ½ e²            |e| ≤ κ,   e = V − target
        κ (|e| − ½ κ)   otherwise

    The gradient is e clipped to [−κ, κ]. κ = 1 is what DQN and Stable-Baselines3's DQN use.

    Args:
        values: float, any shape.
        targets: float, the same shape; gets no gradient.
        threshold: κ > 0; `math.inf` for the squared loss.
    Returns: loss, the same shape.
    Raises: ValueError if shapes differ or κ is not positive.
    Source: Huber 1964, "Robust Estimation of a Location Parameter", Annals of Mathematical Statistics 35(1).
    """
    if not threshold > 0:
        raise ValueError(f"threshold is {threshold}, expected a positive number")
    sizes = _value_errors(values, targets).abs()
    quadratic = sizes.clamp(max=threshold)  # both branches in one: no square of a large error, no 0 · ∞ in backward
    return quadratic * (sizes - 0.5 * quadratic)


def clipped_value_loss(values: Tensor, old_values: Tensor, targets: Tensor, *, clip: float) -> Tensor:
    """PPO's value loss: no gain from moving V further than ε from what it was when the data was sampled.

        ½ max( (V − target)², (V_old + clip(V − V_old, −ε, ε) − target)² )

    The gradient is V − target, except where V is more than ε away from V_old and nearer to the target than the value at
    ε, clip(V, V_old − ε, V_old + ε), is: there it is 0. This is the value loss of OpenAI's PPO code, not of the paper.
    Stable-Baselines3's `clip_range_vf` leaves out the maximum (and the half): a V that strayed *away* from its target
    by more than ε gets no gradient there and stays astray; here it is pulled back. ε is in units of V, so it depends on
    the scale of the rewards.

    Args:
        values: float, any shape.
        old_values, targets: float, the same shape; get no gradient.
        clip: ε ≥ 0; `math.inf` for the squared loss.
    Returns: loss, the same shape.
    Raises: ValueError if shapes differ or ε is negative.
    """
    if not clip >= 0:
        raise ValueError(f"clip is {clip}, expected at least 0")
    require_same_shape(values=values, old_values=old_values, targets=targets)
    values, old_values, targets = of_one_dtype(values, old_values.detach(), targets)
    near = values.clamp(old_values - clip, old_values + clip)
    return torch.maximum(squared_value_loss(values, targets), squared_value_loss(near, targets))


@torch.no_grad()
def explained_variance(values: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much of the returns' variance the critic explains, 1 − Var(target − V) / Var(target).

    1 for a critic that is right up to a constant, 0 for one that knows no more than the mean, negative for worse.
    NaN where there is nothing to explain: all targets equal, or fewer than two. It needs the whole batch at once.

    Args:
        values, targets: float, any shape.
        mask: bool, the same shape, the elements that count; by default all. The others may be anything.
    Returns: a number, [], detached.
    Raises: ValueError if shapes differ or the mask is not boolean.
    """
    require_same_shape(values=values, targets=targets)
    dtype = of_one_dtype(values, targets)[0].dtype
    if mask is not None:
        require_same_shape(values=values, mask=mask)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}, expected torch.bool")
        values, targets = values[mask], targets[mask]
    values, targets = values.double(), targets.double()  # a metric: squares of large float32 may as well not overflow
    # Compared and not computed: the mean of equal floats may be off by a rounding.
    if targets.numel() == 0 or targets.amin() == targets.amax():
        return torch.full((), torch.nan, dtype=dtype, device=targets.device)
    return (1 - (targets - values).var(correction=0) / targets.var(correction=0)).to(dtype)


def _value_errors(values: Tensor, targets: Tensor) -> Tensor:
    require_same_shape(values=values, targets=targets)
    values, targets = of_one_dtype(values, targets.detach())
    return values - targets
