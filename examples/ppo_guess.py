"""An environment of several turns for PPO, a guessing game. From the command line:

    taurl llm ppo --model smollm2-135m-instruct --environment examples/ppo_guess.py:Guess --max-turns 5 --max-tokens 8

or: python examples/ppo_guess.py
"""

from taurl.llm import PPO, PPOConfig


class Guess:
    """Find a number from 0 to 9 in five guesses."""

    def __init__(self, seed):
        self.number, self.left = seed % 10, 5

    def reset(self):
        return [{"role": "user", "content": "Guess my number from 0 to 9. Answer with one digit only."}]

    def step(self, completion):
        self.left -= 1
        digits = [int(letter) for letter in completion if letter in "0123456789"]
        if digits[:1] == [self.number]:
            return [], 1.0, True
        hint = "higher" if digits and digits[0] < self.number else "lower"
        return [{"role": "user", "content": f"No, {hint}."}], 0.0, self.left == 0


if __name__ == "__main__":
    config = PPOConfig(steps=20, prompts_per_step=32, max_turns=5, max_tokens=8, learning_rate=2e-5, eval_rows=50)
    PPO("smollm2-135m-instruct", config=config, environment=Guess).train()
