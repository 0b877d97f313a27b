"""A Ray cluster of one's own beside whatever else runs on the machine: own ports, own folder, ended by its own pid."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray.util import get_node_ip_address

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).parent / "ray")


def wait_for(condition: Callable[[], Any], seconds: float = 200) -> Any:
    """What `condition` returns once it is true.

    Raises:
        AssertionError: it was not in time.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


class Job:
    """One command at work.

    Args:
        env: all of its environment.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]):
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=self.said, stderr=subprocess.STDOUT)

    def output(self) -> str:
        """What it printed so far."""
        # Opened anew: the command writes where this file's own position is.
        return Path(f"/proc/self/fd/{self.said.fileno()}").read_text()

    def end(self, timeout_s: float = 600) -> int:
        """Its exit code."""
        return self.process.wait(timeout=timeout_s)

    def children(self, needle: str) -> list[psutil.Process]:
        """See `children`."""
        return children(self.process.pid, needle)

    def kill(self) -> None:
        """kill -9 of it and of all that it started."""
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for one in [*root.children(recursive=True), root]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.wait()


def children(pid: int, needle: str) -> list[psutil.Process]:
    """Ray processes below `pid` whose title holds `needle`."""
    found: list[psutil.Process] = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if needle in " ".join(process.cmdline()):
                found.append(process)
    return found


@dataclass(frozen=True)
class Cluster:
    """Where it is.

    Attributes:
        address: host:port of its GCS.
        jobs: address of its job server.
        env: environment of programs that use it.
    """

    address: str
    jobs: str
    env: dict[str, str]

    def ray(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run Ray's command line against this cluster."""
        return subprocess.run([RAY, *argv], env=self.env, capture_output=True, text=True, timeout=600)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def ray_cluster(
    *options: str, env: dict[str, str] | None = None, before: Callable[[str], None] = lambda _: None
) -> Generator[Cluster]:
    """`ray start --head --block` with these options; its processes end with the block.

    Args:
        before: told the address of the GCS before it starts.
    """
    port, dashboard, client, agent = free_ports(4)
    folder = tempfile.mkdtemp(prefix="berth-ray-")  # short: paths of Unix sockets have at most 107 bytes
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    own |= {"RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"} | (env or {})
    argv = [RAY, "start", "--head", "--block", f"--port={port}", f"--temp-dir={folder}"]
    argv += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    argv += [f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats", *options]
    address = f"{get_node_ip_address()}:{port}"
    cluster = Cluster(address, f"http://127.0.0.1:{dashboard}", own | {"RAY_ADDRESS": address})
    before(cluster.address)
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(argv, env=own, stdout=said, stderr=subprocess.STDOUT) as process,
    ):
        try:
            wait_for(lambda: process.poll() is not None or listening(dashboard), 120)
            yield cluster
            assert process.poll() is None, "the cluster ended by itself"
        except BaseException:
            said.seek(0)
            sys.stderr.write(said.read())
            raise
        finally:
            process.terminate()
            process.wait(timeout=60)
            shutil.rmtree(folder, ignore_errors=True)


def listening(port: int) -> bool:
    """Whether something answers on a port of this machine."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
