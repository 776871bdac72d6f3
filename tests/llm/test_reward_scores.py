"""Scores equal those of transformers' own heads, and gradients do not depend on how rows are cut into parts."""

import itertools

import pytest
import torch
from tiny_policy import KeepFloat64, tiny_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from taurl.functional.preference import pairwise_loss
from taurl.llm.data.preference_rows import JudgedRow
from taurl.llm.scoring import reward_scores
from taurl.llm.scoring.reward_scores import check_scores, part_scores, pooled_row, row_scores, score_head, scoring_parts
from taurl.runtime.errors import InputError

ROWS = [
    JudgedRow([3, 9, 4], [[7, 8, 1], [9, 1]]),
    JudgedRow([3, 11, 12, 13, 4], [[6, 1], [5, 5, 5, 5, 1]]),
    JudgedRow([3, 4], [[30, 1], [31, 32, 33, 1]]),
    JudgedRow([3, 20, 4], [[8], [9, 1, 1]]),
]


def scoring_model(dtype=torch.float64, kind=AutoModelForSequenceClassification, **settings):
    config = tiny_model(**settings).config
    config.num_labels = 1
    torch.manual_seed(1)
    return kind.from_config(config).to(dtype).eval()


def own_scores(model, rows):
    """As transformers pools them: every completion after a copy of its prompt, one batch padded on the right."""
    sequences = [row.prompt + completion for row in rows for completion in row.completions]
    pad = model.config.pad_token_id
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [pad] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[place < len(s) for place in range(longest)] for s in sequences])
    return model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


def test_many_completions_of_a_prompt_go_through_by_the_token_budget(monkeypatch):
    model = scoring_model()
    row = JudgedRow([3, 9, 4], [[5 + place % 7] * (1 + place % 5) + [1] for place in range(40)])
    whole, sizes = row_scores(model, [row], 8192), []
    real = reward_scores.completion_hidden
    monkeypatch.setattr(
        reward_scores,
        "completion_hidden",
        lambda model, prompts, of, tokens: (
            sizes.append(sum(map(len, prompts)) + tokens[:, 1:].numel()) or real(model, prompts, of, tokens)
        ),
    )
    assert row_scores(model, [row], 30)[0] == pytest.approx(whole[0], rel=1e-9)
    assert len(sizes) > 5
    assert max(sizes) <= 30


