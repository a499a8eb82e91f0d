"""What the service makes of requests, good and bad, before there is any gang: a real store on a real port."""

import base64
import gzip
import json
import logging
import resource
import socket
import struct
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import av
import httpx2
import numpy as np
import pytest

from launch.options import Options
from launch.serve.app import make_app
from launch.serve.engine import Maker
from launch.serve.metrics import Metrics
from launch.serve.options import ServeOptions
from launch.serve.requests import Service
from launch.serve.run import limit_plan, listening, served
from launch.serve.store import Store
from models.errors import InputError
from tests.launch.process import short_files

PROMPT = "a red circle moving right"
KEY = "an-example-of-a-key"
SMALL = Options(launcher="ray", height=64, width=64, steps=8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side):
    """A black picture of a bit per pixel, which is small however large it is."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + side // 8) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def clip(path, frames):
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 64
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


@contextmanager
def running(folder, **given):
    """A service without gangs, and a client of it."""
    options = ServeOptions(out=folder, port=0, base=SMALL, **given)
    limit, said = limit_plan(options), []
    store = Store(folder, max_queue=options.max_queue, max_bytes=None, say=said.append)
    with listening(options) as listener, store:
        metrics = Metrics("magi-pocket", store.counts)
        maker = Maker(options, limit, store, metrics, said.append)
        service = Service(options=options, limit=limit, store=store, maker=maker)
        headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with served(make_app(service, metrics), listener), httpx2.Client(base_url=address, headers=headers) as client:
            yield client, store
    assert not said


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve") / "served", max_seconds=4, max_upload="1MB") as (client, store):
        yield client, store


def post(path="/v1/videos", **given):
    return "POST", path, given


def create(**body):
    return post(json={"prompt": PROMPT, **body})


def upload(content, **fields):
    return post(data={"prompt": PROMPT, **fields}, files={"input_reference": ("x", content)})


def raw(content, kind="application/json"):
    return post(content=content, headers={"content-type": kind})


def longer(**body):
    return post("/v1/videos/extensions", json=body)


def long_clip():
    with tempfile.TemporaryDirectory() as folder:
        return clip(Path(folder) / "clip.mp4", 24 * 6)


GIF = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
GIF += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2\x4c\1\0;"
BOMB, LONG_CLIP = base64.b64encode(png(8192)).decode(), long_clip()
LONG = '{"prompt": ' + "[" * 100_000
FORM = "multipart/form-data; boundary=x"
UNKNOWN = "/v1/videos/video_000000000000000000000000"

BAD = {
    "no body": (raw(b""), 400, "not JSON"),
    "no JSON": (raw(b"{broken"), 400, "not JSON"),
    "a list": (raw(b"[]"), 400, "no JSON object"),
    "too deep": (raw(LONG), 400, "cannot be read as JSON"),
    "no UTF-8": (raw(b'{"prompt": "\xff"}'), 400, "UTF-8"),
    "a key twice": (raw(b'{"prompt": "a", "prompt": "b"}'), 400, "twice"),
    "another kind": (raw(b"x", "text/plain"), 415, "text/plain"),
    "a broken form": (raw(b"--y\r\n", FORM), 400, ""),
    "a form cut off": (raw(b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\na', FORM), 400, "missing"),
    "no prompt": (post(json={"seconds": 1}), 400, "'prompt' is missing"),
    "an empty prompt": (create(prompt=""), 400, "prompt"),
    "a prompt of another type": (create(prompt=["a"]), 400, "prompt"),
    "a long prompt": (create(prompt="a " * 9000), 400, "prompt"),
    "an unknown word": (create(prompt="a purple cow"), 400, "purple"),
    "half a character": (raw(b'{"prompt": "\\ud800"}'), 400, "prompt"),
    "an unknown key": (create(colour="red"), 400, "no key 'colour'"),
    "another model": (create(model="sora-2"), 404, "magi-pocket"),
    "no seconds": (create(seconds=0), 400, "seconds"),
    "seconds of another type": (create(seconds=True), 400, "seconds"),
    "infinite seconds": (raw(b'{"prompt": "a", "seconds": Infinity}'), 400, "seconds"),
    "too many seconds": (create(seconds=5), 413, "seconds: 5 is more than the 4"),
    "a strange size": (create(size="large"), 400, "size"),
    "an odd size": (create(size="63x64"), 400, "multiple of 16"),
    "a huge size": (create(size="16384x16384"), 413, "more than the 4,096 pixels"),
    "a size out of bounds": (create(size="999999x999999"), 400, "width"),
    "a negative seed": (create(seed=-1), 400, "seed"),
    "a huge seed": (create(seed=10**30), 400, "seed"),
    "a number of 5,000 digits": (raw(b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}"), 400, "cannot be read"),
    "no number": (raw(b'{"prompt": "a", "seconds": NaN}'), 400, "seconds"),
    "a huge priority": (create(priority=10**30), 400, "priority"),
    "steps that do not divide": (create(num_inference_steps=7), 400, "7"),
    "steps of another type": (create(num_inference_steps="many"), 400, "num_inference_steps"),
    "too few frames": (create(fps=8), 400, "fps"),
    "a frame rate of another type": (create(fps="many"), 400, "fps"),
    "too many seconds at another frame rate": (create(fps=48, seconds=5), 413, "seconds: 5"),
    "an unknown preset": (create(cache="best"), 400, "cache"),
    "no KV budget": (create(kv_budget=0), 400, "kv_budget"),
    "a negative prompt": (create(negative_prompt="ugly"), 400, "magi-pocket read none"),
    "a long negative prompt": (create(negative_prompt="ugly " * 9000), 400, "negative_prompt"),
    "prompts of another type": (create(prompts={"1s": 3}), 400, "prompts"),
    "prompts at no time": (create(prompts={"later": PROMPT}), 400, "no time"),
    "prompts after the end": (create(prompts={"3s": PROMPT}, seconds=2), 400, "after the end"),
    "a reference elsewhere": (create(input_reference={"image_url": "http://127.0.0.1/a.png"}), 400, "upload a file"),
    "a reference on this machine": (create(input_reference={"image_url": "file:///etc/passwd"}), 400, "upload a file"),
    "no base64": (create(input_reference={"image_url": "data:image/png;base64,%%"}), 400, "base64"),
    "a reference that is text": (upload(b"#EXTM3U\nfile:///etc/passwd\n"), 400, "cannot read"),
    "an empty reference": (upload(b""), 400, "cannot read"),
    "half a picture": (upload(png(64)[:40]), 400, "cannot read"),
    "a bomb": (upload(png(8192)), 400, "at most 33,554,432 pixels"),
    "a bomb of another kind": (upload(GIF), 400, "pixels"),
    "a bomb in base64": (create(input_reference={"image_url": f"data:image/png;base64,{BOMB}"}), 400, "pixels"),
    "a clip that is too long": (upload(LONG_CLIP), 400, "longer than 4 s"),
    "a compressed body": (post(content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"}), 400, "UTF-8"),
    "many fields": (post(data={f"x{number}": "1" for number in range(41)}), 400, "fields"),
    "two files": (post(data={"prompt": PROMPT}, files=[("input_reference", b"x")] * 2), 400, "files"),
    "broken JSON in a form": (upload(png(64), prompts="{"), 400, "prompts"),
    "a large body": (upload(bytes(2_000_000)), 413, "1,000,000 bytes"),
    "a file of another name": (post(files={"prompts": ("x", b"{}")}), 400, "only input_reference"),
    "a longer video of none": (longer(video={"id": "video_0"}, seconds=1), 404, "no video"),
    "a longer video of nothing": (longer(seconds=1), 400, "'video' is missing"),
    "a longer video of another form": (longer(video={"url": "x"}, seconds=1), 400, "video"),
    "a new prompt of none": (post(f"{UNKNOWN}/prompt", json={"prompt": PROMPT}), 404, "no video"),
    "a longer video of a path": (longer(video={"id": "../../etc"}, seconds=1), 404, "no video"),
    "a longer video of a file": (
        post("/v1/videos/extensions", data={"seconds": "1"}, files={"video": ("x", b"x")}),
        400,
        "a file cannot be made longer",
    ),
    "its events": (("GET", f"{UNKNOWN}/events", {}), 404, "no video"),
    "a fragment before the first": (("GET", f"{UNKNOWN}/stream", {"params": {"fragment": -1}}), 400, "fragment"),
    "a fragment of another type": (("GET", f"{UNKNOWN}/stream", {"params": {"fragment": "x"}}), 400, "fragment"),
    "a file of the page elsewhere": (("GET", "/page/..%2f..%2frun.py", {}), 404, "there is no"),
    "another variant": (("GET", f"{UNKNOWN}/content", {"params": {"variant": "thumbnail"}}), 400, "variant"),
    "an unknown model": (("GET", "/v1/models/..%2fetc", {}), 404, "there is no model"),
    "an unknown id": (("GET", UNKNOWN, {}), 404, "no video"),
    "its content": (("GET", f"{UNKNOWN}/content", {}), 404, "no video"),
    "its end": (("DELETE", UNKNOWN, {}), 404, "no video"),
    "a path as an id": (("GET", "/v1/videos/..%2f..%2fetc%2fpasswd", {}), 404, "there is no GET"),
    "a strange id": (("GET", "/v1/videos/%00%ff%0a", {}), 404, "no video"),
    "an unknown path": (("GET", "/v2/videos", {}), 404, "there is no GET"),
    "another method": (("PUT", "/v1/videos", {}), 405, "there is no PUT"),
    "a list of none": (("GET", "/v1/videos", {"params": {"limit": 0}}), 400, "limit"),
    "a strange order": (("GET", "/v1/videos", {"params": {"order": "best"}}), 400, "order"),
    "a list after nothing": (("GET", "/v1/videos", {"params": {"after": "x"}}), 404, "no video"),
    "a page elsewhere": (("GET", "/v1/videos", {"headers": {"origin": "http://evil.example"}}), 403, "other sites"),
    "another name": (("GET", "/v1/videos", {"headers": {"host": "evil.example"}}), 403, "other sites"),
}


def test_bad_requests_are_of_many_kinds():
    assert len(BAD) >= 70 and {status for _, status, _ in BAD.values()} == {400, 403, 404, 405, 413, 415}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_one_clear_error(service, name, caplog, capfd):
    client, store = service
    (method, path, given), status, words = BAD[name]
    answer = client.request(method, path, **given)
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert words in message and "\n" not in message and str(store.root) not in message
    assert not store.jobs() and [path.name for path in store.root.iterdir()] == [".lock"]
    assert not caplog.records and "Traceback" not in capfd.readouterr().err


def test_cut_uploads_and_garbage_end_nothing(service, caplog, capfd):
    client, store = service
    port = client.base_url.port
    head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {FORM}\r\n"
    part = '--x\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
    for sent in (f"{head}Content-Length: 5000\r\n\r\n{part}", "GARBAGE\r\n\r\n", f"{head}Content-Length: many\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent.encode())
    endless = (b"x" * 100_000 for _ in range(100))  # without a length
    try:
        answer = client.post("/v1/videos", content=endless, headers={"content-type": "application/json"})
        assert answer.status_code == 413 and "1,000,000 bytes" in answer.text
    except httpx2.TransportError:
        pass  # it was still sending
    assert client.get("/v1/videos").json()["data"] == [] and not store.jobs()
    assert not caplog.records and "Traceback" not in capfd.readouterr().err


def test_a_bomb_takes_no_memory(service):
    """A picture of 256 megapixels in 300 kB."""
    client, _ = service
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    method, path, given = upload(png(16384))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.request(method, path, **given), range(8)))
    assert {answer.status_code for answer in answers} == {400}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


def test_a_job_says_that_it_has_ended_once_that_is_written(tmp_path, monkeypatch):
    with running(tmp_path / "a") as (client, store):
        name, save, seen = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"], store.save, []
        monkeypatch.setattr(store, "save", lambda job: (save(job), seen.append((job.status, store.get(name).status))))
        assert client.delete(f"/v1/videos/{name}").json()["status"] == "cancelled"
    assert seen == [("cancelled", "queued")]


def test_jobs_are_queued_listed_and_cancelled(tmp_path):
    with running(tmp_path / "a", max_queue=4) as (client, store):
        made = [client.post("/v1/videos", json={"prompt": PROMPT, "seed": seed}).json() for seed in range(3)]
        assert [one["status"] for one in made] == ["queued"] * 3 and made[0]["object"] == "video"
        assert (made[0]["size"], made[0]["progress"], made[0]["prompt"]) == ("64x64", 0, PROMPT)
        ids = [one["id"] for one in made]
        page = client.get("/v1/videos", params={"limit": 2}).json()
        assert [one["id"] for one in page["data"]] == ids[:0:-1] and page["has_more"]
        page = client.get("/v1/videos", params={"after": page["last_id"]}).json()
        assert [one["id"] for one in page["data"]] == ids[:1] and not page["has_more"]
        assert [one["id"] for one in client.get("/v1/videos", params={"order": "asc"}).json()["data"]] == ids
        assert client.get(f"/v1/videos/{ids[0]}/content").status_code == 409
        gone = client.delete(f"/v1/videos/{ids[0]}").json()
        assert gone == {"id": ids[0], "object": "video.deleted", "deleted": True, "status": "cancelled"}
        assert client.get(f"/v1/videos/{ids[0]}").json()["status"] == "cancelled"
        for prompt, status, words in (
            ("", 400, "prompt"),
            ("  ", 400, "prompt"),
            ("a " * 9000, 400, "prompt"),
            ("a purple cow", 400, "purple"),
            (PROMPT, 409, "is cancelled"),
        ):
            answer = client.post(f"/v1/videos/{ids[0]}/prompt", json={"prompt": prompt})
            assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text
        client.delete(f"/v1/videos/{ids[0]}")
        assert client.get(f"/v1/videos/{ids[0]}").status_code == 404
        for seed in range(2):
            assert client.post("/v1/videos", json={"prompt": PROMPT, "seed": seed}).status_code == 200
        full = client.post("/v1/videos", json={"prompt": PROMPT})
        assert full.status_code == 429 and "the queue is full" in full.json()["error"]["message"]
        assert client.get("/health").status_code == 503
        text = client.get("/metrics").text
        assert 'flowcache_serve_requests{model="magi-pocket",status="queued"} 4.0' in text
        before = store.jobs()
    with running(tmp_path / "a") as (_, again):
        assert again.jobs() == before
        with pytest.raises(InputError, match="another service has"), running(tmp_path / "a"):
            pass


def test_a_request_that_the_disk_has_no_room_for_is_an_error_and_leaves_nothing(tmp_path):
    with running(tmp_path / "a") as (client, store):
        with short_files(10):
            full = client.post("/v1/videos", json={"prompt": PROMPT})
        assert full.status_code == 507 and "no space left" in full.json()["error"]["message"]
        assert not store.jobs() and [path.name for path in store.root.iterdir()] == [".lock"]
        assert client.post("/v1/videos", json={"prompt": PROMPT}).status_code == 200


def test_what_a_killed_service_has_left_of_an_ended_video_goes(tmp_path):
    """Its checkpoints, which may be elsewhere; those of a video that is to be made stay."""
    given = {"checkpoints": tmp_path / "kept"}
    with running(tmp_path / "a", **given) as (client, store):
        ended, queued = (client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"] for _ in range(2))
        client.delete(f"/v1/videos/{ended}")
        for name in (ended, queued):
            (tmp_path / "kept" / name / "pp1").mkdir(parents=True)
            (store.root / name / "left").touch()
    with running(tmp_path / "a", **given) as (_, store):
        assert [path.name for path in (tmp_path / "kept").iterdir()] == [queued]
        assert [path.name for path in (store.root / ended).iterdir()] == ["job.json"]
        assert (store.root / queued / "left").exists()


def test_what_a_video_starts_from_comes_in_each_form(tmp_path):
    picture, film = png(64), clip(tmp_path / "clip.mp4", 24)
    embedded = {"image_url": "data:image/png;base64," + base64.b64encode(picture).decode()}
    with running(tmp_path / "a") as (client, store):
        for method, path, given in (
            upload(picture, seconds="1"),
            upload(film, seconds="2", prompts=json.dumps({"1s": "a blue cross moving up"}), size="64x64"),
            create(input_reference=embedded, seconds="2"),
            upload(picture, seconds="2", fps="48", negative_prompt=""),
        ):
            assert client.request(method, path, **given).status_code == 200
        lines = [job.line for job in store.jobs()]
        assert (lines[-1]["fps"], store.jobs()[-1].seconds) == (48, 2)
    assert [[key for key in ("image", "video", "script") if key in line] for line in lines] == [
        ["image"],
        ["video", "script"],
        ["image"],
        ["image"],
    ]


def test_with_a_key_nothing_is_told_without_it(tmp_path, caplog, capfd):
    import openai

    with running(tmp_path / "a", api_key=KEY) as (client, _):
        for given in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            for path in ("/v1/videos", "/v1/models", "/metrics", UNKNOWN):
                answer = client.get(path, headers=given)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
                assert KEY not in answer.text
        assert client.get("/health", headers={"Authorization": ""}).status_code == 503
        official = openai.OpenAI(api_key=KEY, base_url=f"{client.base_url}/v1", max_retries=0)
        assert official.videos.list().data == []
        assert [model.id for model in official.models.list()] == ["magi-pocket"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(api_key="wrong", base_url=f"{client.base_url}/v1", max_retries=0).videos.list()
    logging.shutdown()
    assert KEY not in caplog.text and KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host": "0.0.0.0"}, "give an --api-key"),
        ({"host": "example.com"}, "give an --api-key"),
        ({"api_key": " "}, "--api-key is empty"),
        ({"port": 70_000}, "--port"),
    ],
)
def test_options_that_would_be_unsafe_are_refused(given, words):
    with pytest.raises(InputError, match=words):
        ServeOptions(**given)


def test_a_port_that_is_taken_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = ServeOptions(port=taken.getsockname()[1])
        with pytest.raises(InputError, match="cannot listen at .*give another --port"), listening(options):
            pass
