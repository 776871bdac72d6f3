"""`taurl control …`: what is printed, and one line that helps for whatever is wrong."""

import json
import re
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import yaml
from PIL import Image

import taurl.control
from taurl.cli import main
from taurl.commands.control_play import figures
from taurl.control import ALGORITHMS, PPO, PPOConfig, load, presets
from taurl.control.evaluation import LONGEST, with_limit
from taurl.control.playing import play
from taurl.control.presets import preset
from taurl.control.trainer import evaluate_policy
from taurl.runtime.config import read_yaml, validated

SMALL = "--no-preset --no-video --environments 2 --rollout-steps 16 --minibatch-size 16 --record-every 32 --steps 32"


def control(words, *more):
    return main(["control", *words.split(), *map(str, more)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, `run` in it."""
    folder = tmp_path_factory.mktemp("control")
    assert control(f"ppo --env CartPole-v1 --eval-episodes 2 {SMALL} --out", folder / "run") == 0
    return folder / "run"


def test_figures_have_the_decimals_that_their_size_needs():
    assert figures(0.7426, 0.4372) == ["0.743", "0.437"]
    assert figures(500.0, 0.0) == ["500.0", "0.0"]
    assert figures(-84.321, 12.5) == ["-84.32", "12.50"]
    assert figures(7.93, 2.6) == ["7.930", "2.600"]
    assert figures(-1072.4, 99.3) == ["-1,072", "99"]
    assert figures(0.0) == ["0.000"]


def test_training_ends_with_the_return_and_the_places(run, capsys):
    words = "q-learning --env FrozenLake-v1 --no-preset --no-video --steps 100 --eval-episodes 3 --out"
    assert control(words, run.parent / "lake") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"return         \d\.\d{3} ± \d\.\d{3} over 3 episodes", lines[0])
    assert lines[-3:] == [
        f"run directory  {run.parent / 'lake'}",
        f"policy         {run.parent / 'lake' / 'final'}",
        f"report         {run.parent / 'lake' / 'report.html'}",
    ]


@pytest.mark.parametrize("algorithm", ["dqn", "reinforce", "a2c", "trpo", "grpo"])
def test_each_algorithm_has_its_command(tmp_path, algorithm):
    words = f"{algorithm} --env CartPole-v1 --no-preset --no-video --steps 64 --eval-episodes 0 --out"
    assert control(words, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/environment.json").read_text())["algorithm"] == algorithm


@pytest.mark.parametrize("folder", ["", "best", "final"])
def test_evaluating_prints_the_spread(run, capsys, folder):
    assert control("evaluate", run / folder, "--episodes", 12) == 0
    lines = capsys.readouterr().out.splitlines()
    number = r"[\d,.]+"
    expected = [
        rf"return         {number} ± {number}",
        rf"percentiles    10%: {number}, 50%: {number}, 90%: {number}",
        rf"least, most    {number}, {number}",
        rf"length         {number}",
        r"episodes       12",
        r"policy         after 32 steps",
    ]
    assert len(lines) == 6
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line)


def test_evaluating_is_that_of_the_library(run, capsys):
    def printed(*words):
        assert control("evaluate", run, "--episodes", 12, *words) == 0
        return capsys.readouterr().out.splitlines()[0]

    found = evaluate_policy(load(run), "CartPole-v1", 12, seed=7, arguments={})
    mean, spread, _ = figures(float(np.mean(found.returns)), float(np.std(found.returns)), max(found.returns))
    assert printed("--seed", 7) == f"return         {mean} ± {spread}"
    assert printed("--seed", 7) != printed("--seed", 7, "--sampled")


def test_playing_writes_a_video_and_says_the_returns(run, capsys, tmp_path):
    assert control("play", run, "--video", tmp_path / "out.gif", "--episodes", 2, "--seed", 7) == 0
    found = [evaluate_policy(load(run), "CartPole-v1", 1, seed=seed, arguments={}).returns[0] for seed in (7, 8)]
    said = [f"episode {number}: return {value}" for number, value in enumerate(figures(*found), 1)]
    assert capsys.readouterr().out.splitlines() == [*said, f"video: {tmp_path / 'out.gif'}"]
    with Image.open(tmp_path / "out.gif") as film:
        assert film.size == (600, 400)
        assert film.n_frames > 5


PRESETS = sorted(Path(presets.__file__).parent.glob("*/*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=[f"{path.parent.name}/{path.stem}" for path in PRESETS])
def test_each_file_of_tuned_settings_is_for_its_algorithm_and_environment(path):
    module = path.parent.name.replace("-", "_")
    name = next(name for name, of in ALGORITHMS.items() if of == module)
    config = validated(getattr(taurl.control, f"{name}Config"), read_yaml(path), source=str(path))
    of_many = path.stem == "ALE"
    assert config.env == (None if of_many else path.stem)
    for env in (
        ("ALE/Pong-v5", "ale_py:ALE/Pong-v5", "PongNoFrameskip-v4")
        if of_many
        else (path.stem, f"my_module:{path.stem}")
    ):
        assert preset(path.parent.name, env) == path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ppo", "no environment given: taurl control ppo --env CartPole-v1"),
        ("ppo CartPole-v1", "'CartPole-v1' stands where an option was expected; did you mean --env CartPole-v1"),
        ("ppo --env CartPole", "No registered env with id: CartPole; did you mean CartPole-v1"),
        ("ppo --env CartPole-v1 --steps 1e5", "--steps: '1e5' is no whole number, such as 100000"),
        ("ppo --env CartPole-v1 --stop-at high", "--stop-at: 'high' is neither None nor of type FLOAT"),
        ("ppo --env CartPole-v1 --kl-coefficient 3", "kl_coefficient is 3, the first price under kl_penalty_target"),
        (
            "ppo --env CartPole-v1 --initial-log-std -1",
            r"is -1.0, but action space Discrete\(2\) is no box",
        ),
        ("ppo --env CartPol-v1", "env is 'CartPol-v1': cannot be made: .*exist; did you mean CartPole-v1"),
        ("ppo --env CartPole-v9", "env is 'CartPole-v9': cannot be made: .*`v0`, `v1`"),
        (
            "ppo --env CartPole-v1 --env-args gravity=3",
            "cannot be made: .*unexpected keyword argument 'gravity'; its arguments: sutton",
        ),
        (
            "ppo --env CartPole-v1 --env-args start=2020-02-30",
            "unexpected keyword argument 'start'; its arguments: sutton",
        ),
        ("ppo --env CartPole-v1 --env-args gravity", "'gravity' is not NAME=VALUE"),
        ("ppo --env CartPole-v1 --device cuda", "Unrecognized options: --device, cuda"),
        ("ppo --env CartPole-v1 --precision bfloat16", "Unrecognized options: --precision, bfloat16"),
        ("q-learning --env FrozenLake-v1 --max-grad-norm 1", "Unrecognized options: --max-grad-norm, 1"),
        ("ppo --env CartPole-v1 --stepz 3", "Perhaps you meant: --steps"),
        ("ppo --env CartPole-v1 --hidden 64 0", "hidden.1 is 0: Input should be greater than or equal to 1"),
        ("ppo --env CartPole-v1 --out file", "file exists already, a file"),
        ("ppo --config bad.yaml", "bad.yaml: unknown setting stepz; did you mean steps"),
        ("ppo --resume nothing", "nothing: not a run directory: config.yaml is missing"),
        ("dqn --resume run", "run: a run of ppo, not of dqn; resume it with ppo"),
        ("ppo --resume run --learning-rate 1", "learning_rate was 0.0003 and cannot become 1.0 on resume"),
        ("q-learning --env CartPole-v1", "not one of Discrete, .* take an algorithm with a network"),
        ("dqn --env Pendulum-v1", "is not Discrete, which action values need; take ppo or trpo"),
        ("evaluate", "no run given: taurl control evaluate runs/NAME"),
        ("evaluate nothing 50", "'50' stands where an option was expected"),
        ("play nothing out.gif", "'out.gif' stands where an option was expected"),
        ("evaluate nothing", "nothing: there is no such folder; expected a run's"),
        ("evaluate run --episodes 0", "episodes is 0: Input should be greater than or equal to 1"),
        ("play run", r"give either --video FILE.mp4 \(or .gif\) or --render human"),
        ("play run --video out.avi", r"video is out.avi, expected a name that ends in .mp4 or .gif"),
        ("plaz run", "unknown command `control plaz`; did you mean `taurl control play`"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, failing, monkeypatch, words, message):
    monkeypatch.chdir(run.parent)
    (run.parent / "file").write_text("")
    (run.parent / "bad.yaml").write_text("env: CartPole-v1\nstepz: 3\n")
    assert re.search(message, failing(["control", *words.split()], 2))


def settings_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_settings_tuned_for_the_environment_are_used_and_said_and_options_win(tmp_path, capsys):
    words = "ppo --env CartPole-v1 --steps 32 --no-video --eval-episodes 0 --learning-rate 0.002 --out"
    assert control(words, tmp_path / "tuned") == 0
    assert "settings tuned for CartPole-v1 (ppo)" in capsys.readouterr().err
    tuned = yaml.safe_load(preset("ppo", "CartPole-v1").read_text())
    found = settings_of(tmp_path / "tuned")
    assert {name: found[name] for name in tuned} == {**tuned, "steps": 32, "learning_rate": 0.002}

    mine = {"env": "CartPole-v1", "learning_rate": 0.002, "steps": 64, "video": False, "eval_episodes": 0}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    assert control("ppo --steps 32 --config", tmp_path / "mine.yaml", "--out", tmp_path / "file") == 0
    assert "settings tuned for CartPole-v1 (ppo)" in capsys.readouterr().err
    assert settings_of(tmp_path / "file") == {**found, "out": str(tmp_path / "file")}


OWN = """
import gymnasium
import numpy as np


class Lamps(gymnasium.Env):
    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, length=3, render_mode=None):
        self.length, self.render_mode = length, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.taken = 0
        return 0, {}

    def step(self, action):
        self.taken += 1
        return self.taken % 2, 1.0, self.taken == self.length, False, {}

    def render(self):
        return np.full((20, 20, 3), self.taken, np.uint8)


gymnasium.register("Lamps-v0", Lamps)
"""


def test_an_environment_of_a_module_in_the_current_folder_is_named_with_it(tmp_path, monkeypatch, capsys, failing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_lamps.py").write_text(OWN)

    def command(words):
        """As in a process of its own: nothing is imported yet."""
        sys.modules.pop("own_lamps", None)
        gymnasium.registry.pop("Lamps-v0", None)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
            assert control(words) == 0
        return capsys.readouterr().out

    train = "ppo --env own_lamps:Lamps-v0 --env-args length=5 --eval-episodes 2 --out run"
    assert "return         5.000 ± 0.000 over 2 episodes" in command(f"{train} {SMALL}")
    assert "return         5.000 ± 0.000" in command("evaluate run --episodes 2")
    assert "episode 1: return 5.000" in command("play run --video out.gif")
    assert "64 steps in" in command("ppo --resume run --steps 64")
    assert with_limit("own_lamps:Lamps-v0", {}) == ({"max_episode_steps": LONGEST}, LONGEST)
    missing = failing(["control", "ppo", "--env", "no_lamps:Lamps-v0"], 2)
    assert "env is 'no_lamps:Lamps-v0': no_lamps cannot be imported (No module named 'no_lamps')" in missing
    unknown = failing(["control", "ppo", "--env", "own_lamps:Lamp-v0"], 2)
    assert re.search("env is 'own_lamps:Lamp-v0': cannot be made: .*; did you mean Lamps-v0", unknown)
    assert unknown.lower().count("did you mean") == 1


def test_of_a_run_from_python_it_is_said_how_python_goes_on_with_it(tmp_path, monkeypatch, failing):
    monkeypatch.chdir(tmp_path)

    def make():
        return gymnasium.make("CartPole-v1", render_mode="rgb_array")

    PPO(
        make, PPOConfig(out=Path("run"), steps=32, rollout_steps=16, environments=2, eval_episodes=0, video=False)
    ).train()
    for command in ("evaluate run", "play run --video out.gif"):
        said = failing(["control", *command.split()], 2)
        assert "run: its environment came from Python; " in said
        assert "taurl.control.evaluate_policy(policy, make, 100) scores it" in said
        assert "taurl.control.playing.play(policy, make, ...) shows it" in said
    assert len(PPO.resume("run", env=make).evaluate(3).returns) == 3  # as it was said
    played = play(load("run"), make, {}, video=Path("out.gif"), episodes=1, seed=0, sampled=False)
    assert played.returns[0] == played.lengths[0] > 0
    assert Path("out.gif").stat().st_size > 100