def test_a_head_in_bfloat16_gives_scores_in_float32():
    model = scoring_model(torch.bfloat16)
    with torch.no_grad():
        score_head(model).weight.mul_(40)
    found = torch.tensor(row_scores(model, ROWS, 1000)).flatten()
    assert not torch.equal(found, found.bfloat16().float())
    part = next(scoring_parts(ROWS, 1000, pad=model.config.pad_token_id))
    part_scores(model, part).sum().backward()
    assert score_head(model).weight.grad.dtype == torch.bfloat16
    check_scores(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pad", [0, 1])  # 1 is the end of sequence as well, with which completions end
def test_scores_and_gradients_are_those_of_transformers_however_rows_are_cut(pad):
    with KeepFloat64():
        model = scoring_model(pad_token_id=pad)
        own = own_scores(model, ROWS)
        pairs = own.view(-1, 2)
        pairwise_loss(pairs[:, 0], pairs[:, 1]).mean().backward()
        expected = gradients(model)
        assert "score.weight" in expected
        for budget in (1, 20, 1000):
            model.zero_grad()
            parts = list(scoring_parts(ROWS, budget, pad=pad))
            assert len(parts) == {1: 4, 1000: 1}.get(budget, len(parts))
            assert sorted(itertools.chain(*(part.rows for part in parts))) == [0, 1, 2, 3]
            for part in parts:
                found = part_scores(model, part).view(-1, 2)
                torch.testing.assert_close(found.flatten(), pairs[part.rows].flatten(), rtol=1e-12, atol=1e-13)
                (pairwise_loss(found[:, 0], found[:, 1]).sum() / len(ROWS)).backward()
            found = gradients(model)
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                assert (found[name] - gradient).abs().max() < 1e-9 * gradient.abs().max(), name
        assert torch.tensor(row_scores(model, ROWS, 30)).flatten().tolist() == pytest.approx(own.tolist(), rel=1e-6)


def test_a_copy_of_the_prompt_each_under_gradient_checkpointing_gives_the_same():
    model = scoring_model(torch.float32)
    (part,) = scoring_parts(ROWS, 1000, pad=0)
    expected = part_scores(model, part)
    model.activation_checkpointing_enable()
    model.train()
    torch.testing.assert_close(part_scores(model, part), expected, rtol=1e-4, atol=1e-5)
    assert len(list(scoring_parts(ROWS[:1] * 4, 40, pad=0))) < len(
        list(scoring_parts(ROWS[:1] * 4, 40, pad=0, share_prompts=False))
    )


def test_a_completion_of_padding_alone_is_scored_within_its_prompt():
    assert pooled_row(JudgedRow([3, 5, 1], [[1, 1], [7, 1]]), 1) == JudgedRow([3, 5], [[], [1, 7]])
    assert pooled_row(JudgedRow([3], [[4, 1]]), None) == JudgedRow([3], [[4, 1]])
    assert pooled_row(JudgedRow([1], [[1]]), 1) == JudgedRow([1], [[]])
    with KeepFloat64():
        model = scoring_model(pad_token_id=1)
        rows = [JudgedRow([3, 5, 1], [[1, 1], [7, 1]]), JudgedRow([3, 5, 6], [[1]])]
        found = [value for values in row_scores(model, rows, 100) for value in values]
        assert found == pytest.approx(own_scores(model, rows).tolist(), rel=1e-6)


def test_steps_of_a_process_are_scored_at_their_last_tokens():
    rows = [
        JudgedRow([3, 9, 4], [[7, 8, 9, 10, 1]], step_ends=[1, 3], step_labels=[1, 0]),
        JudgedRow([3, 4], [[7, 1]], step_ends=[0], step_labels=[1]),
    ]
    with KeepFloat64():
        model = scoring_model(kind=AutoModelForTokenClassification)
        expected = []
        for row in rows:
            logits = model(input_ids=torch.tensor([row.prompt + row.completions[0]])).logits[0, :, 0]
            expected += [logits[len(row.prompt) + end].item() for end in row.step_ends]
        for budget in (1, 100):
            found = row_scores(model, rows, budget)
            assert [len(values) for values in found] == [2, 1]
            assert [value for values in found for value in values] == pytest.approx(expected, rel=1e-6)
    check_scores(model)


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_the_check_lets_known_models_pass(pad):
    check_scores(scoring_model(torch.float32, pad_token_id=pad))
    check_scores(scoring_model(torch.bfloat16, pad_token_id=pad))


class RoundedForSequenceClassification(LlamaForSequenceClassification):
    """Is 2% off, as a deep model in bfloat16 may be."""

    def forward(self, input_ids):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        scores = self.score(hidden * (1 + 0.02 * noise))
        return SequenceClassifierOutputWithPast(logits=scores[:, 2 if input_ids[0, 3] == 0 else 3])


class PooledAtTheEndForSequenceClassification(LlamaForSequenceClassification):
    """Scores its last token, padding or not."""

    def forward(self, input_ids):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=self.score(hidden)[:, -1])


class Mixing(torch.nn.Linear):
    """A head whose score at one token is taken off the mean of all."""

    def forward(self, input):
        scores = super().forward(input)
        return scores - scores.mean(-2, keepdim=True)


def test_the_check_passes_over_rounding_however_near_to_0_the_scores_are():
    model = scoring_model(torch.float32)
    model.__class__ = RoundedForSequenceClassification
    for head in 100 * torch.randn(40, 1, 32, generator=torch.Generator().manual_seed(3)):
        score_head(model).weight.data = head
        check_scores(model)


def test_the_check_refuses_what_is_scored_otherwise():
    model = scoring_model(torch.float32)
    check_scores(model)
    model.__class__ = PooledAtTheEndForSequenceClassification
    with pytest.raises(InputError, match="PooledAtTheEndForSequenceClassification scores otherwise"):
        check_scores(model)
    model = scoring_model(torch.float32)
    model.score = Mixing(32, 1, bias=False)
    with pytest.raises(InputError, match="scores otherwise"):
        check_scores(model)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config.num_labels = 1
    with pytest.raises(InputError, match="BertForSequenceClassification"):
        check_scores(AutoModelForSequenceClassification.from_config(config).eval())
    two = tiny_model().config
    two.num_labels = 2
    with pytest.raises(InputError, match="LlamaForSequenceClassification scores otherwise than taurl knows"):
        check_scores(AutoModelForSequenceClassification.from_config(two).eval())
    with pytest.raises(InputError, match="LlamaForCausalLM gives no scores"):
        check_scores(tiny_model())
    with pytest.raises(InputError, match="has no layer named score"):
        score_head(tiny_model())
