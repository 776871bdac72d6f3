"""The mathematics: pure tensor functions, torch only, no state and no input or output. One subject a file:

    returns            discounted, n-step and λ-returns, generalised advantage, V-trace
    values             targets of Q-learning and its kin, value losses, explained variance
    advantages         whitening; the group, the batch or the greedy answer as a baseline
    importance         ratios and weights for samples of another policy
    surrogates         losses whose gradient is a policy gradient
    loss_types         the surrogates with their aggregation, by TRL's names
    kl                 divergence from a reference: exact, estimated, as a reward and as a loss
    trust_region       the natural gradient step of TRPO
    preference         reward models from pairs, lists, scores and labels
    dpo                direct preference optimisation by TRL's names, made of
    direct_preference      its losses, and
    log_ratios             what they compare
    reference_free     CPO, SimPO, ORPO
    kto                preferences without pairs
    aggregation        from one loss per token to one number
    logprobs           log-probability and entropy of chosen tokens, without the full logits
    entropy            the tokens with the highest entropies

Dimensions in docstrings: T time, B environments, P prompts, G completions of a group, N rows, L tokens, V vocabulary, d
hidden size. Bad shapes and numbers raise ValueError at the door.
"""
