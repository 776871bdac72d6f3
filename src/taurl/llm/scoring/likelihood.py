"""Log-probabilities and entropies of completions under a model, with gradient, what they share forwarded once."""

from collections.abc import Sequence
from math import inf
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from taurl.functional.logprobs import TokenScores, score_tokens
from taurl.llm.beginnings import worth_a_pass
from taurl.llm.models.attention import NAME
from taurl.llm.models.heads import OutputHead, body, causal_lm, context_length, output_head
from taurl.llm.scoring.prefix_tree import PrefixTree
from taurl.runtime.errors import InputError

# Layers whose keys and values can be gone on from. Models with others (convolutions) get prompt and completion as one.
KEEPING = {"full_attention", "sliding_attention", "chunked_attention"}
TAKING_ANY_MASK = {"sdpa", "eager", NAME}
# Of the tokens that rows of their own would take, padding included, how many a tree may have to be worth its wider
# attention, which looks at all of its columns; and the most of these. On a GPU, which would wait for it, not tried.
WORTH_A_TREE, WIDEST_TREE = 0.75, 512


def completion_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prompt_of: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    merge: bool = True,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at each completion token.

    A prompt goes through the model once, with gradient, however many completions it has; the completions are then
    forwarded on its keys and values. So does what all prompts begin with, where that is long, and what completions of
    a prompt begin with, where that saves much. Same gradient as forwarding prompt and completion together, a copy of
    the prompt each, which is what happens under gradient checkpointing (it drops the keys and values it would need) and
    with layers that keep none.

    Args:
        model: causal language model without dropout.
        prompts: P lists of token ids.
        prompt_of: int64 [N], which prompt each completion continues.
        tokens: int64 [N, L], completions padded on the right with any token id.
        mask: bool [N, L], the tokens wanted; the others get 0 and no gradient.
        temperature: logits are divided by it.
        merge: whether what completions of a prompt begin with may go through the model once. Without, rounding is that
            of `completion_hidden` and `hidden_logprobs`.
    Returns: logprobs, entropies, float [N, L]; float32, or float64 for a float64 model.
    Raises: InputError for a model with recurrent layers, which have no keys and values to go on from.
    """
    refuse_recurrent(model)
    tree = _tree_worth_it(model, prompts, prompt_of, tokens, mask) if merge else None
    if tree is None:
        hidden = completion_hidden(model, prompts, prompt_of, tokens)
        return hidden_logprobs(model, hidden, tokens, mask, temperature)
    states = _tree_hidden(model, prompts, tree)
    guessed = torch.tensor(tree.guessed, device=tokens.device)
    scores = head_scores(output_head(model), states, guessed, temperature)
    found = scores.logprobs, scores.entropies
    logprobs, spread = (
        torch.where(mask, rows_of(values, tree.guess_of.flatten()).view_as(mask), 0.0) for values in found
    )
    return logprobs, spread


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


class _Passes:
    """Passes through a model, each going on from the keys and values of the one before.

    Attributes:
        seen: bool [rows, columns], which columns so far are real tokens.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], device: torch.device, columns: int):
        """Forward the prompts, for up to so many columns behind them; `ends` [P, 1, d] are their last hidden states."""
        self.model, self.most = model, context_length(causal_lm(model))
        self.cache = DynamicCache()  # without the config: a layer with a window would evict by column, padding included
        self.seen = torch.ones(1, 0, dtype=torch.bool, device=device)
        self.padded = len(set(map(len, prompts))) > 1
        begins = worth_a_pass(prompts, device)
        if self.padded and not _pads_anywhere(model, max(map(len, prompts)) + columns):
            begins = 0  # the padding would lie behind it, and not before everything
        beginning, ends = (pad_left(ids, device) for ids in ([prompts[0][:begins]], [ids[begins:] for ids in prompts]))
        root = torch.zeros(len(prompts), dtype=torch.long, device=device)
        if begins:
            self.rows(*beginning, root[:1], masked=False)
        self.ends = self.rows(*ends, root, masked=self.padded)[:, -1:]

    def rows(self, ids: Tensor, real: Tensor, of: Tensor, *, masked: bool) -> Tensor:
        """Hidden states [R, Q, d] of tokens [R, Q], each row going on from row `of` [R] of those before."""
        on_cpu = ids.device.type == "cpu"
        (self.cache.reorder_cache if on_cpu else self.cache.batch_select_indices)(cast(Any, of))  # as `rows_of`
        self.seen = torch.cat([self.seen[of], real], 1)
        places = positions(self.seen, self.most)[:, -ids.shape[1] :]
        return self._forward(ids, self.seen.long() if masked else None, places)

    def tree(self, tree: PrefixTree) -> Tensor:
        """Hidden states [P, Q, d] of a tree's columns, those of a prompt going on from it."""
        sees = torch.cat([self.seen[:, None, :].expand(-1, tree.width, -1), tree.sees()], 2)
        dtype = self.model.dtype
        hides = torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
        last = None if self.most is None else self.most - 1  # of padding: see `positions`
        places = (self.seen.sum(1, keepdim=True) + tree.depths()).clamp(max=last)
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(places), tree.width)], 1)
        return self._forward(tree.ids(), hides[:, None], places)

    def _forward(self, ids: Tensor, attention: Tensor | None, places: Tensor) -> Tensor:
        given = {"attention_mask": attention, "position_ids": places}
        output = body(self.model)(input_ids=ids, **given, past_key_values=self.cache, use_cache=True)
        if (kept := self.cache.get_seq_length()) != self.seen.shape[1]:
            raise cannot_share(self.model, f"kept {kept} of {self.seen.shape[1]} tokens in its cache")
        hidden: Tensor = output.last_hidden_state
        return hidden


