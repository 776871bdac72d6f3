import itertools
import random

import pytest
import torch
from test_likelihood import assert_same_gradients
from tiny_models import checkpoint_activations, in_double, prompts_of, tiny_model

from taurl.llm.generation import Completion
from taurl.llm.scoring.likelihood import completion_logprobs
from taurl.llm.scoring.rollouts import Rollout


def rollout_of(prompt_lengths, completion_lengths):
    """Random prompts and completions; completion_lengths holds a list a prompt."""
    numbers = itertools.count(1)
    groups = [
        [
            Completion(tokens, [-float(next(numbers)) for _ in tokens], "stop")
            for tokens in prompts_of(lengths, seed=row)
        ]
        for row, lengths in enumerate(completion_lengths)
    ]
    return Rollout.of(prompts_of(prompt_lengths), groups, torch.device("cpu"))


@pytest.fixture
def rollout():
    return rollout_of([5, 12, 3, 7], [[4, 9], [1, 2], [6, 6], [12, 3]])


def test_of_pads_on_the_right(rollout):
    assert rollout.tokens.shape == rollout.mask.shape == rollout.sampler_logprobs.shape == (8, 12)
    assert rollout.group_size == 2
    assert rollout.mask.sum(1).tolist() == [4, 9, 1, 2, 6, 6, 12, 3]
    for row, completion in enumerate(rollout.completions):
        length = len(completion.tokens)
        assert rollout.tokens[row, :length].tolist() == completion.tokens
        assert rollout.sampler_logprobs[row, :length].tolist() == completion.logprobs
        assert rollout.mask[row, :length].all()
        assert not rollout.sampler_logprobs[row, length:].any()
    assert rollout.advantages.tolist() == [0.0] * 8


def cost(rollout, part):
    """Tokens that go through the model, padding included, and what the rows' copies of their prompts weigh."""
    longest = max(map(len, part.prompts))
    return len(part.prompts) * longest + len(part.rows) * part.length + len(part.rows) * longest // 32


