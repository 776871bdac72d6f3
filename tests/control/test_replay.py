"""Replay: the ring, returns of n steps across its seams, and priorities, each against a plain loop."""

import numpy as np
import pytest
import torch

from taurl.control.replay import NONE, PrioritizedReplay, Replay
from taurl.control.sum_tree import SumTree
from taurl.functional.replay import n_step_sums, proportional_priorities, replay_weights
from taurl.runtime.errors import InputError

DISCOUNT = 0.9


def add(replay, steps, *, copies=(0,), terminated=(), truncated=()):
    """One step of each copy for each number; the number is its observation, reward and action."""
    for number in steps:
        numbers = np.array([number + 100 * copy for copy in copies], dtype=np.float32)
        replay.add(
            np.array(copies),
            numbers[:, None],
            numbers.astype(np.int64),
            numbers,
            numbers[:, None] + 0.5,  # told from the observation of the next step
            np.array([number in terminated] * len(copies)),
            np.array([number in truncated] * len(copies)),
        )


def test_the_newest_steps_stay():
    replay = Replay(5, 1, 1)
    add(replay, range(8))
    assert replay.size == 5
    assert sorted(replay.rewards) == [3, 4, 5, 6, 7]
    batch = replay.batch(np.arange(5), discount=DISCOUNT, steps=1)
    assert sorted(batch.actions.tolist()) == [3, 4, 5, 6, 7]
    assert torch.equal(batch.next_observations, batch.observations + 0.5)
    assert torch.equal(batch.discounts, torch.full((5,), DISCOUNT))


