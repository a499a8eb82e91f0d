"""`ray job submit` against a cluster of its own, as a user types it."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.ports import free_ports

pytest.importorskip("aiohttp", reason="jobs need ray[default]: pip install 'flowcache-engine[cluster]'")

ROOT = Path(__file__).parent.parent.parent.parent
RAY = Path(sys.executable).parent / "ray"
pytestmark = pytest.mark.slow


@pytest.fixture
def head():
    """A cluster started as on a command line; the address of its dashboard."""
    port, dashboard, agent, client, metrics = free_ports(5)
    folder = tempfile.mkdtemp(prefix="fc", dir="/tmp")  # Ray's sockets need a short path
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += [f"--metrics-export-port={metrics}", "--num-cpus=4", f"--temp-dir={folder}"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline, "the dashboard does not answer"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.2)
        yield address, environment
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_makes_the_videos(head, tmp_path):
    address, environment = head
    (tmp_path / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"a {colour} circle moving up", "chunks": 1}) + "\n" for colour in ("red", "blue")
        )
    )
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable, "-m", "launch"]
    command += ["batch", tmp_path / "prompts.jsonl", "--out", tmp_path / "videos", "--pp", "2", "--steps", "4"]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
    results = [json.loads(line) for line in (tmp_path / "videos" / "results.jsonl").read_text().splitlines()]
    assert [result["status"] for result in results] == ["done", "done"]
