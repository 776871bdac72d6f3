"""What both sides do alike within their process: allocator, clock, memory, held-out loss. Needs torch alone."""

import ctypes
import itertools
import json
import resource
import sys
import time
from collections.abc import Iterable
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
    """Seconds from one update's end to the next; the first `warm_up` updates are not among them.

    Attributes:
        over: the job's minutes have passed (they began with the process), and one update at least is measured.
    """

    def __init__(self, job: dict[str, Any]):
        self.warm_up, self.device = job["warm_up"], job["device"]
        self.until = time.perf_counter() + 60 * job["minutes"]
        self.ends: list[float] = []

    @property
    def over(self) -> bool:
        return len(self.ends) > self.warm_up and time.perf_counter() > self.until

    def __call__(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        measured = self.ends[self.warm_up - 1 :]
        return [after - before for before, after in itertools.pairwise(measured)]


def parameters(model: Any) -> dict[str, int]:
    """Parameters that every token goes through, and those of the output head; an embedding is looked up, not computed."""
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


def report(job: dict[str, Any], laps: Laps, **figures: Any) -> None:
    """The last line of the output, which the driver reads."""
    found = {"seconds": laps.seconds(), "peak_gb": peak_memory_gb(job["device"]), **figures}
    print(json.dumps(found), flush=True)
