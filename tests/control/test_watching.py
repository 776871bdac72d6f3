"""Videos: every step is seen, the GIF of a report is bounded, and a picture that cannot be had stops no run."""

import io
import os
import subprocess
import sys

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image, ImageSequence
from small_environments import Counting

from taurl.control import playing
from taurl.control.algorithms.ppo import PPO
from taurl.control.algorithms.ppo_config import PPOConfig
from taurl.control.playing import play, recorded, rendering
from taurl.control.trainer import PICTURE
from taurl.control.videos import gif, stride
from taurl.report import write_report
from taurl.runtime.errors import InputError, RunError

SMALL = {
    "environments": 2,
    "rollout_steps": 16,
    "minibatch_size": 16,
    "steps": 32,
    "record_every": 32,
    "eval_episodes": 0,
}


def bar(place):
    return slice(3 * (place % 20), 3 * (place % 20) + 3)


class Drawn(gymnasium.Env):
    """Shows the step of its episode, until `length`, as the place of a white bar in a black 40 × 60 picture."""

    observation_space = spaces.Box(0, 1000, (1,), np.float32)
    action_space = spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode="rgb_array", length=7):
        self.render_mode, self.length = render_mode, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.taken += 1
        return np.full(1, self.taken, np.float32), 1.0, self.taken == self.length, False, {}

    def render(self):
        frame = np.zeros((40, 60, 3), np.uint8)
        frame[:, bar(self.taken)] = 255
        return frame


class Fast(Drawn):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012


class Blind(Drawn):
    def render(self):
        raise RuntimeError("no library\nto draw with")


class Noise(Drawn):
    """What a GIF cannot make small."""

    def render(self):
        return np.random.default_rng(self.taken).integers(0, 256, (400, 600, 3), dtype=np.uint8)


for kind in (Drawn, Fast):
    gymnasium.register(f"{kind.__name__}-v0", kind)


class First:
    def predict(self, observation, *, deterministic=True):
        return 0


def places(frames):
    """Where the bar is in each frame."""
    return [int(np.asarray(frame)[:, :, 0].mean(0).reshape(20, 3).mean(1).argmax()) for frame in frames]


def frames_of(content):
    return [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(content))]


def test_a_video_shows_every_step_from_the_reset_to_the_end(tmp_path):
    for name in ("new/out.mp4", "new/out.gif"):
        found = play(First(), "Drawn-v0", {}, video=tmp_path / name, episodes=2, seed=0, sampled=False)
        assert found == ([7.0, 7.0], [7, 7], 0)
    shown = [*range(8), *range(8)]
    assert places(frames_of(tmp_path / "new/out.gif")) == shown
    film = imageio.imread(tmp_path / "new/out.mp4")
    assert film.shape == (16, 40, 60, 3)
    assert places(film) == shown
    assert imageio.immeta(tmp_path / "new/out.mp4")["fps"] == 10


def test_an_episode_without_an_end_is_cut_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("taurl.control.evaluation.LONGEST_OF_OTHERS", 5)
    for length, expected in ((5, ([5.0], [5], 1)), (4, ([4.0], [4], 0)), (10**9, ([5.0], [5], 1))):
        env = Drawn(length=length)
        assert play(First(), env, {}, video=tmp_path / "out.gif", episodes=1, seed=0, sampled=False) == expected
    assert places(frames_of(tmp_path / "out.gif")) == [*range(6)]


def test_a_gif_takes_fewer_frames_of_what_is_fast_and_rests_on_the_last(tmp_path):
    assert [stride(rate) for rate in (4, 25, 26, 50, 125)] == [1, 1, 2, 2, 5]
    play(First(), "Fast-v0", {}, video=tmp_path / "out.gif", episodes=1, seed=0, sampled=False)
    assert places(frames_of(tmp_path / "out.gif")) == [0, 2, 4, 6]
    frames = ImageSequence.Iterator(Image.open(tmp_path / "out.gif"))
    assert [frame.info["duration"] for frame in frames] == [40, 40, 40, 1000]


def test_a_gif_is_made_smaller_but_not_larger():
    frames = [np.full((40, 60, 3), value, np.uint8) for value in (0, 100)]
    assert Image.open(io.BytesIO(gif(frames, 10, width=30))).size == (30, 20)
    assert Image.open(io.BytesIO(gif(frames, 10, width=90))).size == (60, 40)


