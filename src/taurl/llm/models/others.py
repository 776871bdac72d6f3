"""Other models that a run is given beside the policy (reference, critic, judge): what is refused, what they share."""

from pathlib import Path
from typing import Any

from taurl.llm.models.heads import causal_lm, context_length, known_tokens
from taurl.llm.models.loading import load_outline, load_tokenizer, resolve_model
from taurl.llm.models.policies import Policy, share_weights
from taurl.llm.models.precision import cast_weights
from taurl.runtime.errors import InputError


def check_reference(reference: Any, policy: Policy) -> None:
    """Look at a reference, given by name or as an object, before it is taken.

    Raises: InputError where it is the trained object, reads other tokens than the policy or fewer of them.
    """
    _require_context("reference", reference, policy)
    if isinstance(reference, str):
        _require_same_tokens("reference", reference, policy)
    else:
        _require_apart(
            reference,
            policy.model,
            "the reference is the very object that is trained; leave it out for the starting weights",
        )
    outline = load_outline(reference) if isinstance(reference, str) else reference
    own, other = known_tokens(policy.model), known_tokens(outline)
    if other < min(own, len(policy.tokenizer)):  # a tokenizer may have tokens that its own model does not know
        raise InputError(f"the reference knows {other} tokens and the model {own}; give one of the same family")


def check_critic(critic: Any, reference: Any, policy: Policy) -> None:
    """Look at a model that a critic is to start from, by name or as an object.

    Raises: InputError where it is the trained object or the reference, has another tokenizer than the policy, or reads
        fewer tokens.
    """
    _require_context("critic", critic, policy)
    if isinstance(critic, str):
        if (Path(resolve_model(critic)) / "tokenizer_config.json").is_file():
            _require_same_tokens("critic", critic, policy)
        return
    _require_apart(critic, policy.model, "the critic is the very object that is trained; set critic to copy")
    own, other = known_tokens(policy.model), known_tokens(critic)
    if own != other:  # who names it has its tokenizer compared
        raise InputError(
            f"the critic's model knows {other} tokens and the policy {own}: give one of the same family, by its name"
        )
    if reference is not None and not isinstance(reference, str) and causal_lm(critic) is causal_lm(reference):
        raise InputError("critic and reference are one object; give each a model of its own")


def settle_judge(judge: Any, trained: list[Any], policy: Policy) -> str | None:
    """Freeze a reward model; one that is an adapter on the policy's base reads the base's weights there.

    It takes the policy's dtype for that where its own is wider: its base then is rounded as the policy's is.

    Args:
        trained: the models that gradients go through.
    Returns: what is shared, as a line to show; None where nothing could be.
    Raises: InputError where the judge is one of those that are trained.
    """
    for model in trained:
        _require_apart(judge, model, "the model of a reward function is trained itself; give it a copy")
    judge.requires_grad_(False)
    own = policy.model
    if not (policy.has_adapter and hasattr(judge, "peft_config")):
        share_weights(judge, own)
        return None
    base = causal_lm(judge).config.name_or_path
    if base and base == causal_lm(own).config.name_or_path and judge.dtype.itemsize > own.dtype.itemsize:
        cast_weights(judge, own.dtype)
    if saved := share_weights(judge, own):
        dtype = str(own.dtype).removeprefix("torch.")
        return f"the reward model reads {saved / 1e6:.1f} MB of the policy's frozen weights, in {dtype} as they are"
    dtypes = f"its weights are {judge.dtype}, the policy's {own.dtype}".replace("torch.", "")
    return f"the reward model shares nothing with the policy: {dtypes if judge.dtype != own.dtype else 'another base'}"


def _require_same_tokens(role: str, name: str, policy: Policy) -> None:
    if load_tokenizer(name).get_vocab() != policy.tokenizer.get_vocab():
        raise InputError(
            f"{role} '{name}' has another tokenizer than the model: the same text would be other tokens; give a "
            "model of the same family"
        )


def _require_context(role: str, model: Any, policy: Policy) -> None:
    """Refuse a model that does not see as far as the policy: of a longer row it would confuse the positions."""
    length = context_length(load_outline(model) if isinstance(model, str) else causal_lm(model))
    own = context_length(causal_lm(policy.model))
    if length is not None and (own is None or length < own):
        seen = "any number" if own is None else own
        raise InputError(f"the {role} sees {length} tokens at most, the model {seen}: give one that sees as many")


def _require_apart(model: Any, trained: Any, message: str) -> None:
    """Refuse a model that holds weights which another one trains. Frozen ones may be shared."""
    own = {id(weight) for weight in trained.parameters() if weight.requires_grad}
    if any(id(weight) in own for weight in model.parameters()):
        raise InputError(message)
