"""`flowcache serve` as a process of its own, with a cluster that it starts."""

import re
import signal
from fractions import Fraction

import av
import httpx2
import numpy as np

from launch.generate import generate
from launch.options import Options
from parallel.health.processes import descendants
from tests.launch.process import command_of, flowcache_process
from tests.parallel.forked import forks, ray_workers
from tests.waiting import until

PROMPT = "a red circle moving right"
OTHER = "a blue cross moving up"
KEY = "an-example-of-a-key"
SIZE = {"height": 64, "width": 64, "steps": 8}


class Service:
    """The command, its output and a client of it; it may be killed and started again."""

    def __init__(self, folder, temporary):
        self.folder, self.temporary = folder, temporary
        self.command = ["serve", "--keep-state", "--out", "served", "--port", 0, "--pp", 2, "--checkpoint-every", 1]
        self.command += ["--concurrency", 2, "--threads", 1, *(f"--{name}={value}" for name, value in SIZE.items())]
        self.said = folder / "said.txt"

    def start(self):
        import openai  # which takes two seconds, of every worker that collects tests

        extra = {"TMPDIR": str(self.temporary), "FLOWCACHE_API_KEY": KEY, **ray_workers()}
        self.process = flowcache_process(self.folder, *self.command, extra=extra, errors=self.said.open("w"))
        address = self.when(lambda: re.search(r"at (http://\S+)", self.said.read_text()))[1]
        headers = {"Authorization": f"Bearer {KEY}"}
        hooks = {"request": [self.alive]}
        self.client = httpx2.Client(base_url=address, headers=headers, timeout=60, event_hooks=hooks)
        self.openai = openai.OpenAI(api_key=KEY, base_url=f"{address}/v1", max_retries=0)

    def alive(self, _=None):
        """Say what it said, if it has ended."""
        assert self.process.poll() is None and "error: " not in self.said.read_text(), self.said.read_text()

    def tried(self, condition):
        """What a condition gives; an error with what the service said, if it has ended."""
        self.alive()
        try:
            return condition()
        except httpx2.TransportError:
            self.process.wait(60)
            self.alive()
            raise

    def when(self, condition, seconds=180):
        """What a condition gives as soon as that is true."""
        return until(lambda: self.tried(condition), self.said.read_text, seconds, pause=0.05)

    def create(self, **body):
        answer = self.client.post("/v1/videos", json={"prompt": PROMPT, "seconds": 1, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def change(self, name, prompt):
        url, body = f"/v1/videos/{name}/prompt", {"prompt": prompt}
        answer = self.when(lambda: (one := self.client.post(url, json=body)).status_code != 503 and one)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def get(self, name):
        return self.client.get(f"/v1/videos/{name}").json()

    def wait(self, name, *status):
        return self.when(lambda: (video := self.get(name)) and video["status"] in (status or ("completed",)) and video)

    def frames(self, name):
        return decoded(self.client.get(f"/v1/videos/{name}/content").content, self.folder / "got.mp4")

    def below(self, name=""):
        return [pid for pid in descendants(self.process.pid) | forks() if name in command_of(pid)]

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
    options = Options(**{"prompts": [PROMPT], "out": folder / "alone.mp4", "threads": 1, **SIZE, **video})
    generate(options, [])
    return decoded((folder / "alone.mp4").read_bytes(), folder / "copy.mp4")
