"""How everything here is measured: CUDA events, a cold L2, medians; and on what."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

import mita_ext

FLUSH_BYTES = 256 << 20  # five times the L2 of an H100
HEAD_START = 400_000, 10_000_000  # clock cycles, about 0.2 to 5 ms
CLOCK_HZ = 2e9  # or a little less


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES // 8, dtype=torch.float64, device="cuda")


def flush_l2() -> None:
    _flush_buffer().fill_(1.0)


def summary(values: list[float], unit: str) -> dict:
    ordered = sorted(values)
    p10, p90 = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return {f"median_{unit}": statistics.median(ordered), f"p10_{unit}": p10, f"p90_{unit}": p90, "samples": len(ordered)}


def device_times(fn: Callable, samples: int) -> list[float]:
    """Milliseconds on the device for each of `samples` calls, all of them with a cold L2.

    The device waits a moment after each flush, so that the host is ahead and the events enclose kernels, not Python: twice as
    long as the host just took for a call, as busy hosts take several times as long as others. What the host takes is measured
    by itself in `host_time`.
    """
    shortest, longest = HEAD_START
    head_start = min(max(shortest, int(2e-6 * host_time(fn, 3)["median_us"] * CLOCK_HZ)), longest)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, stop in events:
        flush_l2()
        torch.cuda._sleep(head_start)
        start.record()
        fn()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def device_time(fn: Callable, samples: int = 50, budget_s: float | None = None) -> dict:
    """Median, p10 and p90 in ms. A budget cuts the samples (to 5 at least) of what is too slow for all of them."""
    fn()
    slowest = min(device_times(fn, 3))
    if budget_s is not None:
        samples = max(5, min(samples, int(1e3 * budget_s / slowest)))
    return summary(device_times(fn, samples), "ms")


def host_time(fn: Callable, samples: int = 50) -> dict:
    """Microseconds until the call returns, starting from an idle device: what eager mode costs the host."""
    times = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return summary(times, "us")


def peak_extra_bytes(fn: Callable[[], tuple[torch.Tensor, ...]]) -> int:
    """Peak device memory of a call beyond the tensors it returns and what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = sum(tensor.numel() * tensor.element_size() for tensor in fn())
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - returned)


def ceilings() -> dict:
    """What this very GPU reaches today: copy bandwidth (bytes read plus written) and bf16 matrix-product rate."""

    def copy() -> float:
        source = torch.randn(1 << 28, device="cuda")
        target = torch.empty_like(source)
        ms = device_time(lambda: target.copy_(source), 20)["median_ms"]
        return 2 * source.numel() * source.element_size() / ms / 1e9

    def matmul(n: int = 8192) -> float:
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return 2 * n**3 / device_time(lambda: a @ b, 20)["median_ms"] / 1e9

    return {"copy_TB_s": copy(), "matmul_bf16_TFLOP_s": matmul()}


def floor_ms(work: tuple[int, int], ceiling: dict) -> float:
    moved, flops = work
    return max(moved / ceiling["copy_TB_s"], flops / ceiling["matmul_bf16_TFLOP_s"]) / 1e9


def environment(commit: str | None, device: torch.device | str = "cuda") -> dict:
    """What a result must carry to be worth anything later."""
    if torch.device(device).type != "cuda":
        where = {"gpu": "none", "cpu_threads": torch.get_num_threads()}
        return where | _versions(commit)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    where = {
        "gpu": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": driver,
    }
    return where | _versions(commit)


def _versions(commit: str | None) -> dict:
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "mita_ext": mita_ext.__version__,
        "commit": commit or os.environ.get("MITA_COMMIT") or _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
