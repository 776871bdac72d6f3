"""What settings are called in Hugging Face TRL and Stable-Baselines3, for those who come from there.

The same table stands in docs/coming_from.md.
"""

from collections.abc import Container

OTHER_NAMES = {
    "model_name_or_path": ("model",),
    "dataset_name": ("dataset",),
    "train_dataset": ("dataset",),
    "reward_funcs": ("rewards",),
    "ref_model": ("reference",),
    "use_peft": ("lora_rank",),
    "gradient_accumulation_steps": ("tokens_per_part",),
    "warmup_ratio": ("warmup_steps",),
    "init_kl_coef": ("kl_coefficient",),
    "assistant_only_loss": ("mask",),
    "completion_only_loss": ("mask",),
    "num_generations": ("group_size",),
    "max_completion_length": ("max_tokens",),
    "max_new_tokens": ("max_tokens",),
    "response_length": ("max_tokens",),
    "per_device_train_batch_size": ("prompts_per_step", "rows_per_step"),
    "num_train_epochs": ("epochs", "steps"),
    "num_iterations": ("epochs",),
    "num_ppo_epochs": ("epochs",),
    "num_mini_batches": ("minibatches",),
    "max_steps": ("steps",),
    "beta": ("kl_coefficient",),
    "kl_coef": ("kl_coefficient",),
    "epsilon": ("clip_low", "clip_high"),
    "epsilon_high": ("clip_high",),
    "cliprange": ("clip_low", "clip_high"),
    "cliprange_value": ("value_clip",),
    "vf_coef": ("value_coefficient",),
    "ent_coef": ("entropy_coefficient",),
    "gamma": ("discount",),
    "lam": ("trace_decay",),
    "gae_lambda": ("trace_decay",),
    "mask_truncated_completions": ("mask_truncated",),
    "importance_sampling_level": ("ratio_level",),
    "output_dir": ("out",),
    "lr": ("learning_rate",),
    "lr_scheduler_type": ("schedule",),
    "save_steps": ("save_every",),
    "save_total_limit": ("keep_checkpoints",),
    "eval_steps": ("eval_every",),
    "bf16": ("precision",),
    "fp16": ("precision",),
    "max_seq_length": ("max_length",),
    "precompute_ref_log_probs": ("cache_reference",),
    "neftune_noise_alpha": ("neftune_alpha",),
    "lora_r": ("lora_rank",),
    "lora_target_modules": ("lora_targets",),
    "f_divergence_type": ("divergence",),
    "ld_alpha": ("excess_weight",),
    "simpo_gamma": ("target_margin",),
    "cpo_alpha": ("likelihood_weight",),
    "center_rewards_coefficient": ("centering",),
    "total_timesteps": ("steps",),
    "n_envs": ("environments",),
    "num_envs": ("environments",),
    "eval_freq": ("eval_every",),
    "n_eval_episodes": ("eval_episodes",),
    "save_freq": ("save_every",),
    "n_steps": ("rollout_steps",),
    "n_epochs": ("epochs",),
    "batch_size": ("minibatch_size",),
    "clip_range": ("clip",),
    "clip_range_vf": ("value_clip",),
    "normalize_advantage": ("whiten_advantages",),
    "net_arch": ("hidden",),
    "activation_fn": ("activation",),
    "train_freq": ("train_every",),
    "target_update_interval": ("target_every",),
    "tau": ("target_share",),
    "exploration_fraction": ("epsilon_fraction",),
    "exploration_initial_eps": ("epsilon_start",),
    "exploration_final_eps": ("epsilon_end",),
}


def names_here(name: str, known: Container[str]) -> list[str]:
    """What a setting of another library is called among the known ones; more than one where it is several here."""
    wanted = OTHER_NAMES.get(name, ())
    if name == "num_train_epochs":  # where completions are sampled, epochs are passes over those of a step
        wanted = ("steps",) if "minibatches" in known or "epochs" not in known else ("epochs",)
    return [here for here in wanted if here in known]