def test_each_step_knows_the_next_of_its_episode():
    """Steps of several copies at once, some of which only reset at times, against a plain loop."""
    random = np.random.default_rng(0)
    for _ in range(40):
        count = int(random.integers(1, 5))
        replay = Replay(int(random.integers(2 * count, 25)), 1, count)
        following, newest, resets = np.full(replay.capacity, NONE), np.full(count, NONE), np.zeros(count, dtype=bool)
        for _ in range(12):
            copies, ended = [], []
            for _ in range(random.integers(1, replay.capacity // count + 1)):
                acting = np.flatnonzero(~resets)
                resets = np.isin(np.arange(count), acting) & (random.random(count) < 0.4)
                copies, ended = [*copies, *acting], [*ended, *resets[acting]]
            numbers, of = random.random(len(copies)), np.array(copies, dtype=np.int64)
            places = replay.add(of, numbers[:, None], of, numbers, numbers[:, None], np.array(ended, bool), of < 0)
            for copy, place, end in zip(copies, places, ended, strict=True):
                following[place] = NONE
                if newest[copy] != NONE:
                    following[newest[copy]] = place
                newest[copy] = NONE if end else place
            if random.random() < 0.1:
                replay.cut()
                newest[:] = NONE
            assert (replay.following == following).all()
            assert (replay.newest == newest).all()


def test_every_step_is_drawn_alike():
    replay = Replay(20, 1, 1)
    add(replay, range(33))
    np.random.seed(0)
    drawn = replay.draw(20_000, discount=DISCOUNT, steps=1).places.numpy()
    counts = np.bincount(drawn, minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # χ² of 19 degrees: above it once in a thousand seeds


def test_a_half_full_ring_gives_what_is_there():
    replay = Replay(1000, 1, 1)
    add(replay, range(1, 11))
    assert set(replay.draw(500, discount=DISCOUNT, steps=1).rewards.tolist()) == set(range(1, 11))


def test_returns_of_three_steps_by_hand():
    """Two copies in turn; step 3 terminates, step 6 is cut by a time limit, step 8 is the newest."""
    replay = Replay(100, 1, 2)
    add(replay, range(1, 9), copies=(0, 1), terminated=(3,), truncated=(6,))
    batch = replay.batch(np.arange(0, 16, 2), discount=0.5, steps=3)  # of copy 0
    by_hand = {  # first step: reward, what was seen last, terminated, γ^m
        1: (1 + 2 / 2 + 3 / 4, 3.5, True, 1 / 8),
        2: (2 + 3 / 2, 3.5, True, 1 / 4),
        3: (3.0, 3.5, True, 1 / 2),
        4: (4 + 5 / 2 + 6 / 4, 6.5, False, 1 / 8),
        5: (5 + 6 / 2, 6.5, False, 1 / 4),
        6: (6.0, 6.5, False, 1 / 2),
        7: (7 + 8 / 2, 8.5, False, 1 / 4),
        8: (8.0, 8.5, False, 1 / 2),
    }
    columns = (batch.observations[:, 0], batch.rewards, batch.next_observations[:, 0], batch.terminated)
    for first, *found in zip(*(column.tolist() for column in (*columns, batch.discounts)), strict=True):
        assert tuple(found) == by_hand[int(first)]


def test_returns_reach_over_the_seam_of_the_ring_and_over_added_steps():
    replay = Replay(4, 1, 1)
    add(replay, range(1, 6))  # place 0 holds step 5, which follows step 4 in place 3
    batch = replay.batch(np.array([3, 0]), discount=1.0, steps=3)
    assert batch.rewards.tolist() == [9, 5]
    add(replay, [6])
    assert replay.batch(np.array([3, 0]), discount=1.0, steps=3).rewards.tolist() == [15, 11]


def test_nothing_follows_across_a_cut():
    replay = Replay(10, 1, 1)
    add(replay, [1, 2])
    replay.cut()
    add(replay, [3])
    batch = replay.batch(np.arange(3), discount=1.0, steps=3)
    assert batch.rewards.tolist() == [3, 2, 3]
    assert batch.next_observations[:, 0].tolist() == [2.5, 2.5, 3.5]
    assert not batch.terminated.any()


@pytest.mark.parametrize("prioritized", [False, True])
def test_what_a_checkpoint_holds_goes_on_alike(prioritized):
    def new():
        return PrioritizedReplay(8, 1, 2, exponent=0.6) if prioritized else Replay(8, 1, 2)

    def went_on(replay):
        add(replay, range(20, 22), copies=(0, 1))
        np.random.seed(1)
        if prioritized:
            return replay.draw_weighted(6, discount=DISCOUNT, steps=3, weight_exponent=0.5)
        return replay.draw(6, discount=DISCOUNT, steps=3)

    replay, other = new(), new()
    add(replay, range(1, 4), copies=(0, 1), truncated=(2,))
    if prioritized:
        replay.set_errors(np.arange(6), torch.arange(6.0))
    other.load_tensors({name: tensor.clone() for name, tensor in replay.tensors().items()})
    for mine, theirs in zip(went_on(replay), went_on(other), strict=True):
        assert torch.equal(mine, theirs)


def test_the_sum_tree_finds_what_a_plain_sum_finds():
    generator = np.random.default_rng(0)
    tree, plain = SumTree(5000), np.zeros(5000)
    for _ in range(5):
        places = generator.choice(5000, size=700, replace=False)
        plain[places] = generator.random(700) * (generator.random(700) < 0.8)
        tree.set(places, plain[places])
        assert tree.total == pytest.approx(plain.sum(), rel=1e-12)
        masses = generator.random(500) * plain.sum()
        assert np.array_equal(tree.find(masses), np.searchsorted(plain.cumsum(), masses, side="right"))


def test_no_mass_leads_to_a_place_without_priority():
    tree = SumTree(2000)
    tree.set(np.arange(70), np.full(70, 0.1))  # sums of 0.1 are rounded
    beyond = np.nextafter(tree.total, 0)
    assert tree.find(np.array([0.0, beyond, tree.total])).tolist() == [0, 69, 69]


def test_priorities_and_weights_are_those_of_a_plain_loop():
    replay = PrioritizedReplay(50, 1, 1, exponent=0.7)
    add(replay, range(40))
    errors = np.random.default_rng(2).normal(size=40)
    replay.set_errors(np.arange(40), torch.from_numpy(errors))
    powers = [(abs(error) + 1e-6) ** 0.7 for error in errors]
    probabilities = [power / sum(powers) for power in powers]

    np.random.seed(3)
    batches = [replay.draw_weighted(8, discount=DISCOUNT, steps=1, weight_exponent=0.4) for _ in range(4000)]
    counts = np.bincount(np.concatenate([batch.places.numpy() for batch in batches]), minlength=40)
    expected = np.array(probabilities) * 32_000
    assert ((counts - expected) ** 2 / expected).sum() < 72.1  # χ² of 39 degrees, one in a thousand; shares vary less

    weights = [(40 * probabilities[place]) ** -0.4 for place in batches[0].places.tolist()]
    assert batches[0].weights.tolist() == pytest.approx([weight / max(weights) for weight in weights], rel=1e-6)


def test_a_new_step_has_the_largest_priority_so_far():
    replay = PrioritizedReplay(10, 1, 1, exponent=1.0)
    add(replay, [1, 2])
    replay.set_errors(np.array([0, 1]), torch.tensor([5.0, 0.1]))
    replay.set_errors(np.array([0]), torch.tensor([0.2]))
    add(replay, [3])
    assert replay.tree.priorities[:3].tolist() == pytest.approx([0.2, 0.1, 5.0], rel=1e-4)


def test_sums_of_rewards_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    rewards, steps = torch.randn(5, 30, dtype=torch.float64), torch.randint(1, 6, (30,))
    rewards[4, steps < 5] = torch.nan  # not read
    sums, discounts = n_step_sums(rewards, steps, discount=0.9)
    for row, count in enumerate(steps.tolist()):
        assert sums[row].item() == pytest.approx(sum(0.9**k * rewards[k, row].item() for k in range(count)), rel=1e-12)
        assert discounts[row].item() == pytest.approx(0.9**count, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: n_step_sums(torch.zeros(3, 2), torch.ones(3, dtype=torch.int64), discount=0.9), "steps"),
        (lambda: n_step_sums(torch.zeros(3, 2), torch.ones(2, dtype=torch.int64), discount=1.1), "discount"),
        (lambda: n_step_sums(torch.zeros(3, 2), torch.tensor([1, 4]), discount=0.9), "steps"),
        (lambda: n_step_sums(torch.zeros(3, 2), torch.tensor([0, 3]), discount=0.9), "steps"),
        (lambda: proportional_priorities(torch.zeros(2), exponent=-1.0), "exponent"),
        (lambda: proportional_priorities(torch.zeros(2), exponent=1.0, offset=0.0), "offset"),
        (lambda: replay_weights(torch.ones(2), size=2, exponent=1.5), "exponent"),
    ],
)
def test_bad_numbers_are_refused(call, name):
    with pytest.raises(ValueError, match=rf"^(?=.*expected).*\b{name}\b"):
        call()


def test_a_ring_for_which_there_is_no_memory_is_refused():
    with pytest.raises(InputError, match=r"buffer_size is 1000000000000: there is no memory for the 800,000\.0 GB"):
        Replay(10**12, 100, 1)
