"""Log-probabilities and entropies of completions under a model, with gradient, each prompt forwarded once."""

from collections.abc import Sequence
from math import inf
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from taurl.functional.logprobs import TokenScores, score_tokens
from taurl.llm.beginnings import worth_a_pass
from taurl.llm.models.heads import OutputHead, body, causal_lm, context_length, output_head
from taurl.runtime.errors import InputError

# Layers whose keys and values can be gone on from. Models with others (convolutions) get prompt and completion as one.
KEEPING = {"full_attention", "sliding_attention", "chunked_attention"}


def completion_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prompt_of: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at each completion token.

    A prompt goes through the model once, with gradient, however many completions it has; the completions are then
    forwarded on its keys and values. So does what all prompts begin with, where that is long. Same gradient as
    forwarding prompt and completion together, a copy of the prompt each, which is what happens under gradient
    checkpointing (it drops the keys and values it would need) and with layers that keep none.

    Args:
        model: causal language model without dropout.
        prompts: P lists of token ids.
        prompt_of: int64 [N], which prompt each completion continues.
        tokens: int64 [N, L], completions padded on the right with any token id.
        mask: bool [N, L], the tokens wanted; the others get 0 and no gradient.
        temperature: logits are divided by it.
    Returns: logprobs, entropies, float [N, L]; float32, or float64 for a float64 model.
    Raises: InputError for a model with recurrent layers, which have no keys and values to go on from.
    """
    hidden = completion_hidden(model, prompts, prompt_of, tokens)
    return hidden_logprobs(model, hidden, tokens, mask, temperature)


def hidden_logprobs(
    model: PreTrainedModel, hidden: Tensor, tokens: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The second half of `completion_logprobs`, from what `completion_hidden` gave."""
    places = mask.flatten().nonzero()[:, 0]  # found once: each time that they are, a GPU is waited for
    wanted = hidden.flatten(0, 1).index_select(0, places)
    scores = head_scores(output_head(model), wanted, tokens.flatten()[places], temperature)
    empty = scores.logprobs.new_zeros(mask.numel())
    found = scores.logprobs, scores.entropies
    logprobs, spread = (empty.index_copy(0, places, values).view_as(mask) for values in found)
    return logprobs, spread


def completion_hidden(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of: Tensor, tokens: Tensor
) -> Tensor:
    """Hidden states [N, L, d] that predict each completion token; arguments and errors as `completion_logprobs`."""
    refuse_recurrent(model)
    joint = checkpoints_activations(model) or not shares_prompts(model)
    return (_joint_hidden if joint else _forked_hidden)(model, prompts, prompt_of, tokens)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether all layers keep keys and values of a prompt, which its completions can go on from."""
    return KEEPING.issuperset(getattr(causal_lm(model).config.get_text_config(), "layer_types", None) or ())


def refuse_recurrent(model: PreTrainedModel) -> None:
    """Raises: InputError for a model that is none of attention layers alone."""
    if causal_lm(model)._is_stateful:
        raise cannot_share(model, "has recurrent layers")


def cannot_share(model: PreTrainedModel, found: str) -> InputError:
    """The error for a model whose completions cannot go on from the keys and values of their prompt."""
    name = type(causal_lm(model)).__name__
    return InputError(f"{name} {found}; training expects attention layers that keep their keys and values in a cache")


def checkpoints_activations(model: PreTrainedModel) -> bool:
    """Whether the next forward pass drops activations (and with them its cache): transformers does so in training."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules())


