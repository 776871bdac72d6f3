"""The mathematics: pure functions of tensors (`slopes`: of arrays too), torch only, no state, no input or output.

One subject a file:

    returns            discounted, n-step and λ-returns, generalized advantage, V-trace
    token_returns      the same for rows of tokens
    values             targets of Q-learning and its kin; Q, V and A from each other
    value_losses       losses of a critic, explained variance
    slopes             slopes of losses, for gradients that are written out
    replay             n-step rewards and priorities of steps that are kept and drawn again
    advantages         the group, the batch or the greedy answer as a baseline
    whitening          mean 0 and standard deviation 1 over the batch
    importance         ratios and weights for samples of another policy
    off_policy         advantages of one policy from episodes of another
    surrogates         losses whose gradient is a policy gradient
    loss_types         the surrogates with their aggregation, by TRL's names
    kl                 divergence from a reference: exact, estimated, as a reward and as a loss
    kl_control         its price, adapted to keep it near a target
    trust_region       the natural gradient step of TRPO
    fisher             its products through a policy's outputs
    preference         reward models from pairs, lists, scores and labels
    dpo                direct preference optimization by TRL's names, made of
    direct_preference      its losses, and
    log_ratios             what they compare
    reference_free     CPO, SimPO, ORPO
    kto                preferences without pairs
    supervised         losses of tokens that the data has
    aggregation        from one loss per token to one number
    logprobs           log-probability, entropy and more of chosen tokens, without the full logits
    running            mean and variance of a stream of batches
    entropy            the tokens with the highest entropies

Dimensions in docstrings: T time, B environments, P prompts, G completions of a group, N rows, L tokens, V vocabulary, d
hidden size. What takes tokens of a row together, or elements of a batch (sums, means, statistics, whole sequences), has
a mask, and what is masked may hold anything; what works position by position (surrogates, `token_ratios`, k1 to k3,
value losses) has none: there `aggregation` gives a position its weight or none. Bad shapes and numbers raise ValueError
at the door.
"""
