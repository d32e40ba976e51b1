"""How much memory a piece of work takes, seen from the process that does it."""

import threading
import time
from collections.abc import Callable
from typing import Any


def anonymous() -> float:
    """Return the anonymous memory of this process in MiB; files that are mapped do not count."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def growth(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Run work; return its result, and by how many MiB anonymous memory grew at most and at the end."""
    start = peak = anonymous()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return result, max(peak, anonymous()) - start, anonymous() - start
