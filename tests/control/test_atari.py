"""Atari games: the same frames from both makers, and what learning is shown of lives and rewards."""

import sys

import gymnasium
import numpy as np
import pytest
import torch
from small_environments import without_times

from taurl.control import PPO, PPOConfig
from taurl.control.environments import Environments, Transition
from taurl.control.making import make_single
from taurl.control.presets import preset
from taurl.control.trainer import PICTURE, evaluate_policy
from taurl.runtime.errors import InputError

pytest.importorskip("ale_py")
cv2 = pytest.importorskip("cv2")

from taurl.control.atari import Games, LearningView, Preprocessing  # noqa: E402 (needs ale-py)

CERTAIN = {"repeat_action_probability": 0.0, "noop_max": 0}  # a game without chance


def played(environments, steps, actions=4):
    """The transitions of random actions."""
    rng = np.random.default_rng(0)
    environments.reset()
    return [environments.step(rng.integers(actions, size=environments.count)) for _ in range(steps)]


@pytest.mark.parametrize("name", ["ALE/Breakout-v5", "ALE/Freeway-v5"])  # with a FIRE that begins the game, and without
def test_both_makers_show_the_same_game(name):
    one, single = Games(name, 1, CERTAIN), make_single(name, CERTAIN)
    assert one.single_observation_space == single.observation_space
    np.testing.assert_array_equal(one.reset(seed=0)[0][0], single.reset(seed=0)[0])
    rng = np.random.default_rng(0)
    for _ in range(500):
        action = int(rng.integers(3))
        several, alone = one.step(np.array([action])), single.step(action)
        np.testing.assert_array_equal(several[0][0], alone[0])
        assert [each[0] for each in several[1:4]] == list(alone[1:4])
        assert several[4]["lives"][0] == alone[4]["lives"]
        if alone[2]:
            break
    assert alone[2] == (name == "ALE/Breakout-v5")  # five lives of Breakout are soon over


