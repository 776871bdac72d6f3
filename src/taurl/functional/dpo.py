"""`dpo_loss`, the one door to the losses of `direct_preference`: log-probabilities and a name in, a loss a pair out."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import cast

import torch
from torch import Tensor

from taurl.functional import direct_preference as losses
from taurl.functional._inputs import at_least_float32, require_label_smoothing, require_positive, require_rows
from taurl.functional.log_ratios import Divergence, divergence_scores

DEFAULT_ALPHA = 0.5
DEFAULT_DISCOPOP_TEMPERATURE = 0.05
# These sort over the batch: a trainer gives them the whole optimizer batch at once, or refuses.
WHOLE_BATCH_LOSSES = frozenset({"aot", "aot_unpaired"})
SMOOTHED_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"})
DIVERGENCE_LOSSES = frozenset({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "hinge", "ipo", "discopop"})
DPO_LOSSES = DIVERGENCE_LOSSES | WHOLE_BATCH_LOSSES
DPO_LOSSES |= {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft"}


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
    policy_w, policy_l = map(at_least_float32, (chosen_logprobs, rejected_logprobs))
    reference_w, reference_l = (
        at_least_float32(logprobs.detach()) for logprobs in (reference_chosen_logprobs, reference_rejected_logprobs)
    )
    h_w, h_l = policy_w - reference_w, policy_l - reference_l
    scores_w, scores_l = (divergence_scores(log_ratios, divergence, alpha=alpha) for log_ratios in (h_w, h_l))
    margins = scores_w - scores_l
    lengths_w, lengths_l = cast(Tensor, chosen_lengths), cast(Tensor, rejected_lengths)  # there where they are read

    def per_token() -> Tensor:
        return losses.per_token(scores_w, lengths_w) - losses.per_token(scores_l, lengths_l)

    smoothed = {"beta": beta, "label_smoothing": label_smoothing}
    table: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: losses.sigmoid_loss(margins, **smoothed),
        "sigmoid_norm": lambda: losses.sigmoid_loss(per_token(), **smoothed),
        "robust": lambda: losses.robust_loss(margins, **smoothed),
        "exo_pair": lambda: losses.exo_pair_loss(margins, **smoothed),
        "hinge": lambda: losses.hinge_loss(margins, beta=beta),
        "ipo": lambda: losses.ipo_loss(per_token(), beta=beta),
        "discopop": lambda: losses.discopop_loss(margins, beta=beta, temperature=discopop_temperature),
        "nca_pair": lambda: losses.nca_pair_loss(h_w, h_l, beta=beta),
        "bco_pair": lambda: losses.bco_pair_loss(h_w, h_l, beta=beta, reward_shift=reward_shift),
        "sppo_hard": lambda: losses.sppo_hard_loss(h_w, h_l, beta=beta),
        "apo_zero": lambda: losses.apo_zero_loss(h_w, h_l, beta=beta),
        "apo_down": lambda: losses.apo_down_loss(h_w, h_l, beta=beta),
        "aot": lambda: losses.aot_loss(policy_w - policy_l, reference_w - reference_l, **smoothed),
        "aot_unpaired": lambda: losses.aot_loss(h_w, h_l, **smoothed),
        "sft": lambda: losses.sft_loss(policy_w, lengths_w),
    }
    return torch.stack([weight * table[name]() for name, weight in mixture.items()]).sum(0)


def _require_known(mixture: Mapping[str, float]) -> None:
    names = set(mixture)
    if not names or names - DPO_LOSSES:
        raise ValueError(f"loss_type is {sorted(names)}, expected one or more of {', '.join(sorted(DPO_LOSSES))}")
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
