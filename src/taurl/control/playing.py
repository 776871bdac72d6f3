"""Watching a policy: in a window, or as a video."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from taurl.control.action_masks import single_mask
from taurl.runtime.errors import InputError
from taurl.runtime.files import writing

LONGEST = 10_000  # steps of one episode, for environments without a time limit


def play(
    policy: Any, env: str, arguments: dict[str, Any], *, video: Path | None, episodes: int, seed: int, sampled: bool
) -> list[float]:
    """Play episodes in a window, or write them to a .mp4 or .gif file. Returns their returns."""
    if video is not None and video.suffix not in (".mp4", ".gif"):
        raise InputError(f"video is {video}, expected a name that ends in .mp4 or .gif")
    try:
        environment = gymnasium.make(env, render_mode="rgb_array" if video else "human", **arguments)
    except (gymnasium.error.Error, TypeError, ModuleNotFoundError) as error:
        raise InputError(f"{env} cannot be rendered: {' '.join(str(error).split())}") from error
    frames: list[Any] = []
    returns = []
    try:
        for episode in range(episodes):
            observation, info = environment.reset(seed=seed + episode)
            total = 0.0
            for step in range(LONGEST):
                if video:
                    frames.append(environment.render())
                told = {"episode_start": step == 0} if getattr(policy, "remembers", False) else {}
                if getattr(policy, "masks_actions", False):
                    told["action_mask"] = single_mask(environment, info)
                action = policy.predict(observation, deterministic=not sampled, **told)
                observation, reward, terminated, truncated, info = environment.step(action)
                total += float(reward)
                if terminated or truncated:
                    break
            returns.append(total)
    finally:
        environment.close()
    if video:
        write_video(frames, video, int(environment.metadata.get("render_fps", 30)))
    return returns


def write_video(frames: list[Any], path: Path, fps: int) -> None:
    """Frames [height, width, 3] as a .mp4 or .gif file."""
    import imageio.v3 as imageio

    even = [np.asarray(frame)[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2] for frame in frames]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gif":
            imageio.imwrite(path, even[::2], duration=2000 / fps, loop=0)
        else:
            imageio.imwrite(path, even, fps=fps, codec="libx264", macro_block_size=2)