def group_cost(rollout, rows):
    lengths = [int(rollout.mask[row].nonzero().max()) + 1 for row in rows]
    prompt = len(rollout.prompts[rows[0] // rollout.group_size])
    return prompt + len(rows) * max(lengths) + len(rows) * prompt // 32


@pytest.mark.parametrize("seed", range(20))
def test_parts_hold_each_row_once_within_the_budget_and_groups_together(seed):
    draw = random.Random(seed)
    groups, size = draw.randint(1, 9), draw.randint(2, 6)
    rollout = rollout_of(
        [draw.randint(1, 30) for _ in range(groups)],
        [[draw.randint(1, 25) for _ in range(size)] for _ in range(groups)],
    )
    out = [row for row in range(groups * size) if draw.random() < 0.2]
    rollout.mask[out] = False
    rows = [row for row in range(groups * size) if draw.random() < 0.8]
    wanted = [row for row in rows if row not in out]
    for budget in (1, 20, 60, 150, 400, 10**6):
        parts = list(rollout.parts(rows, budget))
        assert sorted(row for part in parts for row in part.rows.tolist()) == wanted
        for part in parts:
            assert cost(rollout, part) <= budget or len(part.rows) == 1
            assert part.length == part.of(rollout.mask).sum(1).max()
            for row, place in zip(part.rows.tolist(), part.spread(part.prompt_of).tolist(), strict=True):
                assert part.prompts[place] is rollout.prompts[row // size]
            assert set(part.prompt_of.tolist()) == set(range(len(part.prompts)))
        for group in range(groups):
            members = [row for row in wanted if row // size == group]
            if members and group_cost(rollout, members) <= budget:
                assert sum(bool(set(members) & set(part.rows.tolist())) for part in parts) == 1
        if budget == 10**6:
            assert len(parts) == bool(wanted)


def test_parts_are_packed_and_not_one_group_each(rollout):
    # Prompts of 5, 12, 3, 7 tokens; longest completions 9, 2, 6, 12.
    # By length: group 1 (12 + 2 · 2), 2 (3 + 2 · 6), 0 (5 + 2 · 9), 3 (7 + 2 · 12).
    assert [sorted(part.rows.tolist()) for part in rollout.parts(range(8), 49)] == [[2, 3, 4, 5], [0, 1], [6, 7]]
    assert [cost(rollout, part) for part in rollout.parts(range(8), 49)] == [2 * 12 + 4 * 6 + 4 * 12 // 32, 23, 31]
    assert [sorted(part.rows.tolist()) for part in rollout.parts(range(8), 48)] == [[2, 3], [0, 1, 4, 5], [6, 7]]
    assert [part.rows.tolist() for part in rollout.parts([6, 7], 30)] == [[7], [6]]


def test_groups_that_are_split_are_split_by_length():
    """Little padding: the short completions of all groups together, then the long ones."""
    rollout = rollout_of([5, 5], [[20, 2, 19, 3], [3, 20, 2, 19]])
    found = [sorted(part.rows.tolist()) for part in rollout.parts(range(8), 50)]
    assert found == [[1, 3, 4, 6], [0, 2], [5, 7]]


def test_a_part_is_as_long_as_what_is_trained_on(rollout):
    rollout.mask[6, 5:] = False
    (part,) = rollout.parts([6, 7], 1000)
    assert part.length == 5
    assert part.of(rollout.tokens).shape == (2, 5)
    assert torch.equal(part.of(rollout.advantages + torch.arange(8)), torch.tensor([7.0, 6.0]))  # the shorter first


def test_nothing_to_train_on_is_no_part(rollout):
    rollout.mask[:] = False
    assert list(rollout.parts(range(8), 100)) == []
    assert list(rollout.parts([], 100)) == []


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@in_double
def test_loss_and_gradient_do_not_depend_on_the_parts(rollout, architecture, checkpoint):
    model = tiny_model(architecture, torch.float64)
    if checkpoint:
        checkpoint_activations(model)
    rollout.mask[3] = False
    weights = torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts, losses, gradients = [], [], []
    for budget in (10**6, 60, 31, 1):
        model.zero_grad()
        loss, count = 0.0, 0
        for part in rollout.parts(range(8), budget):
            logprobs, entropies = completion_logprobs(
                model,
                part.prompts,
                part.prompt_of,
                part.inputs(rollout.tokens),
                part.inputs(rollout.mask),
                temperature=0.8,
            )
            share = (part.of(weights[0]) * logprobs + part.of(weights[1]) * entropies).sum()
            share.backward()
            loss, count = loss + share.item(), count + 1
        counts.append(count)
        losses.append(loss)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert counts == [1, 3, 4, 7]
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-9)
        assert_same_gradients(gradient, gradients[0])


def with_copies():
    """Two groups of six: answers that stand there three times and twice, a beginning of another, and a mask apart."""
    rollout = rollout_of([5, 3], [[4, 4, 2, 4, 4, 4], [3, 3, 3, 3, 3, 3]])
    a, b = ([3, 4, 5, 6], [3, 4, 5, 7])
    c, d = [8, 9, 10], [8, 9, 11]
    for row, tokens in enumerate([a, b, a[:2], a, b, a, c, d, c, c, d, c]):
        rollout.completions[row].tokens[:] = tokens
        rollout.tokens[row, : len(tokens)] = torch.tensor(tokens)
    rollout.mask[9, 0] = False
    rollout.mask[10] = False
    return rollout


def test_equal_completions_of_a_prompt_go_through_the_model_once():
    rollout = with_copies()
    (part,) = rollout.parts(range(12), 1000)
    assert part.rows.tolist() == [6, 8, 11, 7, 9, 2, 0, 3, 5, 1, 4]
    assert part.distinct.tolist() == [6, 7, 9, 2, 0, 1]
    assert part.copy_of.tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4, 5, 5]
    assert part.prompts == [rollout.prompts[0], rollout.prompts[1]]
    assert part.prompt_of.tolist() == [1, 1, 1, 0, 0, 0]
    assert torch.equal(part.inputs(rollout.tokens), rollout.tokens[[6, 7, 9, 2, 0, 1]])
    lengths = part.of(rollout.mask).sum(1)
    assert torch.equal(part.spread(part.inputs(rollout.mask).sum(1)), lengths)
    # 5 + 3 · 4 tokens and 3 + 3 · 3, in one part 2 · 5 + 6 · 4
    assert [part.distinct.tolist() for part in rollout.parts(range(12), 33)] == [[6, 7, 9], [2, 0, 1]]
    assert len(list(rollout.parts(range(12), 34))) == 1
    assert [part.distinct.tolist() for part in rollout.parts(range(12), 13)] == [[6, 7, 9], [2, 0], [1]]


@pytest.mark.parametrize("checkpoint", [False, True])
@in_double
def test_copies_change_neither_loss_nor_gradient(checkpoint):
    model, rollout = tiny_model("llama", torch.float64), with_copies()
    if checkpoint:
        checkpoint_activations(model)
    weights = torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for rows in ([range(12)], [[row] for row in range(12)]):  # together, and each alone
        model.zero_grad()
        total, seen = 0.0, 0
        for part in (part for some in rows for part in rollout.parts(some, 40, share_prompts=not checkpoint)):
            given = part.inputs(rollout.tokens), part.inputs(rollout.mask)
            logprobs, entropies = map(part.spread, completion_logprobs(model, part.prompts, part.prompt_of, *given))
            share = (part.of(weights[0]) * logprobs + part.of(weights[1]) * entropies).sum()
            share.backward()
            total, seen = total + share.item(), seen + len(part.distinct)
        found.append((seen, total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    assert [seen for seen, _, _ in found] == [6, 11]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9)
    assert_same_gradients(found[0][2], found[1][2])


def test_minibatches_hold_every_group_once_and_depend_on_the_key_only():
    rollout = rollout_of([3] * 7, [[2, 2, 2]] * 7)
    for count in (1, 2, 3, 7):
        batches = rollout.minibatches(count, key=(5, 1, 0))
        assert len(batches) == count
        assert sorted(row for rows in batches for row in rows) == list(range(21))
        assert all(len({row // 3 for row in rows}) * 3 == len(rows) for rows in batches)
        assert max(map(len, batches)) - min(map(len, batches)) <= 3
        torch.manual_seed(count)
        assert rollout.minibatches(count, key=(5, 1, 0)) == batches
    assert rollout.minibatches(1, key=(5, 1, 0)) == [list(range(21))]
    orders = [rollout.minibatches(2, key=key) for key in ((5, 1, 0), (6, 1, 0), (5, 2, 0), (5, 1, 1))]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
