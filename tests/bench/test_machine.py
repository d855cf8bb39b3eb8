"""What the benchmarks measure with."""

from __future__ import annotations

import os
import platform
import threading
import time

import pytest

from tests.bench.machine import process_cpu_s


@pytest.mark.skipif(platform.system() != "Linux", reason="reads a clock of Linux")
def test_a_process_s_cpu_time_holds_that_of_threads_that_have_ended() -> None:
    spent_s: list[float] = []

    def work() -> None:
        while time.thread_time() < 0.05:
            pass
        spent_s.append(time.thread_time())

    before_s = process_cpu_s(os.getpid())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert process_cpu_s(os.getpid()) - before_s >= spent_s[0] >= 0.05
