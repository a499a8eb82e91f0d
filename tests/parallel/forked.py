"""Ranks as forks of one process that has imported everything: a gang of a test starts in no time.

`forked(arguments)` is a command like any other. `interpreter()` takes Python's place where a command line is run, once
for each rank, and `ray_workers()` where Ray starts a worker, which imports Ray by itself. Its process knows nothing of
torch: it hands its files, environment and arguments to the server, waits for the rank that is forked there, and ends as
that one has ended. A rank whose command is killed is killed, and signals that may be handled are passed on to it. The
server ends with the tests that have started it.

What a rank is at its start (its imports, its command line, its place among processes) is not tested by such a rank.
"""

import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
_POLL = 0.01
_TOLD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def forked(arguments):
    """The command of a rank that runs `tests.parallel.scenarios` with these arguments."""
    path, _ = _server()
    return [sys.executable, "-I", "-S", __file__, path, *arguments]


@functools.cache
def interpreter():
    """A program that runs `-m launch ...`, scenarios and scripts as Python does, and nothing else."""
    path, _ = _server()
    program = Path(path).with_name("python")
    program.write_text(
        f"#!{sys.executable} -IS\nimport runpy, sys\nsys.argv = [{__file__!r}, {path!r}, *sys.argv[1:]]\n"
        f"runpy.run_path({__file__!r}, run_name='__main__')\n"
    )
    program.chmod(0o700)
    return str(program)


def ray_workers():
    """Variables of a process whose jobs have such ranks as Ray's workers, which are no descendants of the cluster."""
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"py_executable": interpreter()}})}


def forks():
    """The ranks that live at the moment: their numbers."""
    from parallel.health.processes import descendants  # which a rank's command has no use for

    return descendants(_server()[1].pid)


@functools.cache
def _server():
    """The server of this process, which is started now: where it listens, and its process."""
    path = tempfile.mkdtemp(prefix="forks", dir="/tmp") + "/socket"  # a socket needs a short path
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.parallel.forked import serve; serve()", str(listener.fileno())],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # no threads to be forked; each rank is given one
        stdin=subprocess.PIPE,  # which closes when this process ends
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )
    listener.close()
    return path, process


# ---- the command


def _stand_in(path, arguments):
    """Have a rank forked, and end as it does."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(asked).encode() + b"\n")
        for number in _TOLD:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        status = int(server.makefile().readline())
    if status < 0:
        if -status in _TOLD:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# ---- the server


def serve():
    """Fork a rank for every command that asks, until the process that has started this one has ended."""
    listener, ranks = socket.socket(fileno=int(sys.argv[1])), {}
    run = _runner(Path(listener.getsockname()).with_name("python"))
    while True:
        ready, _, _ = select.select([sys.stdin, listener, *ranks], [], [], _POLL if ranks else None)
        if sys.stdin in ready:
            break
        if listener in ready:
            connection, _ = listener.accept()
            ranks[connection] = _fork(connection, run)
        for connection in ranks.keys() & set(ready):  # a command says what it was told, and nothing if it was killed
            for number in connection.recv(100) or [signal.SIGKILL]:
                os.kill(ranks[connection], number)
        for connection, pid in list(ranks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with suppress(BrokenPipeError):
                    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                connection.close()
                del ranks[connection]
    for pid in ranks.values():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(Path(listener.getsockname()).parent)


def _runner(program):
    """What runs a rank by its arguments; all that it needs is imported. A command starts its ranks by `program`."""
    import launch.conformance.command  # noqa: F401 - which one scenario imports by itself
    import launch.generate  # noqa: F401 - which the command line imports when it is called
    from launch.__main__ import main as command_line
    from tests.parallel.scenarios.__main__ import main as scenario

    def run():
        if sys.argv[1] == "-u":  # of torchrun
            del sys.argv[1]
        if sys.argv[1:3] == ["-m", "launch"]:
            sys.executable = str(program)
            del sys.argv[1:3]
            command_line()
        elif sys.argv[1].endswith(".py"):  # of Ray
            del sys.argv[0]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            if sys.argv[1] == "-m":
                del sys.argv[1:3]
            scenario()

    return run


def _fork(connection, run):
    """Start a process that is as the command at the other end was to be, and return its number."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    asked = connection.makefile().readline()
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        return pid
    try:
        os.setpgid(0, 0)  # Ray ends a worker with its whole group
        asked = json.loads(asked)
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        sys.argv[1:] = asked["arguments"]
        run()
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as ended:
        os._exit(ended.code or 0)
    finally:  # an error: the server's own frames are not for this process
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    _stand_in(sys.argv[1], sys.argv[2:])