def _forked_hidden(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of: Tensor, tokens: Tensor
) -> Tensor:
    """Hidden states [N, L, d] that predict each completion token: prompts first, completions on their cache."""
    passes = _Passes(model, prompts, tokens.device, tokens.shape[1])
    last = rows_of(passes.ends, prompt_of)
    if tokens.shape[1] == 1:
        return last
    inputs = tokens[:, :-1]  # the last token predicts nothing that is wanted
    real = torch.ones_like(inputs, dtype=torch.bool)
    return torch.cat([last, passes.rows(inputs, real, prompt_of, masked=passes.padded)], 1)


def _tree_hidden(model: PreTrainedModel, prompts: Sequence[Sequence[int]], tree: PrefixTree) -> Tensor:
    """Hidden states [guesses, d] that a tree's guesses are made from: prompts first, its columns on their cache."""
    passes = _Passes(model, prompts, tree.guess_of.device, tree.width)
    states = torch.cat([passes.ends, passes.tree(tree)], 1).flatten(0, 1)
    return rows_of(states, tree.state_places())


def _tree_worth_it(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prompt_of: Tensor, tokens: Tensor, mask: Tensor
) -> PrefixTree | None:
    """The completions as a tree where that saves tokens enough, and all layers heed a mask of any form."""
    if (
        tokens.device.type != "cpu"
        or tokens.shape[1] > WIDEST_TREE  # before anything is merged: long completions cost nothing here
        or not shares_prompts(model)
        or checkpoints_activations(model)
        or causal_lm(model).config._attn_implementation not in TAKING_ANY_MASK
    ):
        return None
    tree = PrefixTree.of(len(prompts), prompt_of, tokens, mask)
    apart = tokens.shape[0] * (tokens.shape[1] - 1)
    saves = 0 < tree.width * len(prompts) <= WORTH_A_TREE * apart and tree.width <= WIDEST_TREE
    return tree if saves and _pads_anywhere(model, max(map(len, prompts)) + tree.width) else None


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
