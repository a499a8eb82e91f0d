"""The service as an application of Ray Serve, so that a RayService of KubeRay starts and watches it. Needs `rayserve`.

Its one replica, on the head, has `flowcache serve` run as a process of its own, which joins the same cluster: that
wants a main thread and signals. Requests go to the port of that process, and none through Ray Serve.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import ray
from ray import serve

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_END_SECONDS = 30.0  # for the service to end by itself
_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}  # the name that Ray has for its node


class FlowcacheServe:
    """Runs the command with these options. Ray Serve replaces a replica whose command has ended."""

    def __init__(self, options: str) -> None:
        self._command = [sys.executable, "-m", "launch", "serve", *shlex.split(options)]
        self._environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flowcache serve", daemon=True)
        self._thread.start()
        self._begun.wait()

    def _run(self) -> None:
        """On a thread that lives as long: the kernel ends the command when that thread, or its process, is gone."""
        told = partial(ctypes.CDLL(None).prctl, _DEATH_SIGNAL, int(signal.SIGTERM))
        try:
            self._process = subprocess.Popen(self._command, env=self._environment, preexec_fn=told)
        finally:
            self._begun.set()
        self._process.wait()

    def check_health(self) -> None:
        """A RuntimeError says that the command has ended."""
        if not self._thread.is_alive():
            status = None if self._process is None else self._process.returncode
            raise RuntimeError(
                f"flowcache serve has ended with status {status}; what it said is in the log of this replica"
            )

    def __call__(self) -> str:
        """What Ray Serve's own port answers."""
        return "flowcache serve listens at a port of its own"

    def __del__(self) -> None:
        if (process := self._process) is not None and process.poll() is None:
            process.terminate()
            self._thread.join(_END_SECONDS)


def build(args: dict[str, str]) -> serve.Application:
    """The application, with the `options` of the command in its `args`."""
    deployed: Any = serve.deployment(num_replicas=1, ray_actor_options=_HEAD, health_check_period_s=2)(FlowcacheServe)
    application: serve.Application = deployed.bind(args["options"])
    return application
