"""Facts about the machine, and the one thing that is set on it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Large blocks with small ones in between that stay: freed, they leave holes in the heap.
HOLES = """
import ctypes, sys
from smelt.runtime.machine import return_freed_memory
if sys.argv[1] == "yes":
    return_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
def anonymous():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) >> 10
size = 4 << 20
libc.free(libc.malloc(2 * size))  # glibc raises its threshold here
before, blocks = anonymous(), []
for _ in range(50):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    blocks.append(block)
    ctypes.memset(libc.malloc(1 << 16), 1, 1 << 16)
for block in blocks:
    libc.free(block)
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc, read from /proc")
def test_freed_memory_goes_back() -> None:
    def kept(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, check=True)
        return int(done.stdout)

    assert kept("yes") < 20, "MiB of 200 that were freed"
    assert kept("no") > 150, "the test shows nothing here"
