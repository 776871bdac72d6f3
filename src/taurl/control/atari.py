"""Atari games, preprocessed as PPO's reference code does. Imported when a game is asked for: it needs ale-py.

`Games` is ale-py's vector class, one process and its own threads; `game` makes a single environment of the same from
gymnasium's wrappers, to be rendered or put in a process of its own. Frame by frame both show the same.
"""

from typing import Any

import ale_py
import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from taurl.control.environments import Array, Transition

gymnasium.register_envs(ale_py)  # or the import is seen as one without use
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no greeting from each copy

FOR_LEARNING = ("episodic_life", "reward_clipping")  # arguments that are of `LearningView` and not of the game
LARGEST_SEED = 2**31  # ale-py keeps seeds in 32 bits with a sign


class Games(AtariVectorEnv):
    """So many copies of a game, reset on their own next step.

    Of ale-py, named here: a start of up to 30 no-ops (`noop_max`) and a press of FIRE where there is that action; each
    action for 4 frames (`frameskip`), of the last two the brighter pixel; 84 × 84 grey, the last 4 of them
    (`stack_num`). `repeat_action_probability` is the id's: 0.25 of ALE/…-v5, 0 of …NoFrameskip-v4. Rewards are those
    of the game.
    """

    # Its own: ale-py writes to it, and it would be that of every vector class. What draws is `game`.
    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"]}  # noqa: RUF012 as in the class above it
    hides_state = "ale-py keeps it to itself"

    def __init__(self, name: str, count: int, arguments: dict[str, Any]):
        settings = {**gymnasium.spec(name).kwargs, "frameskip": 4, "reward_clipping": False, **played(arguments)}
        super().__init__(num_envs=count, **settings)

    def reset(
        self, *, seed: int | Array | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        seeds = None if seed is None else (np.arange(self.num_envs) + seed) % LARGEST_SEED
        found: tuple[Any, dict[str, Any]] = super().reset(seed=seeds, options=options)
        return found


class Preprocessing(AtariPreprocessing):
    """gymnasium's, and FIRE for one frame after a reset where there is that action: some games do not start without."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        meanings = self.env.unwrapped.get_action_meanings()  # type: ignore[attr-defined]
        if "FIRE" in meanings:
            *_, info = self.env.step(meanings.index("FIRE"))
            self.ale.getScreenGrayscale(self.obs_buffer[0])
            observation = self._get_obs()  # type: ignore[no-untyped-call]
        return observation, info


def game(name: str, arguments: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """One copy of a game, with what `Games` does to it."""
    others = played(arguments)
    others.pop("num_threads", None)  # one copy has one
    noop_max, skip, stack = (others.pop(*one) for one in (("noop_max", 30), ("frameskip", 4), ("stack_num", 4)))
    made = gymnasium.make(name, frameskip=1, **others)
    return FrameStackObservation(Preprocessing(made, noop_max, skip), stack, padding_type="zero")


def of_envpool(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The same game by envpool's arguments."""
    settings = {**gymnasium.spec(name).kwargs, "frameskip": 4, **played(arguments)}
    skip = settings.pop("frameskip")
    steps = settings.pop("max_num_frames_per_episode") // skip
    del settings["game"]
    return {"frame_skip": skip, "max_episode_steps": steps, **settings}


def played(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are of the game, and not of what learning is shown."""
    return {name: value for name, value in arguments.items() if name not in FOR_LEARNING}


class LearningView:
    """What learning is shown of a game that goes on as it is: a life lost ends, and rewards are signs.

    Reported returns, and evaluations, are of whole games and their own rewards.

    Args:
        episodic_life: a lost life counts as termination, though the game goes on; the next life is another episode.
        reward_clipping: rewards become −1, 0 or 1.
    Source: Mnih et al. 2015, doi:10.1038/nature14236, methods.
    """

    def __init__(self, *, episodic_life: bool = True, reward_clipping: bool = True):
        self.episodic_life, self.reward_clipping = episodic_life, reward_clipping
        self.lives: Array = np.zeros(0)

    def begin(self, infos: dict[str, Any]) -> None:
        """Games begin in every copy."""
        self.lives = infos["lives"].copy()

    def __call__(self, given: Transition, infos: dict[str, Any]) -> Transition:
        """What learning is shown of a step."""
        before, self.lives = self.lives, infos["lives"].copy()
        if self.episodic_life:
            lost = (self.lives < before) & ~given.only_reset
            lost[list(given.last_observations)] = False  # another game has begun: the lives are not those of one
            terminated = given.terminated | lost
            given = given._replace(terminated=terminated, truncated=given.truncated & ~terminated)
        return given._replace(rewards=np.sign(given.rewards)) if self.reward_clipping else given
