"""Rows through the model end to end, padded and one by one: the same scores and gradients, in float64."""

import pytest
import torch
from test_likelihood import assert_close, assert_same_gradients
from tiny_models import ARCHITECTURES, checkpoint_activations, in_double, logits_one_by_one, prompts_of, tiny_model
from transformers import MambaConfig, PhimoeConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from taurl.llm.data.token_rows import TokenRow
from taurl.llm.models import attention
from taurl.llm.scoring.row_attention import (
    attend_within_rows,
    attending_within_rows,
    knows_rows,
    laid_end_to_end,
    varlen,
)
from taurl.llm.scoring.supervised import packed_rows, part_scores, row_parts, sorted_rows, trained_tokens

# Gemma 2 caps its attention scores, which only its own code does.
PACKABLE = [name for name in ARCHITECTURES if name != "gemma2"]


def token_rows():
    """Rows of several lengths, longer than the models' window: completions, holes in the targets, one without any."""
    rows = prompts_of([9, 3, 17, 12, 2, 8, 5], seed=4)
    masks = [
        [False] * 4 + [True] * 5,
        [False, True, True],
        [False] * 6 + [True] * 4 + [False] * 3 + [True] * 3 + [False],
        [False] + [True] * 11,
        [False, True],
        [False] * 8,
        [False, False, True, False, False],
    ]
    return [TokenRow(ids, mask) for ids, mask in zip(rows, masks, strict=True)]


def one_by_one(model, rows):
    """Log-probabilities of all targets, row after row, through the model's own logits."""
    found = []
    for row, logits in zip(rows, logits_one_by_one(model, [row.ids for row in rows]), strict=True):
        logprobs = logits.log_softmax(-1)
        found += [logprobs[place - 1, row.ids[place]] for place in range(1, len(row.ids)) if row.trained[place]]
    return torch.stack(found)


def in_parts(model, rows, tokens_per_part, packed):
    """The same from parts, put back into the order of the rows."""
    found = {}
    for part in row_parts(rows, tokens_per_part, torch.device("cpu"), packed=packed):
        assert part.packed == packed
        assert part.ids.numel() <= tokens_per_part or len(part.rows) == 1
        logprobs = iter(part_scores(model, part).logprobs)
        for row in part.rows:
            found[row] = [next(logprobs) for _ in range(sum(rows[row].trained))]
    return torch.stack([value for row in sorted(found) for value in found[row]])


def gradients(model, logprobs):
    weights = torch.linspace(1, 2, len(logprobs), dtype=logprobs.dtype)
    model.zero_grad()
    (weights * logprobs).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(model, packed, tokens_per_part=30):
    rows = token_rows()
    expected = one_by_one(model, rows)
    expected_gradients = gradients(model, expected)
    with attending_within_rows(model) if packed else torch.enable_grad():
        found = in_parts(model, rows, tokens_per_part, packed)
        found_gradients = gradients(model, found)
    assert_close(found, expected)
    assert_same_gradients(found_gradients, expected_gradients)


@pytest.mark.parametrize("architecture", PACKABLE)
@in_double
def test_rows_end_to_end_equal_rows_one_by_one(architecture):
    model = tiny_model(architecture, torch.float64)
    assert knows_rows(model)
    compare(model, packed=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@in_double
def test_padded_rows_equal_rows_one_by_one(architecture):
    compare(tiny_model(architecture, torch.float64), packed=False)


@pytest.mark.parametrize("tokens_per_part", [1, 17, 40, 1000])
@in_double
def test_it_does_not_matter_how_the_batch_is_cut(tokens_per_part):
    compare(tiny_model("mistral", torch.float64), packed=True, tokens_per_part=tokens_per_part)


@pytest.mark.parametrize("packed", [True, False])
@in_double
def test_activations_may_be_computed_again(packed):
    model = tiny_model("gemma3", torch.float64)
    checkpoint_activations(model)
    compare(model, packed=packed)


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch's varlen_attn as its documentation has it (it runs on a GPU only), token by token."""
    assert (cu_seq_q == cu_seq_k).all()
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    left, right = window_size
    assert right == 0
    output = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1)
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        for place in range(start, end):
            first = start if left == -1 else max(start, place - left)
            for head in range(query.shape[1]):
                keys, values = (x[first : place + 1, head // group] for x in (key, value))
                output[place, head] = (scale * keys @ query[place, head]).softmax(0) @ values
    return output


@pytest.mark.parametrize("window", [None, 3, 50])
def test_one_kernel_for_all_rows_is_asked_for_the_same(monkeypatch, window):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 15, 8, generator=generator).double() for heads in (4, 2, 2))
    lengths = [6, 1, 8]
    rows = laid_end_to_end(lengths, torch.device("cpu"))
    expected, _ = attend_within_rows(None, query, key, value, None, **rows, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(varlen(query, key, value, rows["row_bounds"], 8, 0.3, window), expected)


class OnGpu(torch.Tensor):
    """Says that it is there, and computes here."""

    is_cuda = True


def test_on_a_gpu_in_full_precision_no_kernel_is_asked_for_grouped_heads(monkeypatch):
    plain, asked = attention.scaled_dot_product_attention, []

    def noted(*tensors, enable_gqa, **options):
        asked.append(enable_gqa)
        return plain(*tensors, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", noted)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 9, 8, generator=generator).double() for heads in (6, 2, 2)]
    rows = laid_end_to_end([4, 5], torch.device("cpu"))
    expected, _ = attend_within_rows(None, *tensors, None, **rows)
    found, _ = attend_within_rows(None, *(tensor.as_subclass(OnGpu) for tensor in tensors), None, **rows)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    assert asked == [True, True, False, False]


def test_attention_is_the_models_own_again_afterwards():
    model = tiny_model("llama")
    with attending_within_rows(model):
        assert model.config._attn_implementation == "taurl_rows"
    assert model.config._attn_implementation == "sdpa"


def test_models_whose_attention_is_not_known_are_told_apart():
    assert not knows_rows(tiny_model("gemma2"))
    torch.manual_seed(0)
    recurrent = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=101, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    assert not knows_rows(recurrent.eval())


@pytest.mark.parametrize("window", [6, None])
def test_a_window_that_stands_in_the_mask_alone_is_noticed(window):
    torch.manual_seed(0)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(PhimoeConfig(**sizes, **heads, sliding_window=window)).eval()
    assert knows_rows(model) is (window is None)


@in_double
def test_recurrent_models_take_padded_rows():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=101, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    rows = token_rows()
    assert_close(in_parts(model, rows, 40, packed=False), one_by_one(model, rows))


def test_rows_are_put_where_they_leave_the_least_room():
    lengths = dict(enumerate([5, 9, 2, 4, 3, 12, 1]))
    parts = packed_rows(lengths, 10)
    assert parts == [[5], [1, 6], [0, 3], [4, 2]]
    assert sorted(row for part in parts for row in part) == list(lengths)


def test_padded_rows_are_of_similar_length():
    assert sorted_rows(dict(enumerate([5, 9, 2, 4, 3, 12, 1])), 10) == [[6, 2, 4], [3, 0], [1], [5]]


def test_a_row_without_a_target_is_in_no_part():
    rows = token_rows()
    for packed in (True, False):
        parts = list(row_parts(rows, 20, torch.device("cpu"), packed=packed))
        assert sorted(row for part in parts for row in part.rows) == [0, 1, 2, 3, 4, 6]
        assert sum(len(part.targets) for part in parts) == trained_tokens(rows)
