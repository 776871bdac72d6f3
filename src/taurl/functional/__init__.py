"""The mathematics: pure tensor functions, torch only, no state and no input or output.

One subject a file: `advantages`, `importance`, `surrogates`, `kl`, `aggregation`, `logprobs`. Dimensions in
docstrings: P prompts, G completions of a group, N rows, L tokens, V vocabulary, d hidden size. Bad shapes and numbers
raise ValueError at the door.
"""