@pytest.mark.parametrize("kind", [Drawn, Noise])
def test_what_a_report_gets_is_bounded(kind, monkeypatch):
    monkeypatch.setattr(playing, "REPORT_FRAMES", 30)
    monkeypatch.setattr(playing, "REPORT_BYTES", 100_000)
    monkeypatch.setattr(playing, "REPORT_WIDTHS", (320, 20))
    content = recorded(First(), lambda: kind(length=1000), {}, seed=0)
    assert Image.open(io.BytesIO(content)).n_frames == 30
    assert len(content) < 100_000
    monkeypatch.setattr(playing, "REPORT_SECONDS", 0.0)
    assert Image.open(io.BytesIO(recorded(First(), kind, {}, seed=0))).n_frames == 1


def test_a_run_leaves_a_gif_of_its_policy_in_the_report(tmp_path):
    PPO("CartPole-v1", PPOConfig(out=tmp_path / "run", **SMALL)).train()
    with Image.open(tmp_path / "run" / "artifacts" / PICTURE) as film:
        assert film.n_frames > 5
        assert film.size == (320, 213)
    assert "<figcaption>trained policy</figcaption>" in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize(
    ("env", "video", "said"),
    [
        (lambda: Drawn(), True, None),
        (lambda: Drawn(), False, ""),
        (Counting, True, ""),  # cannot be drawn
        (lambda: Drawn(render_mode=None), True, ""),  # was made not to be
        (lambda: Blind(), True, "no video of the policy: Blind cannot be rendered here: no library to draw with"),
    ],
)
def test_a_picture_that_cannot_be_had_stops_no_run(tmp_path, capsys, env, video, said):
    trainer = PPO(env, PPOConfig(out=tmp_path / "run", video=video, **SMALL)).train()
    assert (trainer.run.directory / "final" / "policy.json").exists()
    assert (trainer.run.directory / "artifacts" / PICTURE).exists() == (said is None)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("step", "Counting:"))]
    assert [line for line in lines if "video" in line] == ([said] if said else [])


def test_nothing_is_played_where_the_video_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file/out.mp4", "file/out.gif"):
        with pytest.raises(RunError, match=r"file/out\.\w+: could not be written \((Not a directory|File exists)\)$"):
            play(None, "Drawn-v0", {}, video=tmp_path / name, episodes=1, seed=0, sampled=False)


def test_what_cannot_be_shown_is_refused_in_one_line(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(InputError, match="no window can be shown: there is no display"):
        rendering("CartPole-v1", {}, "human")
    with pytest.raises(InputError, match="Drawn was made with render_mode None, expected 'rgb_array'"):
        rendering(lambda: Drawn(render_mode=None), {}, "rgb_array")
    with pytest.raises(InputError, match="Nothing-v0 cannot be rendered: "):
        rendering("Nothing-v0", {}, "rgb_array")


def test_drawing_without_a_display_prints_nothing():
    code = (
        "from taurl.control.playing import recorded\n"
        "class Left:\n"
        "    def predict(self, observation, *, deterministic=True):\n"
        "        return 0\n"
        "print(len(recorded(Left(), 'CartPole-v1', {}, seed=0)) > 1000)\n"
    )
    bare = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "XDG_RUNTIME_DIR")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare)
    assert (found.stdout, found.stderr) == ("True\n", "")


def test_the_camera_goes_along_with_a_cheetah():
    pytest.importorskip("mujoco")
    made = rendering("HalfCheetah-v5", {}, "rgb_array")
    assert made.unwrapped.mujoco_renderer.camera_id == 0
    assert rendering("HalfCheetah-v5", {"camera_id": -1}, "rgb_array").unwrapped.mujoco_renderer.camera_id == -1
    assert rendering("Hopper-v5", {}, "rgb_array").unwrapped.mujoco_renderer.camera_id == -1


class Remembering:
    """Acts by how often it was asked in this episode."""

    remembers, asked = True, 100

    def predict(self, observation, *, deterministic=True, episode_start=False):
        self.asked = 0 if episode_start else self.asked + 1
        assert self.asked == observation[0]  # the step of the episode
        return 0


def test_what_a_policy_remembers_begins_with_the_episode_and_stays_there(tmp_path):
    policy = Remembering()
    play(policy, "Drawn-v0", {}, video=tmp_path / "out.gif", episodes=2, seed=0, sampled=False)
    assert policy.asked == 100