def head_scores(head: OutputHead, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> TokenScores:
    """`score_tokens` through a model's output head: hidden [M, d] and tokens int64 [M] → figures [M]."""
    bias = head.bias
    if head.scale != 1:  # scale · (h · Wᵀ + b) = (scale · h) · Wᵀ + scale · b
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    return score_tokens(hidden, head.weight, tokens, bias=bias, temperature=temperature, softcap=head.softcap)


def _forked_hidden(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of: Tensor, tokens: Tensor
) -> Tensor:
    """Hidden states [N, L, d] that predict each completion token: prompts first, completions on their cache."""
    device, most = tokens.device, context_length(causal_lm(model))
    padded = len(set(map(len, prompts))) > 1
    begins = worth_a_pass(prompts, device)
    if padded and not _pads_anywhere(model, max(map(len, prompts)) + tokens.shape[1]):
        begins = 0  # the padding would lie behind it, and not before everything
    beginning, ends = (pad_left(ids, device) for ids in ([prompts[0][:begins]], [ids[begins:] for ids in prompts]))
    cache = DynamicCache()  # without the config: a layer with a window would evict by column, padding included
    seen = torch.ones(1, 0, dtype=torch.bool, device=device)

    def go_on(ids: Tensor, real: Tensor, of: Tensor, *, masked: bool = padded) -> Tensor:
        """Hidden states of tokens [R, Q], each row going on from row `of` [R] of those before."""
        nonlocal seen
        (cache.reorder_cache if device.type == "cpu" else cache.batch_select_indices)(cast(Any, of))  # as `rows_of`
        seen = torch.cat([seen[of], real], 1)
        output = body(model)(
            input_ids=ids,
            attention_mask=seen.long() if masked else None,
            position_ids=positions(seen, most)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        if cache.get_seq_length() != seen.shape[1]:
            raise cannot_share(model, f"kept {cache.get_seq_length()} of {seen.shape[1]} tokens in its cache")
        hidden: Tensor = output.last_hidden_state
        return hidden

    root = torch.zeros(len(prompts), dtype=torch.long, device=device)
    if begins:
        go_on(*beginning, root[:1], masked=False)
    last = rows_of(go_on(*ends, root)[:, -1:], prompt_of)
    if tokens.shape[1] == 1:
        return last
    inputs = tokens[:, :-1]  # the last token predicts nothing that is wanted
    return torch.cat([last, go_on(inputs, torch.ones_like(inputs, dtype=torch.bool), prompt_of)], 1)


def _pads_anywhere(model: PreTrainedModel, columns: int) -> bool:
    """Whether padding between tokens leaves the others as they are: no layer counts a distance in columns."""
    return bool(causal_lm(model)._supports_attention_backend) and columns <= window(model)


def window(model: PreTrainedModel) -> float:
    """How many tokens back the layers of a model see that see least far."""
    config = causal_lm(model).config.get_text_config()
    return min(getattr(config, name, None) or inf for name in ("sliding_window", "attention_chunk_size"))


def rows_of(values: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor, some of them several times, with a gradient that is the same at every call.

    The gradients of equal rows are added in an order that the threads decide where a CPU indexes, and where a GPU
    selects.
    """
    return values.index_select(0, rows) if values.device.type == "cpu" else values[rows]


def _joint_hidden(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of: Tensor, tokens: Tensor
) -> Tensor:
    """The same, a copy of its prompt before each completion and both forwarded as one row, without a cache."""
    ids, real = pad_left(prompts, tokens.device)
    inputs = torch.cat([ids[prompt_of], tokens[:, :-1]], 1)
    attention = torch.cat([real[prompt_of], torch.ones_like(tokens[:, :-1], dtype=torch.bool)], 1)
    places = positions(attention, context_length(causal_lm(model)))
    output = body(model)(input_ids=inputs, attention_mask=attention.long(), position_ids=places, use_cache=False)
    hidden: Tensor = output.last_hidden_state[:, ids.shape[1] - 1 :]
    return hidden


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor [P, longest], padded on the left, and which of its tokens are real."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    real = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        real[row, longest - len(prompt) :] = True
    return ids.to(device), real.to(device)


def positions(real: Tensor, most: int | None) -> Tensor:
    """Position of each token among the real ones of its row, 0 for padding on the left.

    Padding on the right may reach beyond the `most` positions that a model has, though no row does: it gets the last.
    Nothing sees it, but a learned embedding lacks such a position, and rotary factors may change for all rows by it.
    """
    return (real.long().cumsum(1) - 1).clamp(min=0, max=None if most is None else most - 1)
