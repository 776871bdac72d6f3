"""PPO from Python: train, evaluate, act in a loop, save and load. Run: python examples/control_python.py"""

import gymnasium

from taurl.control import PPO, PPOConfig, load

config = PPOConfig(
    steps=50_000, rollout_steps=32, learning_rate=1e-3, schedule="linear", discount=0.98, trace_decay=0.8, epochs=20
)

if __name__ == "__main__":
    trainer = PPO("CartPole-v1", config).train()
    found = trainer.evaluate(20).metrics()
    print(f"return {found['eval/mean_reward']:.1f} ± {found['eval/std_reward']:.1f}")

    trainer.save(trainer.run.directory / "mine")
    policy = load(trainer.run.directory / "mine")

    environment = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=1)
    steps, over = 0, False
    while not over:
        observation, _, terminated, truncated, _ = environment.step(policy.predict(observation))
        steps, over = steps + 1, terminated or truncated
    print(f"the loaded policy balanced the pole for {steps} steps")
