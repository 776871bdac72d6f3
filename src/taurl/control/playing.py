"""Watching a policy: in a window, as a video, or as the small GIF of a run's report."""

import copy as copying
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import gymnasium
import numpy as np

from taurl.control.action_masks import single_mask
from taurl.control.environments import Array
from taurl.control.evaluation import Evaluation, with_limit
from taurl.control.making import EnvironmentLike, make_single
from taurl.control.videos import gif, stride, write_mp4
from taurl.runtime.errors import InputError, one_line
from taurl.runtime.files import write_whole, writing

# The GIF of a report, bounded so that the page stays small and the command soon ends.
REPORT_EPISODES = 2
REPORT_FRAMES = 250
REPORT_SECONDS = 5.0
REPORT_BYTES = 500_000
REPORT_WIDTHS = (320, 240, 160)  # pixels; the first that fits

Mode = Literal["human", "rgb_array"]


def play(
    policy: Any,
    env: EnvironmentLike,
    arguments: dict[str, Any],
    *,
    video: Path | None,
    episodes: int,
    seed: int,
    sampled: bool,
) -> Evaluation:
    """Play episodes in a window, or write them to a .mp4 or .gif file.

    Args:
        env: a gymnasium id, a function that makes an environment, or an environment; the last two with the render_mode
            that is needed: "human" for a window, "rgb_array" for a file.
        arguments: of a gymnasium id.
    Returns: returns and lengths of the episodes, and how many were cut here, as in an evaluation.
    Raises: InputError for another kind of file, or an environment that cannot be rendered.
    """
    if video is not None and video.suffix not in (".mp4", ".gif"):
        raise InputError(f"video is {video}, expected a name that ends in .mp4 or .gif")
    if video is not None:
        require_writable(video)
    arguments, longest = with_limit(env, arguments)
    environment = rendering(env, arguments, "rgb_array" if video else "human")
    rate = frame_rate(environment)
    returns, lengths = [0.0] * episodes, [0] * episodes

    def steps() -> Iterator[None]:
        for number in range(episodes):
            played = episode(policy, environment, seed=seed + number, sampled=sampled)
            for lengths[number], returns[number] in enumerate(islice(played, longest and longest + 1)):
                yield

    with nullcontext() if environment is env else closing(environment):
        if video is None:
            for _ in steps():  # the window draws itself
                pass
        elif video.suffix == ".mp4":
            write_mp4((picture(environment) for _ in steps()), video, rate)
        else:
            every = stride(rate)
            content = gif([picture(environment) for place, _ in enumerate(steps()) if place % every == 0], rate / every)
            write_whole(video, content)
    return Evaluation(returns, lengths, cut=sum(longest is not None and length >= longest for length in lengths))


def recorded(policy: Any, env: EnvironmentLike, arguments: dict[str, Any], *, seed: int) -> bytes:
    """A GIF of an episode or two, bounded in frames, time and bytes. Raises: InputError when it cannot be rendered."""
    until = time.monotonic() + REPORT_SECONDS
    environment = rendering(env, arguments, "rgb_array")
    rate = frame_rate(environment)
    every = stride(rate)
    frames: list[Array] = []
    with nullcontext() if environment is env else closing(environment):
        for number in range(REPORT_EPISODES):
            for place, _ in enumerate(episode(policy, environment, seed=seed + number, sampled=False)):
                if place % every == 0:
                    frames.append(picture(environment))
                if len(frames) == REPORT_FRAMES or time.monotonic() > until:
                    break
            if len(frames) > REPORT_FRAMES // 2 or time.monotonic() > until:
                break
    for width in REPORT_WIDTHS:
        content = gif(frames, rate / every, width=width)
        if len(content) <= REPORT_BYTES:
            break
    return content


def rendering(env: EnvironmentLike, arguments: dict[str, Any], mode: Mode) -> gymnasium.Env[Any, Any]:
    """An environment that renders in this mode. Raises: InputError when there can be none."""
    displays = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if not displays and mode == "human":
        raise InputError("no window can be shown: there is no display; write a video with --video FILE.mp4")
    if not displays:  # then pygame and MuJoCo draw into memory, unless these say something else already
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        if isinstance(env, str):
            made = make_single(env, {**arguments, "render_mode": mode})
        else:
            made = env if isinstance(env, gymnasium.Env) else env()
    except (gymnasium.error.Error, TypeError, ImportError) as error:
        raise InputError(f"{env} cannot be rendered: {one_line(error)}") from error
    if made.render_mode != mode:
        raise InputError(f"{name_of(made)} was made with render_mode {made.render_mode!r}, expected {mode!r}")
    follow(made)
    return made


def require_writable(path: Path) -> None:
    """Make the folder of a file. Raises: RunError when no file can be written there, before anything is played."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass


def follow(environment: gymnasium.Env[Any, Any]) -> None:
    """Let the camera of a MuJoCo environment go along; in gymnasium 1.4 HalfCheetah runs out of the picture."""
    bare: Any = environment.unwrapped
    renderer = getattr(bare, "mujoco_renderer", None)
    if renderer is None or bare.camera_id is not None or renderer.camera_id != -1:  # a camera was asked for
        return
    if "trackbodyid" in (renderer.default_cam_config or {}):
        return
    import mujoco

    camera = mujoco.mjtObj.mjOBJ_CAMERA
    renderer.camera_id = mujoco.mj_name2id(bare.model, camera, "track")  # −1 where there is none


def episode(policy: Any, environment: gymnasium.Env[Any, Any], *, seed: int, sampled: bool) -> Iterator[float]:
    """Play an episode; gives the return so far, after the reset and after each step."""
    policy = copying.copy(policy)  # what it remembers of this episode stays there
    observation, info = environment.reset(seed=seed)
    returned = 0.0
    yield returned
    for step in count():
        told = {"episode_start": step == 0} if getattr(policy, "remembers", False) else {}
        if getattr(policy, "masks_actions", False):
            told["action_mask"] = single_mask(environment, info)
        action = policy.predict(observation, deterministic=not sampled, **told)
        observation, reward, terminated, truncated, info = environment.step(action)
        returned += float(reward)
        yield returned
        if terminated or truncated:
            return


def picture(environment: gymnasium.Env[Any, Any]) -> Array:
    """What the environment shows now, uint8 [height, width, 3]. Raises: InputError when it cannot draw."""
    try:
        frame: Any = environment.render()
    except Exception as error:  # of the graphics library, whichever it is
        raise InputError(f"{name_of(environment)} cannot be rendered here: {one_line(error)}") from error
    if not isinstance(frame, np.ndarray):
        raise InputError(f"{name_of(environment)} renders {type(frame).__name__}, expected an array of pixels")
    return frame


def name_of(environment: gymnasium.Env[Any, Any]) -> str:
    return environment.spec.id if environment.spec else type(environment.unwrapped).__name__


def frame_rate(environment: gymnasium.Env[Any, Any]) -> int:
    """Steps that one second shows."""
    return int(environment.metadata.get("render_fps") or 30)
