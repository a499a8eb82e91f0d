"""The service as an application of a real Ray Serve."""

import os
import signal
import subprocess
import sys

import httpx2
import pytest

from parallel.health.processes import descendants
from tests.launch.process import ROOT, command_of, environment, short_folder
from tests.ports import free_ports
from tests.waiting import until

pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'flowcache-engine[rayserve]'")
pytestmark = pytest.mark.slow
START = """
import sys
import ray
from ray import serve
from launch.serve.rayservice import build
ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=2**27, _temp_dir=sys.argv[1])
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(build({"options": sys.argv[3]}))
print("running", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


def services(process):
    return [pid for pid in descendants(process.pid) if "launch serve --out" in command_of(pid)]


def is_up(port):
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health", timeout=10).status_code == 200
    except httpx2.TransportError:
        return False


def test_ray_serve_starts_the_service_again_when_it_is_killed_and_ends_it(tmp_path):
    port, other = free_ports(2)
    said_text = (tmp_path / "said.txt").read_text
    options = f"--out {tmp_path / 'served'} --port {port} --threads 1 --height 64 --width 64 --steps 8"
    with short_folder() as temporary, (tmp_path / "said.txt").open("w") as said:
        command = [sys.executable, "-c", START, str(temporary), str(other), options]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        )
        try:
            until(lambda: is_up(port), said_text, 120, pause=0.2)
            assert "a port of its own" in httpx2.get(f"http://127.0.0.1:{other}/", timeout=30).text
            [first] = services(process)
            os.kill(first, signal.SIGKILL)
            until(lambda: services(process) not in ([], [first]) and is_up(port), said_text, 120, pause=0.2)
            process.stdin.close()
            until(lambda: not services(process), said_text, 120, pause=0.2)
            process.wait(60)
        finally:
            process.kill()
            process.wait()
