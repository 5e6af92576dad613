"""Memory that a process keeps, and what it gives back."""

import subprocess
import sys
import threading

import pytest

from pipeline import allocator

# What lies between the blocks stays, so that the heap does not end where they are freed.
GROWN = """
import time
import torch
from pipeline import allocator
allocator._GROWTH, allocator._LOOK, allocator._SETTLE = 2**24, 0.05, 0.05
allocator.keep_freed_memory()
blocks, between = [], []
for _ in range(256):
    blocks.append(torch.ones(2**18))
    between.append(bytes(4000))
grown = allocator.resident()
del blocks
until = time.monotonic() + 60
while allocator.resident() > grown - 2**27 and time.monotonic() < until:
    time.sleep(0.05)
    more = torch.ones(2**23 if time.monotonic() % 1 < 0.5 else 1)  # only a process that grows is looked at
print(grown - allocator.resident())
"""

linux = pytest.mark.skipif(not allocator.resident(), reason="the system does not tell a process's memory")


@linux
def test_what_lies_free_between_blocks_in_use_is_given_back():
    told = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=True)
    assert int(told.stdout) >= 2**27


@linux
def test_a_process_has_one_thread_that_gives_back():
    for _ in range(2):
        allocator.keep_freed_memory()
    assert [each.name for each in threading.enumerate()].count(allocator._NAME) == 1


def test_nothing_happens_with_another_c_library(monkeypatch):
    class Other:
        def __init__(self, _name):
            pass

    monkeypatch.setattr("ctypes.CDLL", Other)
    allocator.keep_freed_memory()
