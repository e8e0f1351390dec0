"""
How the figures of the benchmark are taken.

Every figure is a median over rounds in which the alternatives take turns in one process, after one round to warm up,
so that the ratios hold where the milliseconds do not. Peak memory on the CPU (Linux only): one process is forked for
each alternative, in which malloc returns what is freed at once; it warms up, resets the mark of its peak resident
memory (/proc/self/clear_refs), runs once, and reports how far the mark (VmHWM) rose. On CUDA the allocator tells.
"""

import ctypes
import math
import multiprocessing
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch


MIB = 2**20
Action = Callable[[], Any]
Row = dict[str, Any]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Settings:
    """
    What the sections are run with.

    Args:
        sizes: of `SIZES`.
        rounds: over which the medians are taken.
        lengths: sequence lengths of the sections `entropy` and `attention`.
        device: `"cpu"` or `"cuda"`.
        compiled: the sections `step` and `bf16` also with `torch.compile`.
    """

    sizes: list[str]
    rounds: int
    lengths: list[int]
    device: str
    compiled: bool


def take_turns(runs: Mapping[Key, Action], rounds: int, device: str) -> dict[Key, list[float]]:
    """Seconds of each run in each round; before the first one every run warms up once."""
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[Key, list[float]]) -> dict[Key, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(build: Callable[[], tuple[Action, Action]], device: str) -> float:
    """Peak memory of a run above what was taken before it, in MiB; `build` makes a run that warms up, and the run."""
    if device == "cuda":
        warm_up, run = build()
        warm_up()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run_in_a_thread, args=(build, sender))
    child.start()
    sender.close()
    peak = receiver.recv()
    child.join()
    return peak


def _run_in_a_thread(build: Callable[[], tuple[Action, Action]], sender):
    # a thread has an arena of its own in malloc: what this process has freed would serve its tensors, and hide them
    thread = threading.Thread(target=_peak_rss, args=(build, sender))
    thread.start()
    thread.join()


def _peak_rss(build: Callable[[], tuple[Action, Action]], sender):
    # the threads of the process that forked are not here, and the pool would wait for them
    torch.set_num_threads(1)
    # M_MMAP_THRESHOLD: a tensor gets pages of its own, and kept or torn pages do not blur the mark
    ctypes.CDLL(None).mallopt(-3, 2**16)
    warm_up, run = build()
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_mark()
    run()
    sender.send((_peak_mark() - before) / MIB)


def _peak_mark() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def growth_exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of log(value) over log(size) by least squares; NaN for one size, or if a value is not above 0."""
    if len(sizes) < 2 or min(values) <= 0:
        return math.nan
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope
