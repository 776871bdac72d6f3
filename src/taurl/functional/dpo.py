"""`dpo_loss`, the one door to the losses of `direct_preference`: log-probabilities and a name in, a loss a pair out."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from taurl.functional import direct_preference as losses
from taurl.functional._inputs import at_least_float32, require_label_smoothing, require_positive, require_rows
from taurl.functional.log_ratios import Divergence, divergence_scores


class _Pairs(NamedTuple):
    """What the losses choose from; each [N] or a number."""

    logprobs: Tensor  # of the chosen answers
    chosen: Tensor  # h_w
    rejected: Tensor  # h_l
    margins: Tensor  # Δ, of divergence scores
    margins_per_token: Tensor | None  # f'(w)/|y_w| − f'(l)/|y_l|
    policy_margins: Tensor  # log π(y_w) − log π(y_l)
    reference_margins: Tensor
    chosen_lengths: Tensor | None
    beta: float
    label_smoothing: float
    discopop_temperature: float
    reward_shift: float


_LOSSES: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": lambda p: losses.sigmoid_loss(p.margins, beta=p.beta, label_smoothing=p.label_smoothing),
    "sigmoid_norm": lambda p: losses.sigmoid_loss(
        _given(p.margins_per_token), beta=p.beta, label_smoothing=p.label_smoothing
    ),
    "robust": lambda p: losses.robust_loss(p.margins, beta=p.beta, label_smoothing=p.label_smoothing),
    "exo_pair": lambda p: losses.exo_pair_loss(p.margins, beta=p.beta, label_smoothing=p.label_smoothing),
    "hinge": lambda p: losses.hinge_loss(p.margins, beta=p.beta),
    "ipo": lambda p: losses.ipo_loss(_given(p.margins_per_token), beta=p.beta),
    "discopop": lambda p: losses.discopop_loss(p.margins, beta=p.beta, temperature=p.discopop_temperature),
    "nca_pair": lambda p: losses.nca_pair_loss(p.chosen, p.rejected, beta=p.beta),
    "bco_pair": lambda p: losses.bco_pair_loss(p.chosen, p.rejected, beta=p.beta, reward_shift=p.reward_shift),
    "sppo_hard": lambda p: losses.sppo_hard_loss(p.chosen, p.rejected, beta=p.beta),
    "apo_zero": lambda p: losses.apo_zero_loss(p.chosen, p.rejected, beta=p.beta),
    "apo_down": lambda p: losses.apo_down_loss(p.chosen, p.rejected, beta=p.beta),
    "aot": lambda p: losses.aot_loss(
        p.policy_margins, p.reference_margins, beta=p.beta, label_smoothing=p.label_smoothing
    ),
    "aot_unpaired": lambda p: losses.aot_loss(p.chosen, p.rejected, beta=p.beta, label_smoothing=p.label_smoothing),
    "sft": lambda p: losses.sft_loss(p.logprobs, _given(p.chosen_lengths)),
}

DEFAULT_ALPHA = 0.5
DEFAULT_DISCOPOP_TEMPERATURE = 0.05
DPO_LOSSES = frozenset(_LOSSES)
# These sort over the batch: a trainer gives them the whole optimizer batch at once, or refuses.
WHOLE_BATCH_LOSSES = frozenset({"aot", "aot_unpaired"})
SMOOTHED_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"})
DIVERGENCE_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "hinge", "ipo", "discopop"})


def dpo_loss(
    loss_type: str | Mapping[str, float],
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    reference_chosen_logprobs: Tensor,
    reference_rejected_logprobs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    divergence: Divergence = "reverse_kl",
    alpha: float = DEFAULT_ALPHA,
    discopop_temperature: float = DEFAULT_DISCOPOP_TEMPERATURE,
    reward_shift: float = 0.0,
) -> Tensor:
    """Any loss of the DPO family, one number per pair; TRL 1.16's names and defaults.

        h_w = log π(y_w) − log π_ref(y_w),  h_l likewise,  Δ = h_w − h_l,  per token: δ = h_w/|y_w| − h_l/|y_l|

        name          loss                                                     label smoothing ε   divergence
        sigmoid       −log σ(βΔ)                                               yes                 yes
        sigmoid_norm  −log σ(βδ)                                               yes                 yes
        robust        DPO, unbiased under labels flipped with probability ε    yes                 yes
        exo_pair      KL( policy's preference ‖ label )                        needed, > 0         yes
        hinge         max(0, 1 − βΔ)                                                               yes
        ipo           (δ − 1/(2β))²                                                                yes
        discopop      between −log σ(βΔ) and e^−βΔ                                                 yes
        nca_pair      −log σ(βh_w) − ½ log σ(−βh_w) − ½ log σ(−βh_l)
        bco_pair      −log σ(βh_w − shift) − log σ(shift − βh_l)
        sppo_hard     (h_w − 1/(2β))² + (h_l + 1/(2β))²
        apo_zero      σ(−βh_w) + σ(βh_l)
        apo_down      σ(βh_w) + σ(−βΔ)
        aot           −log σ of sorted policy against sorted reference margins yes
        aot_unpaired  −log σ of sorted h_w against sorted h_l                  yes
        sft           −log π(y_w) / |y_w|

    Each is the function NAME_loss of `direct_preference`, which says more and names the paper. A mapping such as
    {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0} gives the weighted sum (MPO); all share β and the other options.

    A label smoothing, reward shift, DiscoPOP temperature or α other than the default is refused where no loss of the
    mixture reads it, rather than ignored, and with a divergence so is every loss that does not take Δ, for the reason
    in `divergence_scores`. Lengths are no option but facts, and may always be given. TRL 1.16 reads ε in "robust",
    "exo_pair" and the two "aot" only and ignores it elsewhere, "sigmoid" included.

    Args:
        loss_type: a name of the table, or names with weights.
        chosen_logprobs, rejected_logprobs: float [N], log π(y_w) and log π(y_l), from `sequence_logprobs` or
            `length_desensitized_logprobs`.
        reference_chosen_logprobs, reference_rejected_logprobs: float [N], of the reference.
        beta: β > 0; the named functions say what their papers take.
        label_smoothing: ε in [0, ½).
        chosen_lengths, rejected_lengths: int [N], |y_w| and |y_l|; "sigmoid_norm" and "ipo" need both, "sft" the first.
        divergence, alpha: of `divergence_scores`; α for "alpha_divergence".
        discopop_temperature: τ > 0, of "discopop".
        reward_shift: δ of "bco_pair", from `running_reward_shift`.
    Returns: loss, [N]; float32, or float64 for float64. The loss of a part of the batch is that part of the loss,
        except for WHOLE_BATCH_LOSSES.
    Raises: ValueError if shapes differ, a name is unknown, a weight is not finite, lengths are missing, or an option
        is out of range or has no loss that reads it.
    Source: mixtures: Wang et al. 2024, arXiv:2411.10442; the rest where the table points.
    """
    mixture = {loss_type: 1.0} if isinstance(loss_type, str) else dict(loss_type)
    _require_known(mixture)
    _require_read(
        set(mixture),
        label_smoothing=label_smoothing,
        divergence=divergence,
        alpha=alpha,
        discopop_temperature=discopop_temperature,
        reward_shift=reward_shift,
    )
    _require_lengths(set(mixture), chosen_lengths, rejected_lengths)
    require_positive(beta=beta)
    require_rows(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        reference_chosen_logprobs=reference_chosen_logprobs,
        reference_rejected_logprobs=reference_rejected_logprobs,
    )
    pairs = _pairs(
        (chosen_logprobs, rejected_logprobs),
        (reference_chosen_logprobs.detach(), reference_rejected_logprobs.detach()),
        (chosen_lengths, rejected_lengths),
        lambda log_ratios: divergence_scores(log_ratios, divergence, alpha=alpha),
        beta=beta,
        label_smoothing=label_smoothing,
        discopop_temperature=discopop_temperature,
        reward_shift=reward_shift,
    )
    return torch.stack([weight * _LOSSES[name](pairs) for name, weight in mixture.items()]).sum(0)


def _pairs(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    lengths: tuple[Tensor | None, Tensor | None],
    scored: Callable[[Tensor], Tensor],
    **options: float,
) -> _Pairs:
    """What the losses take, from log-probabilities and lengths of the chosen and the rejected ones."""
    policy_w, policy_l = map(at_least_float32, policy)
    reference_w, reference_l = map(at_least_float32, reference)
    chosen, rejected = policy_w - reference_w, policy_l - reference_l
    scores_w, scores_l = scored(chosen), scored(rejected)
    lengths_w, lengths_l = lengths
    per_token = None
    if lengths_w is not None and lengths_l is not None:
        per_token = losses.per_token(scores_w, lengths_w) - losses.per_token(scores_l, lengths_l)
    return _Pairs(
        logprobs=policy_w,
        chosen=chosen,
        rejected=rejected,
        margins=scores_w - scores_l,
        margins_per_token=per_token,
        policy_margins=policy_w - policy_l,
        reference_margins=reference_w - reference_l,
        chosen_lengths=lengths_w,
        **options,
    )


def _require_known(mixture: Mapping[str, float]) -> None:
    names = set(mixture)
    if not names or names - DPO_LOSSES:
        raise ValueError(f"loss_type is {sorted(names)}, expected one or more of {', '.join(_LOSSES)}")
    for name, weight in mixture.items():
        if not isfinite(weight):
            raise ValueError(f"the weight of {name!r} is {weight}, expected a finite number")


def _require_read(
    names: set[str],
    *,
    label_smoothing: float,
    divergence: str,
    alpha: float,
    discopop_temperature: float,
    reward_shift: float,
) -> None:
    """Raise a ValueError for an option, other than its default, that none of these losses reads."""
    require_label_smoothing(label_smoothing)
    if label_smoothing and not names & SMOOTHED_LOSSES:
        raise ValueError(f"label_smoothing is {label_smoothing}, but none of {sorted(names)} reads it")
    if divergence != "reverse_kl" and names - DIVERGENCE_LOSSES - {"sft"}:
        raise ValueError(
            f"divergence is {divergence!r}, but {sorted(names - DIVERGENCE_LOSSES - {'sft'})} are defined for "
            "'reverse_kl' only"
        )
    if alpha != DEFAULT_ALPHA and divergence != "alpha_divergence":
        raise ValueError(f"alpha is {alpha}, but divergence {divergence!r} does not read it")
    if discopop_temperature != DEFAULT_DISCOPOP_TEMPERATURE and "discopop" not in names:
        raise ValueError(f"discopop_temperature is {discopop_temperature}, but only 'discopop' reads it")
    if reward_shift and "bco_pair" not in names:
        raise ValueError(f"reward_shift is {reward_shift}, but only 'bco_pair' reads it")


def _require_lengths(names: set[str], chosen_lengths: Tensor | None, rejected_lengths: Tensor | None) -> None:
    if names & {"sigmoid_norm", "ipo"} and (chosen_lengths is None or rejected_lengths is None):
        raise ValueError("'sigmoid_norm' and 'ipo' need chosen_lengths and rejected_lengths")
    if "sft" in names and chosen_lengths is None:
        raise ValueError("'sft' needs chosen_lengths")


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # `_require_lengths` saw to it
    return tensor
