"""One batch for every token loss: rows of 7, 3, 5, 1, 6 and 2 tokens, one of them with a tool's answer in between."""

import torch
from agreement import peers

ROWS, LENGTH = peers.ROWS, peers.LENGTH
torch.manual_seed(0)
MASK = torch.arange(LENGTH) < torch.tensor([7, 3, 5, 1, 6, 2])[:, None]
MASK[0, 3] = False
LOGPROBS = -2 * torch.rand(ROWS, LENGTH, dtype=torch.float64)
OLD = LOGPROBS + 0.25 * torch.randn(ROWS, LENGTH, dtype=torch.float64)
REFERENCE = LOGPROBS + 0.25 * torch.randn(ROWS, LENGTH, dtype=torch.float64)
ADVANTAGES = torch.randn(ROWS, dtype=torch.float64)
ENTROPIES = torch.rand(ROWS, LENGTH, dtype=torch.float64)
HALVES = (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
