"""What the machine is and how to use it: device, precision, threads, the allocator, memory."""

import ctypes
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import threadpoolctl
import torch

from taurl.runtime.errors import InputError, RunError, reason

# glibc's mallopt parameters (malloc.h) and the values that keep freed memory in the process.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
# oneDNN keeps a kernel, with its memory, for each shape of matrix product that it has seen, up to 1,024 by default.
# Rows of always new lengths fill that: 0.7 GB over 80 steps of the demo, and no measurable time saved over 64.
KERNELS_KEPT = "64"
# A GPU's allocator cuts its memory into blocks, and always new sizes leave holes between them. Where blocks may grow,
# holes close up. torch reads this when the first tensor goes to the GPU.
BLOCKS_THAT_GROW = "expandable_segments:True"
KEEP_FREED_MEMORY = ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**28))


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks for the next tensor instead of giving them back to the kernel.

    By default blocks of some megabytes are returned and faulted in again, hundreds of times a training step. Bounds
    oneDNN's own memory too, if no matrix product has run yet, and on Linux has a GPU's memory in blocks that grow, if
    none of it is in use yet. Changes the whole process, so only commands call it by themselves. Returns whether every
    setting was accepted; False on a C library without mallopt.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS_KEPT)
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
        os.environ.setdefault("PYTORCH_ALLOC_CONF", BLOCKS_THAT_GROW)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    accepted = [mallopt(parameter, value) == 1 for parameter, value in KEEP_FREED_MEMORY]  # one refused, set the rest
    return all(accepted)


def give_back_free_memory() -> None:
    """Give the holes in glibc's heap back to the kernel, some 0.1 s for a few GB.

    A process that keeps freed memory grows, as blocks of always new sizes leave holes between them; giving them back
    every few steps saves a good part of that. Does nothing on a C library without malloc_trim.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def cores() -> int:
    """How many this process may use, of those that it sees and by the time that a container may have of them."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max" where it may have all of it
        quota, period = map(int, (CGROUP / "cpu.max").read_text().split())
        seen = min(seen, max(1, math.ceil(quota / period)))
    return seen


def set_threads(threads: int | None) -> int:
    """Set the number of CPU threads; None takes what OMP_NUM_THREADS says, else the cores this process may use.

    Returns the number.
    """
    if threads is None:
        asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # "4,2" is 4, and 2 in nested regions
        threads = int(asked) if asked.isdecimal() and int(asked) else cores()
    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads, user_api="blas")  # numpy's
    return threads


def choose_device(name: str) -> torch.device:
    """The device of that name, made ready; "auto" is a GPU if there is one that computes, and says so if it does not.

    Raises: InputError if there is no such device, or it does not compute.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        return ready("cuda" if name == "auto" else name)
    except (RuntimeError, AssertionError) as error:
        if name == "auto":
            print(f"taurl: the GPU is not usable ({reason(error)}), so the CPU is taken", file=sys.stderr)
            return torch.device("cpu")
        raise InputError(
            f"device is {name!r}, which is not usable here ({reason(error)}); give auto, cpu, cuda or cuda:N"
        ) from error


def ready(name: str) -> torch.device:
    """The device of that name, after one sum on it: a GPU may be there, but full, or not of torch's kinds."""
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"taurl does not compute on {device.type}")
    torch.zeros(1, device=device).sum().item()
    if device.type == "cuda":
        # cuDNN's attention makes a plan for every new shape, which takes longer than a step, and shapes are always new.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def make_current(device: torch.device) -> None:
    """Let what asks about a GPU without saying which mean the one that a run computes on."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 where its matrix product is the faster one on this device."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return min((torch.float32, torch.bfloat16), key=lambda dtype: matrix_product_seconds(dtype, device))


def matrix_product_seconds(dtype: torch.dtype, device: torch.device, size: int = 256) -> float:
    """Best time of three for one square matrix product, after a first one that warms up.

    A small one: where a processor has no bfloat16 of its own, 1024³ of it take two seconds.
    """
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (left @ right).sum().item()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far, in GB: the process's resident set, or the GPU's allocations."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def free_memory_gb(device: torch.device) -> float:
    """Memory that can still be taken, in GB: the GPU's, or the machine's; all of it where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, StopIteration), open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    with suppress(OSError, ValueError):  # a container's own limit; "max" where it has none
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counted = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = sum(int(counted.get(name, 0)) for name in ("inactive_file", "active_file"))  # given back when wanted
        free = min(free, max(0, limit - used + cached))
    return free / 1e9


def describe_machine() -> dict[str, str]:
    """Facts for environment.json: system, Python, processor, and the GPU if the process has begun to use one."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    facts = {"platform": platform.platform(), "python": platform.python_version(), "cpu": cpu}
    # Asking one that is not in use for its name would take some of its memory.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


CGROUP = Path("/sys/fs/cgroup")  # version 2

# What allocators say, where torch has no error class for it: the CPU's, C++'s, the driver's, Triton's, cuBLAS's and
# cuDNN's for their workspaces, and oneDNN's, which gives no reason.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def out_of_memory_names(settings: str) -> Iterator[None]:
    """Turn an allocation that failed into a RunError that names the settings to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory: lower {settings}") from error
