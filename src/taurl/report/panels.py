"""The charts of known metrics: which there are, in which order, and what is said about them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A chart of known metrics. In `keys`, `*` stands for any text and becomes the name of the line.

    band: around the first line: the metric of a standard deviation, or those of a lower and an upper bound.
    share: shown in per cent.
    """

    section: str
    title: str
    keys: tuple[str, ...]
    note: str = ""
    band: tuple[str, ...] = ()
    share: bool = False
    stacked: bool = False


SPEED = (
    Panel("Speed", "Tokens per second", ("tokens_per_second", "sampling/tokens_per_second")),
    Panel("Speed", "Steps per second", ("time/fps",)),
    Panel("Speed", "Time per phase", ("time/*",), "Seconds between two records, stacked.", stacked=True),
    Panel("Speed", "Time per reward function", ("rewards/*/seconds",), "Seconds of a step."),
    Panel("Speed", "Peak memory", ("memory/peak_gb",), "GB, the highest so far."),
)
OPTIMISATION = (
    Panel("Optimisation", "Learning rate", ("learning_rate",)),
    Panel("Optimisation", "Gradient norm", ("grad_norm",), "Before clipping."),
    Panel("Optimisation", "Loss", ("loss",)),
    Panel("Optimisation", "Updates not taken", ("updates_skipped",), "Their gradient was not finite."),
)
NO_VARIANCE = "got the same reward: nothing is learned from them."

# Of runs that train a language model.
PANELS = (
    Panel("Reward", "Reward", ("reward", "rewards/*/mean"), "Mean over the completions of a step.", ("reward_std",)),
    Panel("Reward", "Spread of the reward", ("reward_std", "rewards/*/std"), "Standard deviation."),
    Panel(
        "Reward",
        "Groups without variance",
        ("frac_reward_zero_std",),
        f"Share of prompts whose completions all {NO_VARIANCE}",
        share=True,
    ),
    Panel("Held-out evaluation", "Held-out reward", ("eval/reward", "eval/rewards/*/mean"), "The same rows each time."),
    Panel(
        "Held-out evaluation",
        "Held-out loss",
        ("eval/loss",),
        "In SFT the negative log-likelihood of a trained token, else the loss that is trained.",
    ),
    Panel("Held-out evaluation", "Perplexity", ("eval/perplexity",), "exp of the held-out loss."),
    Panel(
        "Likelihood",
        "Token accuracy",
        ("mean_token_accuracy", "eval/mean_token_accuracy"),
        "Share of trained tokens that have the largest probability; eval: of the held-out rows.",
        share=True,
    ),
    Panel("Likelihood", "Negative log-likelihood", ("nll",), "Of a trained token, mean over the rows of a step."),
    Panel("Likelihood", "Rows too long", ("rows/*",), "Rows that their length has changed so far."),
    Panel("Likelihood", "Tokens of a step", ("tokens", "trained_tokens"), "Of its rows, and those that are targets."),
    Panel(
        "Preferences",
        "Told apart",
        ("rewards/accuracies", "eval/rewards/accuracies"),
        "Share of pairs whose chosen answer has the larger reward.",
        share=True,
    ),
    Panel(
        "Preferences", "Margin", ("rewards/margins", "eval/rewards/margins"), "Reward of the chosen less the rejected."
    ),
    Panel(
        "Preferences",
        "Rewards",
        ("rewards/chosen", "rewards/rejected", "eval/rewards/chosen", "eval/rewards/rejected"),
        "β times the log-ratio of policy and reference; without a reference β log π, in simpo and orpo per token.",
    ),
    Panel(
        "Preferences",
        "Log-probabilities",
        ("logps/chosen", "logps/rejected", "eval/logps/chosen", "eval/logps/rejected"),
        "Of whole answers, mean.",
    ),
    Panel("Preferences", "Pairs", ("pairs",), "Prompts whose sampled answers differ in reward."),
    Panel(
        "Held-out evaluation",
        "Held-out accuracy",
        ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"),
        "Of pairs: the chosen one scores higher; of labels: the score is on their side of 0. With its 95% interval.",
        share=True,
    ),
    Panel(
        "Held-out evaluation",
        "Pair accuracy by margin",
        ("eval/accuracy/*",),
        "Quarters of the pairs by their margin, or where the data has none by how far apart their scores are.",
        share=True,
    ),
    Panel("Held-out evaluation", "Held-out length", ("eval/completions/mean_length",), "Tokens."),
    Panel(
        "Held-out evaluation", "Held-out, cut off", ("eval/completions/clipped_ratio",), "Share of answers.", share=True
    ),
    Panel("Scores", "Accuracy", ("accuracy",), "Of the rows of a step.", share=True),
    Panel("Scores", "Margin", ("margin",), "Mean score of the chosen less that of the rejected ones of a step."),
    Panel("Scores", "Correlation", ("correlation",), "Of the scores of a step with those of its rows."),
    Panel("Scores", "Scores", ("mean_reward", "min_reward", "max_reward"), "Of the completions of a step."),
    Panel("Policy", "Entropy", ("entropy",), "Mean entropy of the next-token distribution."),
    Panel("Policy", "KL", ("kl",), "Distance from the reference policy."),
    Panel("Policy", "KL of a completion", ("kl_per_completion",), "To the reference policy, in nats."),
    Panel("Policy", "Price of the KL", ("kl_coefficient",), "β, fixed or set by the controller."),
    Panel("Policy", "Paid for the KL", ("reward/kl_penalty",), "β times the divergence, mean over the completions."),
    Panel("Policy", "KL within a step", ("approx_kl",), "From the policy that sampled, mean over tokens and updates."),
    Panel("Policy", "Clip fraction", ("clip_ratio/*",), "Share whose importance ratio was clipped.", share=True),
    Panel(
        "Policy",
        "Sampler against trainer",
        ("sampling/logp_difference_mean",),
        "Mean difference of their log-probabilities, before any update; rounding, if it is small.",
    ),
    Panel("Values", "Value loss", ("value/loss",)),
    Panel("Values", "Explained variance", ("value/explained_variance",), "Of the returns, by the critic."),
    Panel("Values", "Clipped values", ("value/clip_ratio",), "Share that moved past the clip.", share=True),
    Panel("Values", "Mean value", ("value/mean",), "Of the tokens of a step, before its updates."),
    Panel("Completions", "Completion length", ("completions/*_length",), "Tokens."),
    Panel("Completions", "Hit the length limit", ("completions/clipped_ratio",), "Share of completions.", share=True),
    Panel("Completions", "Turns cut off", ("episodes/cut_turns",), "Share of the turns of a step.", share=True),
    *OPTIMISATION,
    Panel("Optimisation", "Epochs", ("epochs",), "Passes over the completions of a step; target_kl may end them."),
    *SPEED,
)

