"""Where the C library puts the memory of tensors."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

MAPPED = """
import ctypes, torch
from lensbench.runtime.memory import LARGEST_KEPT, reuse_memory
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
class Facts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
facts = ctypes.CDLL(None).mallinfo2
facts.restype = Facts
if {reuses}:
    reuse_memory()
for size in (LARGEST_KEPT // 8, LARGEST_KEPT * 2):
    before = facts().hblkhd
    kept = torch.empty(size, dtype=torch.uint8)
    print(int(facts().hblkhd - before >= size))
    del kept
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
@pytest.mark.parametrize(("reuses", "mapped"), [(False, ["1", "1"]), (True, ["0", "1"])])
def test_small_tensors_alone_lie_where_memory_is_kept_for_the_next(reuses, mapped):
    """By itself glibc maps each from a size on that changes with what was freed before; here the size is fixed."""
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    words = [sys.executable, "-c", MAPPED.format(reuses=reuses)]
    assert subprocess.check_output(words, text=True, timeout=60, env=fixed).split() == mapped


LARGE = """
import lensbench, torch
kept = torch.ones(64, 2**20)
rollup = open("/proc/self/smaps_rollup").read()
print(int(rollup.split("AnonHugePages:")[1].split()[0]) > 100_000)
"""


def large_pages_are_given() -> bool:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.is_file() and "[madvise]" in path.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not large_pages_are_given(), reason="large pages for those who ask")
@pytest.mark.parametrize("asked", [None, "0"])
def test_large_tensors_lie_in_large_pages_unless_the_user_says_no(asked):
    said = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | (
        {} if asked is None else {"THP_MEM_ALLOC_ENABLE": asked}
    )
    words = [sys.executable, "-c", LARGE]
    assert subprocess.check_output(words, text=True, timeout=60, env=said).strip() == str(asked is None)
