"""Does the service bear many clients, and slow ones? Starts `flowcache serve` on this machine and asks it for videos.

    python -m benchmarks.service --out results/service
    python -m benchmarks.service --requests 12 --clients 4 --readers 3 --rounds 1 --seconds 2 --out /tmp/service

First many clients at once: no request may be lost or made twice, they are to be made by priority and age, and the
memory of all processes may not grow. Then slow readers of one stream, which may not slow the video down.

Exit status 0 if all is so, 1 if not, 2 for bad input.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import Out, Row, machine_line, new_log, output_folder, publish, run_command, save_text
from benchmarks.service.client import running
from benchmarks.service.load import run_load
from benchmarks.service.readers import run_readers
from models.errors import InputError

_NOTES = """\
Every request has a seed of its own, so its frames are no other's. Begun before a better one: requests that a gang began
though one of a higher priority, or of the same and older, had been waiting for a second. The scheduler takes one in
eight for its age alone. Memory is that of all processes, what they share counted once, when nothing has been under way
for some seconds. Videos with readers and without take turns in an order that is drawn."""


def run(
    requests: Annotated[int, typer.Option(min=2, help="Requests, of a second of video each.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Clients that send them at once.")] = 20,
    readers: Annotated[int, typer.Option(min=1, help="Slow readers of one stream.")] = 20,
    rounds: Annotated[int, typer.Option(min=0, help="Pairs of videos with and without readers.")] = 9,
    seconds: Annotated[int, typer.Option(min=1, max=60, help="Length of these videos.")] = 20,
    gangs: Annotated[int, typer.Option(min=1, help="Gangs of the service.")] = 2,
    pp: Annotated[int, typer.Option(min=1, help="Stages of a gang.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of priorities, and of the order within a pair.")] = 0,
    out: Out = Path("results/service"),
) -> int:
    """Measure the service."""
    if requests < 2 * clients:
        raise InputError(f"--requests {requests}: give each of {clients} clients two or more")
    output_folder(out)
    log = new_log()
    with tempfile.TemporaryDirectory(prefix="service-") as name:
        log("starting the service")
        with running(Path(name), gangs, "--pp", str(pp)) as service:
            service.wait_up()
            log(f"{requests} requests of {clients} clients")
            load = run_load(service, requests, clients, gangs, seed)
            log(f"{rounds} pairs of videos of {seconds} s, with {readers} slow readers and without")
            slow = run_readers(service, readers, rounds, seconds, seed) if rounds else None
    verdicts, rows = [*load.verdicts, *(slow.verdicts if slow else ())], slow.rows if slow else []
    data: list[Row] = [asdict(one) for one in verdicts]
    save_text(out / "service.json", json.dumps({"verdicts": data, "load": asdict(load), "readers": rows}, indent=1))
    return publish(
        out,
        "service",
        title="The service with many clients",
        about=f"{gangs} gangs of pp {pp} of magi-pocket. {machine_line()}; one thread per rank.\n\n{_NOTES}",
        verdicts=verdicts,
        sections={"Requests": load.rows, "Readers": rows},
        data=data,
    )


if __name__ == "__main__":
    sys.exit(run_command(run, "service"))
