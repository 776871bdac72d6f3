"""Devices, precision, threads, the allocator, and running out of memory."""

import ctypes
import os
import platform
import resource
from pathlib import Path

import pytest
import threadpoolctl
import torch
from processes import Child

from taurl.runtime import machine
from taurl.runtime.errors import InputError, RunError
from taurl.runtime.machine import (
    choose_device,
    choose_precision,
    cores,
    describe_machine,
    free_memory_gb,
    keep_freed_memory,
    make_current,
    matrix_product_seconds,
    out_of_memory_names,
    peak_memory_gb,
    set_threads,
)

CPU = torch.device("cpu")


def test_device():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def refuse(*args, **options):
    raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")


def test_a_gpu_that_does_not_compute_is_passed_over_and_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", refuse)
    assert choose_device("auto") == CPU
    said = capsys.readouterr().err
    assert said == "taurl: the GPU is not usable (CUDA error: no kernel image is available), so the CPU is taken\n"
    with pytest.raises(InputError, match=r"^device is 'cuda', which is not usable here \(CUDA error: no kernel"):
        choose_device("cuda")


@pytest.mark.parametrize(("name", "chosen"), [("auto", []), ("cuda:1", [torch.device("cuda:1")]), ("cpu", [])])
def test_a_gpu_is_the_current_one_and_plans_nothing_for_each_new_shape(monkeypatch, name, chosen):
    current, planning = [], []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", planning.append)
    device = choose_device(name)
    assert device.type == ("cpu" if name == "cpu" else "cuda")
    assert current == []  # a reward model on another GPU changes nothing for the policy
    make_current(device)
    assert current == chosen
    assert planning == ([] if name == "cpu" else [False])


def test_a_gpu_that_is_not_in_use_is_not_asked_for_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", refuse)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert "gpu" not in describe_machine()


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(InputError) as error:
        choose_device(name)
    assert str(error.value).startswith(f"device is {name!r}, which is not usable here (")
    assert str(error.value).endswith("); give auto, cpu, cuda or cuda:N")
    assert "\n" not in str(error.value)


def test_precision():
    assert choose_precision("float32", CPU) == torch.float32
    assert choose_precision("bfloat16", CPU) == torch.bfloat16
    chosen = choose_precision("auto", CPU)
    assert chosen in (torch.float32, torch.bfloat16)


def test_auto_takes_the_faster_matrix_product(monkeypatch):
    for faster in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(
            "taurl.runtime.machine.matrix_product_seconds", lambda dtype, device, faster=faster: dtype != faster
        )
        assert choose_precision("auto", CPU) == faster


def test_a_matrix_product_takes_time():
    assert 0 < matrix_product_seconds(torch.float32, CPU, size=64) < 1


def test_threads(monkeypatch):
    """Of torch, and of the library that numpy multiplies matrices with."""

    def of_numpy():
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    before = torch.get_num_threads()
    try:
        with threadpoolctl.threadpool_limits():  # and back to what they were
            for threads in (2, 1):
                assert set_threads(threads) == torch.get_num_threads() == threads
                assert of_numpy() == {threads}
            for asked, threads in (("3", 3), ("4,2", 4), ("0", cores()), ("", cores())):
                monkeypatch.setenv("OMP_NUM_THREADS", asked)
                assert set_threads(None) == torch.get_num_threads() == threads
                assert of_numpy() == {threads}
            monkeypatch.delenv("OMP_NUM_THREADS")
            assert set_threads(None) == cores() <= len(os.sched_getaffinity(0))
            monkeypatch.setenv("OMP_NUM_THREADS", "3")
            assert set_threads(2) == 2
    finally:
        torch.set_num_threads(before)


def test_description_and_peak_memory():
    facts = describe_machine()
    assert facts["python"] == platform.python_version()
    assert facts["cpu"]
    assert all("\n" not in value for value in facts.values())
    status = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    assert peak_memory_gb(CPU) == pytest.approx(int(status["VmHWM"].split()[0]) * 1024 / 1e9, rel=0.05)


def faults_of_large_tensors():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10_000_000).sum().item()  # 40 MB: more than glibc learns to keep by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def freed_memory_is_kept():
    torch.set_num_threads(1)
    faults = [faults_of_large_tensors()]
    accepted = keep_freed_memory()
    faults_of_large_tensors()  # the block is faulted in once more
    faults.append(faults_of_large_tensors())
    print(accepted, *faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    code, said = Child(freed_memory_is_kept).wait()
    accepted, before, after = said.split()
    assert (code, accepted) == (0, "True")
    assert int(after) * 10 < int(before)  # 97,000 before in pages of 4 kB, 200 in huge ones


@pytest.mark.skipif(platform.system() != "Linux", reason="blocks that grow need Linux")
@pytest.mark.parametrize("known", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_a_gpus_memory_grows_where_nobody_has_said_how_it_is_cut(monkeypatch, known):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    variables = dict.fromkeys([known] if known else [], "garbage_collection_threshold:0.9")
    monkeypatch.setattr(os, "environ", dict(variables))
    keep_freed_memory()
    del os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    assert os.environ == (variables or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


def test_a_c_library_without_mallopt(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


def run_out_of_memory():
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize() + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    with out_of_memory_names("tokens_per_part or slots"):
        torch.empty(2**30)


def run_out_of_python_memory():
    with out_of_memory_names("slots"):
        bytearray(2**62)


@pytest.mark.parametrize(
    ("function", "settings"), [(run_out_of_memory, "tokens_per_part or slots"), (run_out_of_python_memory, "slots")]
)
def test_out_of_memory_names_the_settings_to_lower(function, settings):
    assert Child(function).wait() == (1, f"taurl: out of memory: lower {settings}\n")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), RunError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), RunError),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), RunError),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), RunError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), RunError),
        (RuntimeError("std::bad_alloc"), RunError),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError),
        (RunError("disk full"), RunError),
        (ValueError("out of memory"), ValueError),
    ],
)
def test_only_failed_allocations_are_taken_for_one(error, expected):
    with pytest.raises(expected) as caught, out_of_memory_names("slots"):
        raise error
    assert type(caught.value) is expected
    assert (caught.value is error) == ("lower slots" not in str(caught.value))


def test_free_memory_is_part_of_what_there_is(monkeypatch, tmp_path):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    assert 0 < free_memory_gb(CPU) <= total
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\nactive_file 200000\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert free_memory_gb(CPU) > 0.1
    (tmp_path / "memory.max").write_text("3000000\n")
    assert free_memory_gb(CPU) == 0.0023  # what is cached is given back when wanted
    (tmp_path / "memory.max").unlink()
    monkeypatch.setattr("builtins.open", lambda *args: (_ for _ in ()).throw(FileNotFoundError))  # no /proc
    assert free_memory_gb(CPU) == total


@pytest.mark.parametrize(("said", "expected"), [("50000 100000", 1), ("150000 100000", 2), ("max 100000", 4)])
def test_a_container_may_have_less_time_than_it_sees_cores(monkeypatch, tmp_path, said, expected):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    (tmp_path / "cpu.max").write_text(said + "\n")
    assert cores() == expected
