"""One measurement of a peer: `python theirs.py ROW sb3|sbx`, prints environment steps a second.

"sb3" is Stable-Baselines3 or sb3-contrib on one thread, "sbx" its relative in JAX, which compiles its updates in the
steps before the clock starts.
"""

import sys
import time

import torch
from sb3_contrib import TRPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

torch.set_num_threads(1)
CARTPOLE = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "learning_rate": 1e-3}
CHEETAH = {"n_steps": 256, "batch_size": 64, "gae_lambda": 0.95, "gamma": 0.99, "n_epochs": 10}
QNET = {"policy_kwargs": {"net_arch": [256, 256]}, "batch_size": 64, "learning_starts": 1000}
# algorithm, environment, copies, arguments, steps before the clock starts, steps on the clock
ROWS = {
    "ppo-cartpole": (PPO, "CartPole-v1", 8, CARTPOLE, 2_048, 20_480),
    "ppo-halfcheetah": (PPO, "HalfCheetah-v5", 8, CHEETAH, 2_048, 10_240),
    "trpo-cartpole": (TRPO, "CartPole-v1", 2, {"n_steps": 512}, 2_048, 20_480),
    "dqn-cartpole": (DQN, "CartPole-v1", 1, {**QNET, "train_freq": 256, "gradient_steps": 128}, 2_048, 20_480),
    "dqn-cartpole-8": (DQN, "CartPole-v1", 8, {**QNET, "train_freq": 32, "gradient_steps": 128}, 2_048, 20_480),
}


class Clock(BaseCallback):
    """Starts when so many steps are done."""

    def __init__(self, after: int):
        super().__init__()
        self.after, self.started, self.at = after, 0.0, 0

    def _on_step(self) -> bool:
        if not self.started and self.num_timesteps >= self.after:
            self.started, self.at = time.perf_counter(), self.num_timesteps
        return True


algorithm, name, copies, arguments, before, measured = ROWS[sys.argv[1]]
if sys.argv[2] == "sbx":
    import sbx

    algorithm = getattr(sbx, algorithm.__name__)
device = {} if sys.argv[2] == "sbx" else {"device": "cpu"}
model = algorithm("MlpPolicy", make_vec_env(name, n_envs=copies, seed=0), seed=0, **device, **arguments)
clock = Clock(before)
model.learn(before + measured, callback=clock)
print((model.num_timesteps - clock.at) / (time.perf_counter() - clock.started))