# Of runs that act in an environment.
CONTROL_PANELS = (
    Panel(
        "Return",
        "Evaluation",
        ("eval/mean_reward",),
        "Mean return of whole episodes, in environments of their own.",
        ("eval/reward_p10", "eval/reward_p90"),
    ),
    Panel("Return", "While training", ("rollout/ep_rew_mean",), "Mean return of the last 100 episodes."),
    Panel("Return", "Episode length", ("rollout/ep_len_mean", "eval/mean_ep_length"), "Steps, mean."),
    Panel("Return", "Return of the groups", ("reward",), "Mean over the episodes of an iteration."),
    Panel("Return", "Spread within the groups", ("reward_std",), "Standard deviation, mean over the groups."),
    Panel(
        "Return",
        "Groups without variance",
        ("frac_reward_zero_std",),
        f"Share of groups whose episodes all {NO_VARIANCE}",
        share=True,
    ),
    Panel("Policy", "Entropy", ("entropy",), "Of the distribution that actions are drawn from."),
    Panel("Policy", "KL", ("train/approx_kl", "train/kl"), "Divergence from the policy that acted."),
    Panel(
        "Policy",
        "Clip fraction",
        ("train/clip_fraction", "clip_ratio/*"),
        "Share whose importance ratio was clipped.",
        share=True,
    ),
    Panel("Policy", "Price of the KL", ("train/kl_coefficient",), "β of kl_penalty_target."),
    Panel(
        "Policy", "Effective samples", ("train/effective_samples",), "Share that importance weights leave.", share=True
    ),
    Panel("Policy", "Exploration", ("train/epsilon",), "ε, the share of actions taken at random.", share=True),
    Panel("Values", "Value loss", ("train/value_loss",)),
    Panel("Values", "Explained variance", ("train/explained_variance",), "Of the returns, by the value estimate."),
    Panel("Values", "Temporal-difference error", ("train/td_error",)),
    Panel("Values", "Action value", ("train/q_mean",), "Mean Q of the actions that were learned from."),
    *OPTIMISATION,
    Panel("Optimisation", "Policy loss", ("train/policy_loss",)),
    Panel("Optimisation", "Gain of the step", ("train/surrogate_improvement",), "Of the surrogate, by TRPO's step."),
    Panel(
        "Optimisation",
        "Length of the step",
        ("train/step_fraction", "train/step_accepted"),
        "Of the longest within the trust region, by the line search; accepted: 0 where no length would do.",
    ),
    Panel("Optimisation", "Residual", ("train/residual",), "Of the conjugate gradients that give TRPO's direction."),
    *SPEED,
)

SECTIONS_BY_PREFIX = {
    "rewards": "Reward",
    "reward": "Reward",
    "value": "Values",
    "episodes": "Completions",
    "eval": "Held-out evaluation",
    "sampling": "Policy",
    "clip_ratio": "Policy",
    "completions": "Completions",
    "time": "Speed",
}
CONTROL_SECTIONS_BY_PREFIX = {"train": "Optimisation", "rollout": "Return", "eval": "Return", "time": "Speed"}

# The clocks, passes over the data among them, and what is drawn as the band of another metric or says no more than it.
NOT_DRAWN = (
    "seconds",
    "time/step",
    "epoch",
    "eval/std_reward",
    "eval/reward_p*",
    "eval/rewards/*/std",
    "eval/rewards/*/seconds",
)
