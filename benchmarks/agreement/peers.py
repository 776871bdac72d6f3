"""What TRL, Stable-Baselines3 and sb3-contrib compute, by objects of their own; nothing of taurl in here.

A trainer is built as its users build it, on a random model of some hundred weights. Then its loss runs on numbers given
from outside: where it asks the model for log-probabilities, it gets those. Gradients flow back to them. What else is
changed is said at the place.
"""

import atexit
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace

import gymnasium
import numpy as np
import torch
from datasets import Dataset
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

ROWS, GROUP, LENGTH, WORDS = 6, 3, 7, 9


@cache
def tiny_model() -> str:
    """A folder with a random model and a tokenizer of nine words."""
    folder = tempfile.mkdtemp(prefix="tiny-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdef"])}
    text = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=text, **special).save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes, **heads, **tokens)).save_pretrained(folder)
    return folder


def build(trainer: type, config: type, columns: dict[str, list], options: dict, **given):
    shared = {"output_dir": tiny_model(), "use_cpu": True, "bf16": False, "report_to": "none"}
    arguments = config(**shared, per_device_train_batch_size=ROWS, **options)
    if trainer in (CPOTrainer, ORPOTrainer):
        given["processing_class"] = PreTrainedTokenizerFast.from_pretrained(tiny_model())
        given["model"] = LlamaForCausalLM.from_pretrained(tiny_model())
    else:
        given["model"] = tiny_model()
    built = trainer(args=arguments, train_dataset=Dataset.from_dict(columns), **given)
    built.model.train()  # as in training: TRL divides by the number of micro-batches only there
    return built


def sampling_trainer(method: str, options: dict, reward_functions: Sequence[Callable] | None = None):
    kinds = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
    options = {"num_generations": GROUP, "max_completion_length": LENGTH, **options}
    functions = reward_functions or [scores_of([0.0] * ROWS)]
    return build(*kinds[method], {"prompt": ["a"] * ROWS}, options, reward_funcs=functions)


def scores_of(column: list[float]) -> Callable[..., list[float | None]]:
    """A reward function of TRL's kind: these scores, whatever was said; None, TRL's "not applicable", for NaN."""

    def scores(completions: list, **_: object) -> list[float | None]:
        return [None if math.isnan(score) else score for score in column]

    return scores


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    parts: Sequence[slice] = (slice(None),),
    **options: object,
) -> Tensor:
    """TRL's GRPO loss; of several micro-batches the sum, which is what their gradients add up to."""
    trainer = sampling_trainer("grpo", {"gradient_accumulation_steps": len(parts), **options})
    trainer.current_gradient_accumulation_steps = len(parts)
    entropies = torch.zeros_like(old_logprobs) if entropies is None else entropies
    total = logprobs.new_zeros(())
    for rows in parts:
        scored = (logprobs[rows], entropies[rows], None)
        trainer._get_per_token_logps_and_entropies = lambda *_, scored=scored, **__: scored
        inputs = {**token_ids(mask[rows]), "advantages": advantages[rows], "old_per_token_logps": old_logprobs[rows]}
        inputs["num_items_in_batch"] = mask.sum()
        if reference_logprobs is not None:
            inputs["ref_per_token_logps"] = reference_logprobs[rows]
        total = total + trainer._compute_loss(trainer.model, inputs)
    return total


def rloo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, **options: object) -> Tensor:
    trainer = sampling_trainer("rloo", options)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None)
    sums = torch.where(mask, old_logprobs, 0.0).sum(1)
    return trainer._compute_loss(trainer.model, {**token_ids(mask), "advantages": advantages, "old_logps": sums})


def token_ids(mask: Tensor) -> dict[str, Tensor]:
    ones = torch.ones(len(mask), 1, dtype=torch.long)
    completions = torch.ones(mask.shape, dtype=torch.long)
    prompts = {"prompt_ids": ones, "prompt_mask": ones}
    return {**prompts, "completion_ids": completions, "completion_mask": mask.long()}


def advantages(rewards: Tensor, method: str, **options: object) -> Tensor:
    """TRL's advantages [P, G] of rewards [P, G, K]: the tiny model samples, the given scores are what it gets.

    TRL keeps rewards in float32; they are widened behind the reward functions, so that what follows is float64.
    """
    functions = [scores_of(column.flatten().tolist()) for column in rewards.unbind(2)]
    trainer = sampling_trainer(method, options, functions)
    scored = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *given: scored(*given).double()
    batch = trainer._generate_and_score_completions([{"prompt": "a"} for _ in range(ROWS)])
    return batch["advantages"].view(rewards.shape[:2])


def scorer(logprobs: Tensor, mask: Tensor, mismatched: Tensor | None = None) -> Callable[..., SimpleNamespace]:
    """A model that has these log-probabilities for completions behind a prompt of one token.

    mismatched: [N, 1], what it has for sequences of two tokens (KTO's foreign answers).
    """

    def model(input_ids: Tensor, **_: object) -> SimpleNamespace:
        if mismatched is not None and input_ids.shape[1] == 2:
            return SimpleNamespace(log_probs=mismatched)
        kept, nothing = torch.where(mask, logprobs, 0.0), torch.zeros_like(mask)
        return SimpleNamespace(log_probs=kept, entropy=nothing.double(), mean_logits=nothing.double(), is_top1=nothing)

    return model


def behind_prompt(mask: Tensor) -> dict[str, Tensor]:
    prompt = torch.zeros(len(mask), 1, dtype=torch.long)
    tokens = torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": tokens, "completion_mask": torch.cat([prompt, mask.long()], 1)}