def test_a_frame_is_the_brighter_of_the_last_two_of_four_grey_and_small():
    single = make_single("ALE/Pong-v5", CERTAIN)
    raw = gymnasium.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0, obs_type="grayscale").unwrapped
    single.reset()
    raw.reset()
    raw.step(raw.get_action_meanings().index("FIRE"))
    for action in [2, 2, 3, 0, 5] * 4:
        frames, rewards = zip(*(raw.step(action)[:2] for _ in range(4)), strict=True)
        shown, reward, *_ = single.step(action)
        expected = cv2.resize(np.maximum(frames[2], frames[3]), (84, 84), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(shown[3], expected)
        assert reward == sum(rewards)
    np.testing.assert_array_equal(single.step(0)[0][2], expected)  # the last four stand in a row


def test_a_game_starts_with_no_ops_of_a_random_number():
    games = Games("ALE/Pong-v5", 3, {})
    first, other, again = (games.reset(seed=seed)[1]["frame_number"].tolist() for seed in (0, 3, 0))
    assert len({*first, *other}) > 3
    assert max(first + other) <= 31  # and one of FIRE
    assert again == first


def test_fire_is_pressed_where_the_game_waits_for_it():
    single = make_single("ALE/Breakout-v5", CERTAIN)
    assert isinstance(single.env, Preprocessing)
    first = single.reset()[0]
    moved = [single.step(0)[0] for _ in range(20)][-1]
    assert np.abs(moved[3].astype(int) - first[3])[40:].max() > 50, "no ball is seen to fly"


def lives_of(*numbers):
    return {"lives": np.array(numbers)}


def test_a_lost_life_ends_for_learning_and_rewards_are_signs_by_hand():
    view = LearningView()
    view.begin(lives_of(3, 3))
    no, nothing = np.zeros(2, bool), np.zeros(2)

    def shown(rewards=nothing, terminated=no, truncated=no, only_reset=no, last=(), *, lives):
        ended = dict.fromkeys(last)
        return view(Transition(None, rewards, terminated, truncated, only_reset, ended), lives_of(*lives))

    found = shown(np.array([7.0, -0.5]), lives=(3, 2))
    assert found.rewards.tolist() == [1, -1]
    assert found.terminated.tolist() == [False, True]
    assert shown(lives=(3, 2)).terminated.tolist() == [False, False]  # the next life goes on
    assert shown(lives=(4, 2)).terminated.tolist() == [False, False]  # a life won
    assert shown(lives=(3, 2)).terminated.tolist() == [True, False]  # and lost
    # A game that was cut just when a life was lost: an end.
    found = shown(truncated=np.array([True, False]), lives=(2, 2))
    assert (found.terminated.tolist(), found.truncated.tolist()) == ([True, False], [False, False])
    # One that was cut and has begun again: the lives are those of the next one already.
    assert shown(truncated=np.array([True, False]), last=[0], lives=(1, 2)).terminated.tolist() == [False, False]
    # A game of fewer lives begins.
    assert shown(only_reset=np.array([False, True]), lives=(1, 1)).terminated.tolist() == [False, False]


@pytest.mark.parametrize("vectorization", ["auto", "sync"])
def test_games_go_on_over_lost_lives_and_are_reported_whole(vectorization):
    made = {"seed": 0, "arguments": CERTAIN, "vectorization": vectorization}
    plain, learning = (Environments("ALE/Breakout-v5", 2, for_learning=shown, **made) for shown in (False, True))
    games, lives = played(plain, 450), played(learning, 450)
    for game, life in zip(games, lives, strict=True):
        np.testing.assert_array_equal(game.observations, life.observations)
        np.testing.assert_array_equal(game.only_reset, life.only_reset)
        assert (life.terminated >= game.terminated).all()
        np.testing.assert_array_equal(life.rewards, np.sign(game.rewards))
    ends = sum(game.terminated.sum() for game in games)
    assert ends >= 3
    lost = sum(life.terminated.sum() for life in lives)
    assert 5 * ends <= lost < 5 * (ends + 2)  # a game has five lives
    assert plain.episodes == learning.episodes
    assert len(learning.episodes) == ends


def test_rewards_are_reported_as_the_game_gives_them():
    environments = Environments("ALE/SpaceInvaders-v5", 2, seed=0, for_learning=True)
    given = played(environments, 900, actions=6)
    assert {float(reward) for one in given for reward in one.rewards} == {0.0, 1.0}
    assert max(episode.reward for episode in environments.episodes) > 50


def test_what_learning_is_shown_can_be_the_game_itself():
    arguments = {**CERTAIN, "episodic_life": False, "reward_clipping": False}
    environments = Environments("ALE/SpaceInvaders-v5", 1, seed=0, arguments=arguments, for_learning=True)
    given = played(environments, 400, actions=6)
    assert sum(int(one.terminated.sum()) for one in given) == len(environments.episodes)
    assert max(float(one.rewards.max()) for one in given) >= 5


@pytest.mark.parametrize("vectorization", ["auto", "sync"])
def test_a_game_that_is_cut_is_truncated(vectorization):
    arguments = {**CERTAIN, "max_num_frames_per_episode": 40}
    made = {"seed": 0, "arguments": arguments, "vectorization": vectorization}
    given = played(Environments("ALE/Pong-v5", 1, for_learning=True, **made), 12)
    assert not any(one.terminated.any() for one in given)
    assert [bool(one.truncated[0]) for one in given].index(True) in (9, 10)  # a frame or none went to FIRE


def test_the_reference_codes_ids_are_known_and_have_no_sticky_actions():
    environments = Environments("PongNoFrameskip-v4", 1, seed=0)
    assert isinstance(environments.vector, Games)
    assert gymnasium.spec("PongNoFrameskip-v4").kwargs["repeat_action_probability"] == 0
    assert environments.observation_space.shape == (4, 84, 84)


@pytest.mark.parametrize("seed", [2**31 - 1, 2**32 - 1])
def test_seeds_of_any_size_are_taken(seed):
    Environments("ALE/Pong-v5", 3, seed=seed).reset()


def test_ppo_trains_evaluates_saves_and_is_seen(tmp_path):
    settings = {"environments": 2, "rollout_steps": 16, "minibatch_size": 16, "epochs": 1, "record_every": 32}
    game = {"env": "ALE/Breakout-v5", "env_args": {"max_num_frames_per_episode": 120}}
    trainer = PPO(config=PPOConfig(out=tmp_path / "run", steps=64, eval_episodes=2, **game, **settings)).train()
    assert isinstance(trainer.environments.view, LearningView)
    assert trainer.environments.unsaved == "ale-py keeps it to itself"
    assert without_times(trainer)[-1]["eval/mean_ep_length"] in (29, 30)
    assert sum(each.numel() for each in trainer.policy.actor.parameters()) == 1_686_180
    assert (tmp_path / "run" / "artifacts" / PICTURE).read_bytes()[:3] == b"GIF"
    single = make_single(game["env"], {**game["env_args"], "render_mode": "rgb_array"})
    shown, _ = single.reset(seed=0)
    assert single.render().shape == (210, 160, 3)
    assert trainer.predict(shown) in range(4)


def test_evaluation_is_of_whole_games_and_their_own_rewards():
    class Still:
        def act(self, batch, *, deterministic=True):
            return torch.randint(6, (len(batch),)).numpy()

    torch.manual_seed(0)
    found = evaluate_policy(Still(), "ALE/SpaceInvaders-v5", 3, seed=0, arguments={})
    assert max(found.returns) > 50
    assert min(found.lengths) > 200


def test_one_preset_is_for_all_games():
    path = preset("ppo", "ALE/Pong-v5")
    assert path is not None
    assert path.name == "ALE.yaml"
    assert preset("ppo", "ALE/Breakout-v5") == path
    assert preset("dqn", "ALE/Pong-v5") is None


def test_without_ale_py_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "taurl.control.atari")
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(
        InputError, match=r"the games of ALE/…: needs ale_py; in taurl's folder, pip install -e '\.\[atari\]'"
    ):
        Environments("ALE/Pong-v5", 1, seed=0)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("ALE/Pongg-v5", {}, "did you mean ALE/Pong-v5"),
        ("ALE/Pong-v5", {"colour": True}, "unexpected keyword argument"),
    ],
)
def test_games_that_cannot_be_made_are_named(name, arguments, said):
    with pytest.raises(InputError, match=f"env is '{name}': cannot be made: .*{said}"):
        Environments(name, 1, seed=0, arguments=arguments)
