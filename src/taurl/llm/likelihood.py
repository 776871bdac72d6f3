"""Log-probabilities and entropies of completions under a model, with gradient, each prompt forwarded once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from taurl.functional.logprobs import chosen_logprobs
from taurl.llm.heads import OutputHead, body, output_head


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
    forwarded on its keys and values. Same gradient as forwarding prompt and completion together, a copy of the prompt
    each, which is what happens under gradient checkpointing (it drops the keys and values it would need).

    Args:
        model: causal language model without dropout.
        prompts: P lists of token ids.
        prompt_of: int64 [N], which prompt each completion continues.
        tokens: int64 [N, L], completions padded on the right with any token id.
        mask: bool [N, L], the tokens wanted; the others get 0 and no gradient.
        temperature: logits are divided by it.
    Returns: logprobs, entropies, float [N, L].
    """
    device = tokens.device
    ids, real = pad_left(prompts, device)
    if checkpoints_activations(model):
        hidden = _joint_hidden(model, ids, real, prompt_of, tokens)
    else:
        hidden = _forked_hidden(model, ids, real, prompt_of, tokens)
    head = output_head(model)
    chosen, entropies = head_logprobs(head, hidden[mask], tokens[mask], temperature)
    empty = chosen.new_zeros(tokens.shape)
    return empty.masked_scatter(mask, chosen), empty.masked_scatter(mask, entropies)


def checkpoints_activations(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on in any layer."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def head_logprobs(head: OutputHead, hidden: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`chosen_logprobs` through a model's output head; its scale joins the temperature, or the hidden states."""
    if head.scale != 1 and head.softcap is None and head.bias is None:
        temperature = temperature / head.scale
    elif head.scale != 1:
        raise NotImplementedError("an output head with a scale and a bias or soft cap")
    return chosen_logprobs(hidden, head.weight, tokens, bias=head.bias, temperature=temperature, softcap=head.softcap)


def _forked_hidden(model: PreTrainedModel, ids: Tensor, real: Tensor, prompt_of: Tensor, tokens: Tensor) -> Tensor:
    """Hidden states [N, L, d] that predict each completion token: prompts first, completions on their cache."""
    padded = not bool(real.all())
    cache = DynamicCache()  # without the config: a layer with a window would evict by column, padding included
    output = body(model)(
        input_ids=ids,
        attention_mask=real.long() if padded else None,
        position_ids=positions(real),
        past_key_values=cache,
        use_cache=True,
    )
    last: Tensor = output.last_hidden_state[prompt_of, -1:]
    if tokens.shape[1] == 1:
        return last
    cache.batch_select_indices(prompt_of)
    inputs = tokens[:, :-1]  # the last token predicts nothing that is wanted
    attention = torch.cat([real[prompt_of], torch.ones_like(inputs, dtype=torch.bool)], 1)
    output = body(model)(
        input_ids=inputs,
        attention_mask=attention.long() if padded else None,
        position_ids=positions(attention)[:, ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    rest: Tensor = output.last_hidden_state
    return torch.cat([last, rest], 1)


def _joint_hidden(model: PreTrainedModel, ids: Tensor, real: Tensor, prompt_of: Tensor, tokens: Tensor) -> Tensor:
    """The same, each prompt and completion forwarded together as one row."""
    inputs = torch.cat([ids[prompt_of], tokens[:, :-1]], 1)
    attention = torch.cat([real[prompt_of], torch.ones_like(tokens[:, :-1], dtype=torch.bool)], 1)
    output = body(model)(
        input_ids=inputs, attention_mask=attention.long(), position_ids=positions(attention), use_cache=False
    )
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


def positions(real: Tensor) -> Tensor:
    """Position of each token among the real ones of its row, 0 for padding on the left."""
    return (real.long().cumsum(1) - 1).clamp(min=0)
