"""`flowcache serve` as a process of its own, with a cluster that it starts: one service for many short tests."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import httpx2
import numpy as np
import openai
import pytest

from launch.generate import generate
from launch.options import Options
from tests.launch.process import ROOT, children, command_of, flowcache_process, short_folder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API")]
PROMPT = "a red circle moving right"
KEY = "an-example-of-a-key"
SIZE = {"height": 64, "width": 64, "steps": 8}


class Service:
    """The command, its output and a client of it; it may be killed and started again."""

    def __init__(self, folder, temporary, *more):
        self.folder, self.temporary = folder, temporary
        self.command = ["serve", "--out", "served", "--port", 0, "--pp", 2, "--checkpoint-every", 1, "--concurrency", 2]
        self.command += [f"--{name}={value}" for name, value in SIZE.items()] + ["--threads", 1, *more]
        self.said = folder / "said.txt"

    def start(self):
        extra = {"TMPDIR": str(self.temporary), "FLOWCACHE_API_KEY": KEY}
        self.process = flowcache_process(self.folder, *self.command, extra=extra, errors=self.said.open("w"))
        address = self.when(lambda: re.search(r"at (http://\S+)", self.said.read_text()))[1]
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx2.Client(base_url=address, headers=headers, timeout=60)
        self.openai = openai.OpenAI(api_key=KEY, base_url=f"{address}/v1", max_retries=0)

    def when(self, condition, seconds=180):
        """What a condition gives as soon as that is true."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.05)
        return found

    def create(self, **body):
        answer = self.client.post("/v1/videos", json={"prompt": PROMPT, "seconds": 1, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def get(self, name):
        return self.client.get(f"/v1/videos/{name}").json()

    def wait(self, name, *status):
        return self.when(lambda: (video := self.get(name)) and video["status"] in (status or ("completed",)) and video)

    def frames(self, name):
        return decoded(self.client.get(f"/v1/videos/{name}/content").content, self.folder / "got.mp4")

    def below(self, name=""):
        return [pid for pid in children(self.process.pid) if name in command_of(pid)]

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        self.process.wait(60)
        return self.process.returncode, self.said.read_text()


def decoded(content, path):
    path.write_bytes(content)
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def picture(pixels):
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *pixels.shape[:2], "rgb24", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def made_alone(folder, **video):
    options = Options(prompts=[PROMPT], out=folder / "alone.mp4", threads=1, **SIZE, **video)
    generate(options, [])
    return decoded((folder / "alone.mp4").read_bytes(), folder / "copy.mp4")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with short_folder() as temporary:
        service = Service(tmp_path_factory.mktemp("service"), temporary)
        service.start()
        try:
            yield service
        finally:
            service.process.kill()
            service.process.wait()


def test_the_official_client_makes_lists_reads_and_deletes_videos(service):
    videos = service.openai.videos
    made = videos.create(prompt=PROMPT, seconds="1", size="64x64", extra_body={"seed": 3})
    assert made.status == "queued" and made.object == "video" and made.model == "magi-pocket"
    made = videos.poll(made.id, poll_interval_ms=100)
    assert made.status == "completed" and made.progress == 100 and made.error is None
    assert made.completed_at >= made.created_at and (made.seconds, made.size) == ("1", "64x64")
    content = videos.download_content(made.id).read()
    np.testing.assert_array_equal(
        decoded(content, service.folder / "a.mp4"), made_alone(service.folder, seconds=1, seed=3)
    )
    part = service.client.get(f"/v1/videos/{made.id}/content", headers={"range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == content[100:200]
    assert made.id in [video.id for video in videos.list(limit=5)]
    assert videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        videos.retrieve(made.id)


def test_a_video_that_is_cancelled_frees_its_slots_for_the_next(service):
    """Two long videos fill the gang, so the third waits until one of them is cancelled."""
    long = [service.create(seconds=40, seed=seed) for seed in range(4)]
    for name in long[:2]:
        service.wait(name, "in_progress")
    short = service.create(priority=5)
    time.sleep(0.5)
    began = time.monotonic()
    for name in long:
        answer = service.client.delete(f"/v1/videos/{name}").json()
        assert answer["deleted"] and answer["status"] == "cancelled"
    service.wait(short, "in_progress", "completed")
    assert time.monotonic() - began < 2 + 1
    assert service.wait(short)["progress"] == 100
    assert {service.get(name)["status"] for name in long} == {"cancelled"}
    assert not [path for name in long for path in (service.folder / "served" / name).iterdir() if path.is_dir()]


def test_a_gang_that_dies_ends_no_request(service):
    name = service.create(seconds=6, seed=1)
    service.when(lambda: service.get(name)["progress"] >= 40)
    os.kill(service.below("RankActor")[0], signal.SIGKILL)
    service.when(lambda: "gang-0 was lost" in service.said.read_text())
    service.wait(name)
    np.testing.assert_array_equal(service.frames(name), made_alone(service.folder, seconds=6, seed=1))
    assert service.client.get("/health").json() == {"status": "ok", "gangs": {"gang-0": "up"}}
    text = service.client.get("/metrics").text
    for figure in (
        "requests",
        "chunks_total",
        "computed_fraction",
        "kv_fill",
        "first_chunk_seconds",
        "real_time_factor",
    ):
        assert re.search(rf'^flowcache_serve_{figure}\S*{{.*model="magi-pocket".*}} [\d.]+$', text, re.M), figure


def test_a_service_that_is_killed_goes_on_with_its_queue_when_started_again(service):
    names = [service.create(seconds=4, seed=seed) for seed in (5, 6)] + [service.create(seed=7)]
    parts = service.folder / "served" / names[0] / "checkpoints" / names[0] / "segments-libx264"
    service.when(lambda: parts.exists() and len(list(parts.iterdir())) >= 2)
    service.process.kill()
    service.process.wait()
    service.start()
    for name, seconds, seed in zip(names, (4, 4, 1), (5, 6, 7), strict=True):
        service.wait(name)
        np.testing.assert_array_equal(service.frames(name), made_alone(service.folder, seconds=seconds, seed=seed))
        left = [path.name for path in (service.folder / "served" / name).iterdir()]
        assert sorted(left) == ["job.json", "video.mp4"]


def test_many_clients_at_once_lose_nothing(service):
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda seed: service.create(seed=seed), range(16)))
    assert len(set(names)) == 16
    for name in names:
        service.wait(name)
    texts = {service.client.get(f"/v1/videos/{name}/content").content for name in names}
    assert len(texts) == 16


def test_the_curl_lines_of_the_docs_work(service):
    lines = re.findall(r"^curl .*", (ROOT / "docs" / "serve.md").read_text(), re.M)
    assert len(lines) >= 8
    (service.folder / ".curlrc").write_text(f'header = "Authorization: Bearer {KEY}"\nfail\nsilent\n')
    (service.folder / "start.png").write_bytes(picture(np.zeros((64, 64, 3), np.uint8)))
    environment = {**os.environ, "CURL_HOME": str(service.folder)}
    answer = ""
    for line in lines:
        if '"id"' in answer and "ID" not in environment:
            environment["ID"] = json.loads(answer)["id"]
            service.wait(environment["ID"])
        line = line.replace("http://127.0.0.1:8000", str(service.client.base_url).rstrip("/"))
        ran = subprocess.run(["bash", "-c", line], cwd=service.folder, env=environment, capture_output=True, check=True)
        answer = ran.stdout.decode()
    assert "flowcache_serve_requests" in answer
    assert decoded((service.folder / "video.mp4").read_bytes(), service.folder / "copy.mp4").shape[0] == 24


def test_a_signal_ends_it_with_nothing_left_but_its_folder(service):
    name = service.create(seconds=20)
    service.wait(name, "in_progress")
    running = service.below()
    status, text = service.end()
    assert status == 143 and "flowcache: stopped" in text and "Traceback" not in text and KEY not in text
    assert not [command_of(pid) for pid in running if command_of(pid)]
    assert not [path for path in service.temporary.iterdir() if path.suffix != ".log"]


def test_what_cannot_be_served_is_one_line(flowcache):
    for arguments, words in ((["--host", "0.0.0.0"], "give an --api-key"), (["--model", "x"], "unknown model")):
        made = flowcache("serve", *arguments)
        assert made.returncode == 2 and words in made.stderr and made.stderr.count("\n") == 1, made.stderr


def test_without_the_extra_one_line_says_how_to_get_it():
    code = "import sys; sys.modules['fastapi'] = None; from launch.cli import run; sys.exit(run(['serve']))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "pip install 'flowcache-engine[serve]'" in ran.stderr and ran.stderr.count("\n") == 1
    code = "import sys; import launch.cli; sys.exit('fastapi' in sys.modules or 'launch.serve.run' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
