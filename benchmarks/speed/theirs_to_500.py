"""Stable-Baselines3 with its tuned preset (RL Baselines3 Zoo) on CartPole-v1, until 20 episodes all give 500."""

import sys

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env

torch.set_num_threads(1)
seed, every = int(sys.argv[1]), 2_048
falling = {"learning_rate": lambda left: left * 1e-3, "clip_range": lambda left: left * 0.2}
settings = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0}
model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), device="cpu", seed=seed, **settings, **falling)
evaluation = EvalCallback(
    make_vec_env("CartPole-v1", 8, seed=1_000 + seed),
    callback_on_new_best=StopTrainingOnRewardThreshold(500),
    eval_freq=every // 8,  # calls, of 8 steps each
    n_eval_episodes=20,
    verbose=0,
)
model.learn(100_000, callback=evaluation)
print(model.num_timesteps, evaluation.best_mean_reward)
