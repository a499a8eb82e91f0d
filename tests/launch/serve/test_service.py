"""`flowcache serve` with gangs: many short tests of one service."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.files import part_of
from launch.cli import run
from tests.launch.process import ROOT, command_of, small_disk
from tests.launch.serve.service import KEY, OTHER, PROMPT, decoded, made_alone, picture
from tests.launch.serve.test_requests import BAD

SECRET = "a-key-of-another-service"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The Sora API")]


def is_tidy(folder):
    names = {path.name for path in folder.iterdir() if not path.name.startswith("prompts-")}
    return names == {"job.json", "video.mp4", "stream", "state"}


def test_the_official_client_makes_lists_reads_and_deletes_videos(service):
    import openai

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
    assert time.monotonic() - began < 10  # far less than the long ones would take
    assert service.wait(short)["progress"] == 100
    assert {service.get(name)["status"] for name in long} == {"cancelled"}
    folders = [service.folder / "served" / name for name in long]
    service.when(lambda: not [path for folder in folders for path in folder.iterdir() if path.name != "job.json"])


def test_a_gang_that_dies_ends_no_request_and_forgets_no_new_prompt(service):
    name = service.create(seconds=6, seed=1)
    service.when(lambda: service.get(name)["progress"] >= 5)
    changed = service.change(name, OTHER)
    assert changed["prompt"] == OTHER and 0 < changed["chunk"] < 6 and changed["seconds"] == changed["chunk"]
    service.when(lambda: service.get(name)["progress"] >= 40)
    os.kill(service.below("RankActor")[0], signal.SIGKILL)
    service.when(lambda: "gang-0 was lost" in service.said.read_text())
    service.wait(name)
    told = [{"chunk": 0, "seconds": 0, "prompt": PROMPT}, {key: changed[key] for key in ("chunk", "seconds", "prompt")}]
    assert service.get(name)["prompts"] == told
    late = service.client.post(f"/v1/videos/{name}/prompt", json={"prompt": OTHER})
    assert late.status_code == 409 and "completed" in late.json()["error"]["message"]
    whole = made_alone(service.folder, seconds=6, seed=1, prompt_at=[f"{changed['seconds']}s {OTHER}"])
    np.testing.assert_array_equal(service.frames(name), whole)
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


def test_a_disk_that_is_full_for_one_video_fails_it_and_the_others_go_on(service):
    """At first for a checkpoint, then for the first chunk; two videos keep the gang busy until the disks are there."""
    before = service.said.read_text().count("was lost")
    busy = [service.create(seconds=40, seed=seed) for seed in (20, 21)]
    for name in busy:
        service.wait(name, "in_progress")
    full = [service.create(seconds=3, seed=seed) for seed in (22, 23)]
    other = service.create(seconds=3, seed=24)
    with ExitStack() as disks:
        for name, size in zip(full, ("64k", "4k"), strict=True):
            state = service.folder / "served" / name / "state"
            state.mkdir(exist_ok=True)
            disks.enter_context(small_disk(state, size))
        for name in busy:
            service.client.delete(f"/v1/videos/{name}")
        for name in full:
            message = service.wait(name, "failed")["error"]["message"]
            assert re.match(rf"cannot write .*{name}/state/.*: no space left there, ", message) and "\n" not in message
            service.when(partial(is_empty, service.folder / "served" / name))
        service.wait(other)
    np.testing.assert_array_equal(service.frames(other), made_alone(service.folder, seconds=3, seed=24))
    assert service.said.read_text().count("was lost") == before
    for name in full:
        service.client.delete(f"/v1/videos/{name}")
        assert not (service.folder / "served" / name).exists()


def is_empty(folder):
    return [path.name for path in folder.rglob("*") if path.name != "job.json"] == ["state"]


def test_a_service_that_is_killed_goes_on_with_its_queue_and_new_prompts_when_started_again(service):
    names = [service.create(seconds=seconds, seed=seed) for seconds, seed in ((10, 5), (4, 6), (2, 7))]
    assert service.change(names[2], OTHER)["chunk"] == 0  # it waits
    state = service.folder / "served" / names[0] / "state"
    service.when(lambda: service.get(names[0])["progress"] >= 5)
    first = service.change(names[0], OTHER)["chunk"]
    service.when(lambda: len(list(state.glob("segments-*/*.mp4"))) >= 2)
    service.process.kill()
    service.process.wait()
    # As if it had been killed at the end of a video, when the chunks of its stream had got their second names.
    chunks, half = next(state.glob("segments-*")), part_of(Path("000003.mp4")).name
    shutil.copytree(chunks, state.parent / "stream", copy_function=os.link)
    (chunks / half.replace(f"-{os.getpid()}.", f"-{service.process.pid}.")).touch()  # or while it wrote a chunk
    service.start()
    second = service.change(names[0], PROMPT)["chunk"]  # before the other, if less had been kept than was made
    script = sorted({first: OTHER, second: PROMPT}.items())
    assert 0 < script[0][0] <= script[-1][0] < 10
    assert [one["chunk"] for one in service.get(names[0])["prompts"]] == [0, *dict(script)]
    hows = [{"prompt_at": [f"{chunk}s {prompt}" for chunk, prompt in script]}, {}, {"prompts": [OTHER]}]
    for name, seconds, seed, how in zip(names, (10, 4, 2), (5, 6, 7), hows, strict=True):
        service.wait(name)
        whole = made_alone(service.folder, seconds=seconds, seed=seed, **how)
        np.testing.assert_array_equal(service.frames(name), whole)
        service.when(partial(is_tidy, service.folder / "served" / name))
        assert not list((service.folder / "served" / name).rglob(".*"))


def test_a_video_is_streamed_and_watched_while_it_is_made(service):
    """The first frame is there before a third of the chunks is done; another viewer begins in the middle."""
    name = service.create(seconds=12, seed=9)
    got, frames = b"", []
    with service.client.stream("GET", f"/v1/videos/{name}/stream") as answer:
        assert answer.headers["content-type"] == "video/mp4"
        for piece in answer.iter_bytes():
            if not got:
                stored = len(list((service.folder / "served" / name / "state").glob("segments-*/*.mp4")))
                assert service.get(name)["status"] == "in_progress" and stored <= 4
                frames = decoded(piece, service.folder / "first.mp4")
                assert len(frames) == 24
            got += piece
    service.wait(name)
    whole = service.frames(name)
    np.testing.assert_array_equal(decoded(got, service.folder / "stream.mp4"), whole)
    np.testing.assert_array_equal(frames, whole[:24])
    again = service.client.get(f"/v1/videos/{name}/stream", params={"fragment": 10}).content
    np.testing.assert_array_equal(decoded(again, service.folder / "rest.mp4"), whole[240:])


def test_a_finished_video_is_made_longer_as_if_all_had_been_asked_for(service):
    import openai

    short = service.create(seconds=6, seed=11)
    service.wait(short)
    reference = {"video": {"id": short}}  # which the client takes for a file, where it has an argument for it
    made = service.openai.videos.extend(prompt=OTHER, seconds="2", video=openai.omit, extra_body=reference)
    assert made.seconds == "8"
    service.wait(made.id)
    assert service.get(short)["status"] == "completed"
    assert "chunks" not in service.get(short) and len(service.frames(short)) == 6 * 24
    whole = made_alone(service.folder, chunks=8, seed=11, prompt_at=[f"6s {OTHER}"])
    np.testing.assert_array_equal(service.frames(made.id), whole)


def test_requests_of_one_gang_may_reuse_and_hold_as_they_like(service):
    hows = [{"cache": "none"}, {"cache": "flowcache-fast", "kv_budget": 2}, {"fps": 48}]
    names = [service.create(seconds=4, seed=12, **how) for how in hows]
    for name, how in zip(names, hows, strict=True):
        service.wait(name)
        np.testing.assert_array_equal(service.frames(name), made_alone(service.folder, seconds=4, seed=12, **how))


def test_the_events_of_a_video_tell_each_step_and_its_end(service):
    name = service.create(seconds=3, seed=10)
    kinds, rows = [], []
    with service.client.stream("GET", f"/v1/videos/{name}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                if kinds[-1] == "snapshot":
                    rows = [list(row) for row in data["rows"]]
                elif kinds[-1] == "news":
                    assert 0 < data["kv_fill"] <= 1
                    for chunk, step, mark in data["cells"]:
                        rows[chunk][step] = mark
                elif kinds[-1] == "video":
                    video = data
                elif kinds[-1] == "gangs":
                    assert data[0]["state"] == "up" and len(data[0]["ranks"]) == 2
    assert video["status"] == "completed" and {"news", "snapshot", "gangs", "chunks"} <= set(kinds)
    marks = [mark for row in rows for mark in row]
    assert len(marks) == 3 * 8 and set(marks) <= set("crx") and "c" in marks


def test_many_clients_at_once_lose_nothing(service):
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda seed: service.create(seed=seed), range(16)))
    assert len(set(names)) == 16
    for name in names:
        service.wait(name)
    texts = {service.client.get(f"/v1/videos/{name}/content").content for name in names}
    assert len(texts) == 16


def test_bad_requests_end_no_service_and_nothing_secret_is_said(service):
    """All that no option of the service allows, each without a key too; the other test of them has no process."""
    for name, ((method, path, given), status, _) in BAD.items():
        if status in (400, 404, 405, 415) and "too long" not in name:
            answer = service.client.request(method, path, **given)
            assert 400 <= answer.status_code < 500, (name, answer.text)
            headers = {**given.get("headers", {}), "Authorization": f"Bearer {SECRET}"}
            refused = service.client.request(method, path, **{**given, "headers": headers})
            assert refused.status_code == (404 if path.startswith("/page/") else 401), name  # the page needs no key
    port = service.client.base_url.port
    head = f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 5000\r\n\r\n{{"
    for sent in (head, "GARBAGE\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent.encode())
    service.wait(service.create())
    said = service.said.read_text()
    assert "Traceback" not in said and KEY not in said and SECRET not in said


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


def test_what_cannot_be_served_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, words in ((["--host", "0.0.0.0"], "give an --api-key"), (["--model", "x"], "unknown model")):
        assert run(["serve", *arguments]) == 2
        shown = capsys.readouterr().err
        assert words in shown and shown.count("\n") == 1, shown


def test_without_the_extra_one_line_says_how_to_get_it():
    code = "import sys; sys.modules['fastapi'] = None; from launch.cli import run; sys.exit(run(['serve']))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "pip install 'flowcache-engine[serve]'" in ran.stderr and ran.stderr.count("\n") == 1
    code = "import sys; import launch.cli; sys.exit('fastapi' in sys.modules or 'launch.serve.run' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
