"""Threads that work ahead, and how long OpenMP's wait busily for one another.

Imports no torch, which reads the latter once.
"""

import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count

# Turns of a waiting loop. libgomp's 300,000 are quickest where all cores are free; where another
# process has one, each parallel region of a step may take that long.
SHORT = "300"


def spin_briefly_beside_others():
    """Called by a program before torch is loaded. What the user has set wins."""
    by_user = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if not by_user and missing_cores() > 0.5:
        os.environ["GOMP_SPINCOUNT"] = SHORT


def missing_cores(seconds=0.1):
    """How many of the cores that this process may use are taken by others, measured for so long.

    0.0 where the system does not tell.
    """
    try:
        idle, begin = idle_seconds(), time.monotonic()
        time.sleep(seconds)
        free = (idle_seconds() - idle) / (time.monotonic() - begin)
        return max(0.0, len(os.sched_getaffinity(0)) - free)
    except (OSError, ValueError, AttributeError):  # not Linux
        return 0.0


def idle_seconds():
    """Seconds that all cores have been idle or waiting for a disk (Linux)."""
    with open("/proc/stat", encoding="utf-8") as file:
        _, _user, _nice, _system, idle, waiting, *_ = file.readline().split()
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


def ahead(function, items, threads):
    """(item, future of function(item)) in order, as many items ahead as there are threads.

    Threads, not processes: those hand over large tensors in /dev/shm, which a container has little
    of.
    """
    waiting: deque = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > threads:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def one_ahead(items):
    """The items of an iterator; a thread makes the next one while the last one is in use."""
    items, end = iter(items), object()
    for _, future in ahead(lambda _: next(items, end), count(), threads=1):
        if (item := future.result()) is end:
            return
        yield item
