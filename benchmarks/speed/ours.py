"""One measurement of taurl: `python ours.py ROW sync|auto FOLDER`, prints environment steps a second."""

import sys
import time
from pathlib import Path

from taurl import control
from taurl.runtime.machine import keep_freed_memory

CARTPOLE = {
    "rollout_steps": 32,
    "minibatch_size": 256,
    "trace_decay": 0.8,
    "discount": 0.98,
    "epochs": 20,
    "learning_rate": 1e-3,
}
CHEETAH = {"rollout_steps": 256, "minibatch_size": 64, "trace_decay": 0.95, "discount": 0.99, "epochs": 10}
TRPO = {"environments": 2, "rollout_steps": 512, "minibatch_size": 128, "conjugate_gradient_steps": 15}
DQN = {"hidden": (256, 256), "batch_size": 64, "learning_starts": 1000, "train_every": 256, "gradient_steps": 128}
# algorithm, environment, settings, steps before the clock starts, steps on the clock
ROWS = {
    "ppo-cartpole": ("PPO", "CartPole-v1", CARTPOLE, 2_048, 20_480),
    "ppo-halfcheetah": ("PPO", "HalfCheetah-v5", CHEETAH, 2_048, 10_240),
    "trpo-cartpole": ("TRPO", "CartPole-v1", TRPO, 2_048, 20_480),
    "dqn-cartpole": ("DQN", "CartPole-v1", {**DQN, "environments": 1}, 2_048, 20_480),
    "dqn-cartpole-8": ("DQN", "CartPole-v1", {**DQN, "environments": 8}, 2_048, 20_480),
}

keep_freed_memory()  # as the command line does
name, env, settings, before, measured = ROWS[sys.argv[1]]
config_class = getattr(control, f"{name}Config")
config = config_class(
    out=Path(sys.argv[3]),
    steps=before + measured,
    eval_episodes=0,
    video=False,
    record_every=before,
    vectorization=sys.argv[2],
    **settings,
)
steps = getattr(control, name)(env, config).steps()
done = next(steps)["step"]
started = time.perf_counter()
for record in steps:
    last = record["step"]
print((last - done) / (time.perf_counter() - started))
