"""The bytes that a KV buffer says it holds are those that a process grows by, and compression needs little on top."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SCRIPT = """
import ctypes, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from engine.kv.buffer import KVBuffer
from engine.kv.layout import KVPlan
from engine.kv.selection import SelectionSettings
from engine.video import KVOp
from models.attention import attention_backend
from models.protocols import KVGeometry

def status(name):
    text = Path("/proc/self/status").read_text()
    return int(text.split(name + ":")[1].split()[0]) * 1024

def fill(buffer, chunk):
    buffer.apply(KVOp(kind="enter", chunk=chunk))
    view = buffer.view(0, chunk, None, asks=True)
    for layer in range(LAYERS):
        view.store(layer, torch.randn(1, TOKENS, HEADS, SIZE), torch.randn(1, TOKENS, HEADS, SIZE))
        view.attend(layer, torch.randn(1, QUERIES, HEADS, SIZE))

TOKENS, HEADS, SIZE, LAYERS, BUDGET, WINDOW = 1200, 8, 64, 5, 2, 4
QUERIES = 50  # that are asked with; the others would take time and leave nothing behind
compressed = sys.argv[1] == "compressed"
geometry = KVGeometry(
    layers=range(LAYERS), query_heads=HEADS, key_heads=HEADS, head_size=SIZE, dtype=torch.float32,
    device=torch.device("cpu"),
)
plan = KVPlan(
    chunk_tokens=TOKENS, frame_tokens=TOKENS // 6, clean_tokens=BUDGET * TOKENS, window=WINDOW, chunks=20, branches=1,
    selection=SelectionSettings(query_tokens=QUERIES) if compressed else None,
)
def run(buffer, chunks):
    for chunk in range(chunks):
        if chunk >= WINDOW:
            buffer.apply(KVOp(kind="retire", chunk=chunk - WINDOW))
        fill(buffer, chunk)

run(KVBuffer(plan, geometry, attention_backend("sdpa")), 8)  # what a first run leaves behind counts for nobody
ctypes.CDLL(None).malloc_trim(0)
before = status("VmRSS")
buffer = KVBuffer(plan, geometry, attention_backend("sdpa"))
run(buffer, 6)
ctypes.CDLL(None).malloc_trim(0)
grown = status("VmRSS") - before
Path("/proc/self/clear_refs").write_text("5")
at_rest = status("VmHWM")
buffer.apply(KVOp(kind="retire", chunk=2))
print(json.dumps({"said": buffer.nbytes, "grown": grown, "scratch": status("VmHWM") - at_rest}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to tell a process's memory")
@pytest.mark.parametrize("kind", ["rolling", "compressed"])
def test_a_process_grows_by_what_the_buffer_says(kind):
    done = subprocess.run([sys.executable, "-c", SCRIPT, kind], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["said"] > 140e6
    assert found["grown"] == pytest.approx(found["said"], rel=0.01)
    assert found["scratch"] < 0.6 * found["said"], "compression of one layer after another needs more than three layers"
