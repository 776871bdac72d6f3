"""What both sides do alike within their process: allocator, clock, memory, held-out loss. Needs torch alone."""

import ctypes
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def read_job() -> dict[str, Any]:
    """The job that the command line names, with threads and allocator set as it says."""
    job = json.loads(Path(sys.argv[1]).read_text())
    for parameter, value in job["mallopt"]:
        if ctypes.CDLL(None).mallopt(parameter, value) != 1:
            raise SystemExit(f"mallopt({parameter}, {value}) was refused")
    torch.set_num_threads(job["threads"])
    return job


def peak_memory_gb(device: str) -> float:
    """The most this process has held: its resident set (without what its parent held), or the GPU's allocations."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Laps:
    """A clock of the updates: started before the first, called after each, stopped while something else goes on.

    Attributes:
        ends: seconds on the clock at the start, and after each update.
        over: the job's minutes have passed; they began with the process.
        first: the update that measuring begins with, counted from 0. The updates before it warm up, where the minutes
            did not end among them.
    """

    def __init__(self, job: dict[str, Any]):
        self._warm_up, self.device = job["warm_up"], job["device"]
        self.until = time.perf_counter() + 60 * job["minutes"]
        self.ends: list[float] = []
        self._stopped = 0.0

    def __call__(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter() - self._stopped)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._stopped += time.perf_counter() - start

    @property
    def over(self) -> bool:
        return time.perf_counter() > self.until

    @property
    def first(self) -> int:
        return max(0, min(self._warm_up, len(self.ends) - 2))

    def seconds(self) -> list[float]:
        """Of each measured update."""
        return [after - before for before, after in itertools.pairwise(self.ends[self.first :])]


class Curve:
    """The accuracy on held-out questions over the training's own time, until a goal is reached.

    Attributes:
        points: updates, seconds on the clock, accuracy.
    """

    def __init__(self, job: dict[str, Any], laps: Laps, accuracy: Callable[[], float]):
        self.every, self.goal, self.laps, self.accuracy = job["every"], job["goal"], laps, accuracy
        self.points: list[tuple[int, float, float]] = []

    def reached(self) -> bool:
        """To be called after each update, and before the first."""
        updates = len(self.laps.ends) - 1
        if updates % self.every == 0:
            with self.laps.stopped():
                self.points.append((updates, self.laps.ends[-1] - self.laps.ends[0], self.accuracy()))
        return self.points[-1][2] >= self.goal


def parameters(model: Any) -> dict[str, int]:
    """Parameters that every token goes through, and those of the output head. (An embedding is looked up.)"""
    head = model.get_output_embeddings()
    embeddings = {id(part.weight): part.weight for part in (model.get_input_embeddings(), head) if part is not None}
    inside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in embeddings)
    return {"body_parameters": inside, "head_parameters": 0 if head is None else head.weight.numel()}


@torch.no_grad()
def held_out_nll(model: torch.nn.Module, rows: Iterable[dict[str, list[int]]]) -> float:
    """Mean over all targets of −log p, the rows {"input_ids", "labels"} one by one; a label of −100 is no target."""
    model.eval()
    device = next(model.parameters()).device
    total, targets = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor(row[name], device=device)[None] for name in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        total, targets = total + losses.item(), targets + int((labels[0, 1:] != -100).sum())
    return total / targets


@torch.no_grad()
def pair_accuracy(score: Callable[[list[int], list[int]], float], job: dict[str, Any], steps: int) -> float | None:
    """The share of held-out pairs whose chosen answer scores higher, once all steps are done.

    Args:
        score: of prompt and answer, as token ids.
    """
    if steps < job["steps"]:
        return None
    pairs = job["held_out"]
    scores = [[score(pair["prompt_ids"], pair[name]) for name in ("chosen_ids", "rejected_ids")] for pair in pairs]
    return sum(chosen > rejected for chosen, rejected in scores) / max(1, len(scores))


def reward_of(model: Any) -> Callable[[list[int], list[int]], float]:
    """What a model with a scalar head gives."""
    model.eval()
    return lambda prompt, answer: float(model(torch.tensor([prompt + answer], device=model.device)).logits)


def implicit_reward_of(model: Any, reference: Any) -> Callable[[list[int], list[int]], float]:
    """DPO's: log π(answer | prompt) − log π_ref(answer | prompt)."""
    model.eval()
    return lambda prompt, answer: log_likelihood(model, prompt, answer) - log_likelihood(reference, prompt, answer)


def log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    ids = torch.tensor([prompt + answer], device=model.device)
    logprobs = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return float(logprobs.gather(1, ids[0, len(prompt) :, None]).sum())


def report(job: dict[str, Any], laps: Laps, **figures: Any) -> None:
    """The last line of the output, which the driver reads."""
    found = {"seconds": laps.seconds(), "peak_gb": peak_memory_gb(job["device"]), **figures}
    if "operators" in job:
        found["operators"] = job["operators"]
    print(json.dumps(found), flush=True)