def dpo_loss(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, **options: object) -> Tensor:
    """TRL's DPO loss of log-probabilities [2N, L], the chosen ones first."""
    columns = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    trainer = build(DPOTrainer, DPOConfig, columns, options)
    trainer.ref_model = scorer(reference_logprobs, mask)
    return trainer._compute_loss(scorer(logprobs, mask), behind_prompt(mask), False)


def kto_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mismatched: tuple[Tensor, Tensor],
    desirable: Tensor,
    mask: Tensor,
    *,
    parts: Sequence[slice] = (slice(None),),
    **options: object,
) -> Tensor:
    """TRL's KTO loss; of micro-batches of equal size their mean."""
    columns = {"prompt": ["a", "a"], "completion": ["b", "c"], "label": [True, False]}
    trainer = build(KTOTrainer, KTOConfig, columns, options)
    total = logprobs.new_zeros(())
    for rows in parts:
        trainer.ref_model = scorer(reference_logprobs[rows], mask[rows], mismatched[1][rows])
        batch = {**behind_prompt(mask[rows]), "label": desirable[rows]}
        foreign = behind_prompt(torch.ones(len(mask[rows]), 1, dtype=torch.bool))
        batch.update({f"KL_{name}": tensor for name, tensor in foreign.items()})
        model = scorer(logprobs[rows], mask[rows], mismatched[0][rows])
        total = total + trainer._compute_loss(model, batch, False) / len(parts)
    return total


def reference_free_loss(logits: Tensor, method: str, tokens: Tensor, mask: Tensor, **options: object) -> Tensor:
    """TRL's CPO (and SimPO) or ORPO loss of logits [2N, L + 1, V], the chosen ones first; a prompt of one token."""
    kinds = {"cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}
    trainer = build(*kinds[method], {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, options)
    answers = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], 1)
    attended = answers.long()
    attended[:, 0] = 1
    batch = {}
    for side, rows in {"chosen": slice(len(mask) // 2), "rejected": slice(len(mask) // 2, None)}.items():
        batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"] = tokens[rows], attended[rows]
        batch[f"{side}_labels"] = tokens[rows].masked_fill(~answers[rows], -100)
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]


def reward_loss(rewards: Tensor, margins: Tensor | None = None, **options: object) -> Tensor:
    """TRL's reward-model loss of rewards [2N], the chosen ones first."""
    trainer = build(RewardTrainer, RewardConfig, {"chosen": ["a b"], "rejected": ["a c"]}, options)
    inputs = {"attention_mask": torch.ones(len(rewards), 2)}
    if margins is not None:
        inputs["margin"] = margins
    return trainer.compute_loss(lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs)


class Scripted(gymnasium.Env):
    """Random observations, rewards, ends and time limits; `log` keeps reward, terminated, truncated, what followed."""

    observation_space = gymnasium.spaces.Box(-10, 10, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, seed: int) -> None:
        self.random, self.log = np.random.default_rng(seed), []

    def reset(self, **_: object) -> tuple[np.ndarray, dict]:
        return self.random.normal(size=3).astype(np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        terminated, truncated = (bool(self.random.random() < 0.1) for _ in range(2))
        reward = float(np.float32(self.random.normal()))  # what the vectorised environment keeps
        self.log.append((reward, terminated, truncated, self.reset()[0]))
        return self.log[-1][3], reward, terminated, truncated, {}


def ppo_rollout(*, discount: float, trace_decay: float, steps: int = 64, environments: int = 4) -> tuple[PPO, list]:
    """Stable-Baselines3's PPO after collecting one rollout, and what its environments logged.

    Its learning rate is 0, its gradients are not clipped, an update is one pass over the whole rollout.
    """
    scripts = [Scripted(seed) for seed in range(environments)]
    update = {"learning_rate": 0.0, "max_grad_norm": 1e9, "vf_coef": 1.0, "n_epochs": 1}
    sizes = {"n_steps": steps, "batch_size": steps * environments, "gamma": discount, "gae_lambda": trace_decay}
    surroundings = DummyVecEnv([lambda script=script: script for script in scripts])
    ppo = PPO("MlpPolicy", surroundings, seed=0, device="cpu", **sizes, **update)
    _, callback = ppo._setup_learn(steps * environments)
    ppo.collect_rollouts(ppo.env, callback, ppo.rollout_buffer, steps)
    return ppo, [script.log for script in scripts]


def gae_in_float64(buffer: RolloutBuffer, last_values: Tensor, dones: np.ndarray) -> tuple[Tensor, Tensor]:
    """The buffer's own recurrence on its own numbers, in arrays of float64: advantages and returns [T, B]."""
    for name in ("rewards", "values", "advantages", "returns", "episode_starts"):
        setattr(buffer, name, getattr(buffer, name).astype(np.float64))
    buffer.compute_returns_and_advantage(last_values.double(), dones)
    return torch.from_numpy(buffer.advantages), torch.from_numpy(buffer.returns)


def ppo_value_loss(ppo: PPO, clip: float | None) -> tuple[Tensor, Tensor]:
    """The value loss that an update logs, and its gradient by the critic's last bias, a shift of all values."""
    ppo.clip_range_vf = None if clip is None else lambda _: clip
    ppo.train()
    numbers = ppo.logger.name_to_value["train/value_loss"], ppo.policy.value_net.bias.grad.item()
    return tuple(torch.tensor(number, dtype=torch.float64) for number in numbers)
