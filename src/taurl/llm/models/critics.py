"""State values for a language model's tokens: a linear head on the hidden states of some trunk.

The value of a token is V of the state in which it was chosen, so it comes from the hidden state that predicts it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taurl.llm.models.heads import body, causal_lm, known_tokens
from taurl.llm.models.loading import load_model, resolve_model, written_head
from taurl.llm.models.policies import Policy, share_weights, switch_off_dropout
from taurl.llm.models.precision import cast_weights
from taurl.llm.models.reward_folder import RewardNote
from taurl.runtime.errors import InputError

ADAPTER = "critic"


class ValueHead(nn.Module):
    """V = w · h + b, in float32, or float64 for a float64 trunk; V = 0 at first."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [N, L] of hidden states [N, L, d]."""
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).squeeze(-1)


class Critic:
    """A value head on a trunk of its own.

    Args:
        head: the value head.
        model: the trunk, a model of `transformers`.
        note: what a person should know of how it starts.

    Attributes:
        shares_trunk: whether the hidden states are the policy's own, so that one forward pass serves both.
    """

    shares_trunk = False

    def __init__(self, head: ValueHead, model: Any, note: str = ""):
        self.head, self.model, self.note = head, model, note

    @contextmanager
    def trunk(self) -> Iterator[Any]:
        """The model whose hidden states the head reads; forward and backward go in here."""
        yield self.model

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the critic's optimiser trains."""
        named = [(f"head.{name}", weight) for name, weight in self.head.named_parameters()]
        return named + [(f"trunk.{name}", weight) for name, weight in self.trunk_parameters()]

    def trunk_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of them below the head."""
        return [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]


class AdapterCritic(Critic):
    """A value head on an adapter of its own, which stands beside the policy's on the same frozen trunk."""

    def __init__(self, head: ValueHead, policy: Policy):
        super().__init__(head, policy.model)
        self.policy = policy
        policy.add_adapter(ADAPTER)

    @contextmanager
    def trunk(self) -> Iterator[Any]:
        with self.policy.adapter(ADAPTER) as model:
            yield model

    def trunk_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self.policy.adapter_parameters(ADAPTER)


class HeadCritic(Critic):
    """A value head on the policy's own hidden states; the policy's optimiser trains what is below the head."""

    shares_trunk = True

    def trunk_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return []


def make_critic(
    kind: str | PreTrainedModel,
    policy: Policy,
    dtype: torch.dtype,
    *,
    normalized: bool = False,
    gradient_checkpointing: bool = False,
) -> Critic | None:
    """The critic of a policy.

    Args:
        kind: "copy", "head", "none", or what the critic starts from: a model's name or object, causal or of rewards.
        dtype: of the head.
        normalized: whether rewards are normalised. The head of a reward model whose folder knows mean and deviation of
            its scores then starts with values that are normalised so.
    Raises: InputError for a model that is not found or reads other tokens than the policy.
    """
    if kind == "none":
        return None
    model: Any = policy.model
    head = ValueHead(hidden_width(model), dtype, model.device)
    if kind == "head":
        return HeadCritic(head, model)
    if kind == "copy" and policy.has_adapter:
        return AdapterCritic(head, policy)
    trunk: Any
    note = ""
    if kind == "copy":
        trunk = copy.deepcopy(body(model)).requires_grad_(True)
    else:
        start: Any = kind
        if isinstance(kind, str):  # a reward model comes with its head
            start = load_model(
                kind, dtype=model.dtype, device=model.device, head=written_head(Path(resolve_model(kind)))[0]
            )
        head = started_head(start, policy, dtype)
        if normalized and not normalize_head(head, RewardNote.for_model(kind)[1]) and head.weight.any():
            note = "the scale of the critic's scores is not known, so that its values start unnormalised"
        trunk = started_trunk(start, policy)
    cast_weights(trunk, model.dtype, model.device)
    switch_off_dropout(trunk)
    if gradient_checkpointing:
        trunk.activation_checkpointing_enable()
    trunk.train(gradient_checkpointing)
    return Critic(head, trunk, note)


def started_trunk(start: Any, policy: Policy) -> Any:
    """What is below the head, ready to be trained: all of it, or, beside a policy with an adapter, its adapter alone.

    The adapter's base then is the policy's own where they are equal.
    """
    if hasattr(start, "peft_config") and policy.has_adapter:
        cast_weights(start, policy.model.dtype, policy.model.device)
        for name, weight in start.named_parameters():
            weight.requires_grad_("lora_" in name)
        share_weights(start, policy.model)
        return start
    whole = start.merge_and_unload() if hasattr(start, "peft_config") else start
    return body(whole).requires_grad_(True)


def started_head(start: Any, policy: Policy, dtype: torch.dtype) -> ValueHead:
    """A value head for another model: that of its reward, if it has one with one output."""
    own, other = known_tokens(policy.model), known_tokens(start)
    if other < min(own, len(policy.tokenizer)):  # models of one family may be padded to different sizes
        raise InputError(f"the critic's model knows {other} tokens and the policy {own}; give one of the same family")
    head = ValueHead(hidden_width(start), dtype, policy.model.device)
    plain = causal_lm(start)
    score: Any = getattr(plain, "score", getattr(plain, "classifier", None))
    if hasattr(score, "modules_to_save"):  # how peft keeps a head that was trained beside an adapter
        score = score.modules_to_save[start.active_adapter]
    if isinstance(score, nn.Linear) and score.out_features == 1:
        with torch.no_grad():
            head.weight.copy_(score.weight)
            if score.bias is not None:
                head.bias.copy_(score.bias)
    return head


@torch.no_grad()
def normalize_head(head: ValueHead, note: RewardNote) -> bool:
    """Let V be (V − mean) / deviation of the scores of the reward model that it comes from, if those are known."""
    if note.mean is None or not note.deviation:
        return False
    head.weight.div_(note.deviation)
    head.bias.sub_(note.mean).div_(note.deviation)
    return True


def hidden_width(model: Any) -> int:
    """The size d of a model's hidden states."""
    width: int = causal_lm(model).config.get_text_config().hidden_size
    return width
