"""Large blocks come from the system one by one, also after such a block was freed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import ctypes, sys
from engine.machine import settle_heap

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Mallinfo, ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "apart":
    assert settle_heap()
for _ in range(3):
    before = libc.mallinfo2().hblks
    block = libc.malloc(ctypes.c_size_t(8 << 20))
    print(libc.mallinfo2().hblks - before, end=" ")
    libc.free(block)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another heap")
@pytest.mark.parametrize(("how", "apart"), [("apart", "1 1 1"), ("as it is", "1 0 0")])
def test_large_blocks_stay_apart(how, apart):
    done = subprocess.run([sys.executable, "-c", SCRIPT, how], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == apart
