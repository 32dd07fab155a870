"""Python scripts and modules in forks of a process that has imported our packages."""

import json
import multiprocessing
import os
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

#: What a fork finds imported, where it is installed: commands, and what figures and the app take.
#: Not huggingface_hub, which reads environment variables when it is imported.
PRELOADED = ["agents.train_ppo", "adaptation.train", "matplotlib.figure", "fastapi", "socketio"]

#: What a fork does: all that `python script arguments` does but the imports.
RUN_SCRIPT = """
import os, runpy, sys, numpy, torch

for number, file in enumerate(files):
    os.dup2(file.fileno(), number)
    file.close()
# Those of before have noted what kinds of files they are.
# Lines are written at once: tests read what a process has printed before it was killed.
sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", 1, closefd=False)
sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)
sys.executable = executable
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
numpy.random.seed()
torch.seed()
if "OMP_NUM_THREADS" in environment:
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
sys.argv = [script, *arguments]
if script.endswith(".py"):
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")
else:
    runpy.run_module(script, run_name="__main__", alter_sys=True)
"""

#: An executable in place of Python: it hands its command over and ends as the fork does.
LAUNCHER = """#!{python} -IS
import json, os, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"."], [0, 1, 2])
given = {{"folder": os.getcwd(), "environment": dict(os.environ), "command": sys.argv[1:]}}
server.sendall(json.dumps(given).encode() + b"\\n")
status = int(server.makefile().readline())
if status < 0:
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def fork(
    script: str,
    arguments: Sequence[str],
    files: Sequence[int],
    environment: dict[str, str],
    folder: str,
    executable: str = sys.executable,
) -> multiprocessing.process.BaseProcess:
    """Run a Python script or module in a fork of a process that has imported our packages.

    Args:
        script: path of a script (.py), or name of a module.
        arguments: its arguments.
        files: descriptors of its input, output and errors; they are closed here.
        environment: its environment variables.
        folder: its working directory.
        executable: what it finds as `sys.executable`.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    # Connections can be sent to a process.
    given = {"script": script, "arguments": arguments, "files": [Connection(own) for own in files]}
    given |= {"environment": environment, "folder": folder, "executable": executable}
    # NiceGUI runs in main processes only.
    process = server.Process(target=exec, args=(RUN_SCRIPT, given), name="MainProcess")
    process.start()
    for file in given["files"]:
        file.close()
    return process


class Script:
    """A Python script or module in a process of its own; what it prints goes into a folder.

    The process is a fork of one that has imported our packages, which takes seconds.
    """

    def __init__(self, outputs: Path, script: str, *arguments: str, **variables: str) -> None:
        self.script, self.outputs = script, [outputs / "stdout", outputs / "stderr"]
        files = [os.open(os.devnull, os.O_RDONLY)]
        files += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in self.outputs]
        self.process = fork(script, arguments, files, os.environ | variables, os.getcwd())

    def printed(self) -> str:
        """Return what it has printed so far."""
        return self.outputs[0].read_text()

    def finish(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Wait for its end; returns its status and what it has printed."""
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            raise TimeoutError(f"{self.process} goes on after {timeout} seconds: {self.printed()}")
        printed = [path.read_text() for path in self.outputs]
        return subprocess.CompletedProcess(self.script, status, *printed)


class Launches(socketserver.StreamRequestHandler):
    """Forks for one launcher, and ends the fork if the launcher is ended."""

    def handle(self) -> None:
        _, files, *_ = socket.recv_fds(self.connection, 1, 3)
        given = json.loads(self.rfile.readline())
        script, *arguments = given["command"][given["command"][0] == "-m" :]
        process = fork(
            script, arguments, files, given["environment"], given["folder"], self.server.launcher
        )
        if process.sentinel not in wait([process.sentinel, self.connection]):
            process.kill()
        process.join()
        with suppress(BrokenPipeError):
            self.wfile.write(f"{process.exitcode}\n".encode())


@pytest.fixture(scope="session")
def forking_python() -> Iterator[str]:
    """An executable in place of Python that takes `SCRIPT.py ...` or `-m MODULE ...`.

    Commands that start processes of `sys.executable` can be tested with it in less time. It has
    imported our packages: where another PYTHONPATH is what is tested, take the real one.
    """
    # Not in pytest's folders: names of sockets are short.
    with tempfile.TemporaryDirectory() as folder:
        address, launcher = os.path.join(folder, "socket"), Path(folder) / "python"
        launcher.write_text(LAUNCHER.format(python=sys.executable, address=address))
        launcher.chmod(0o755)
        with socketserver.ThreadingUnixStreamServer(address, Launches) as server:
            server.launcher = str(launcher)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server.launcher
            server.shutdown()


@pytest.fixture(scope="session")
def start_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Script]:
    """Starts a script or module with arguments, and with environment variables as keywords."""
    return lambda *given, **variables: Script(tmp_path_factory.mktemp("out"), *given, **variables)
