"""Runs an image from its root file system, as a container would, and reports what it sees:
`run_image.py ROOT CONFIG PIP_CONF VOLUME...`.

ROOT is the mounted image, CONFIG what `buildah inspect` says of it, PIP_CONF and the volumes (`--volume FROM:TO:ro`)
those of the build: the model comes through pip. The server is started with the image's own user, environment, folder
and command, as process 1 of a namespace of its own with a network of its own (nothing but loopback), so this also shows
that a server with a filled cache needs no network. Linux, root. Ends with an AssertionError at the first thing that is
not as it should be.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

LIMIT_GB = 1.5
"""Largest size of the CPU variant, in 10^9 bytes."""
PORT = 8000
MODEL = "smollm2-135m"
STREAM_TOKENS = 150
START_SECONDS = 300
CLONE_NEWNET = 0x40000000
"""From Linux' <sched.h>."""
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ld", "as", "make")


def size_of(root: Path) -> int:
    """Bytes of all files below, each hard-linked file once, as they are on disk."""
    command = ["du", "--summarize", "--one-file-system", "--block-size=1", str(root)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])


class Container:
    """The image at `root` with the settings of its configuration, and folders of this machine bound into it."""

    def __init__(self, root: Path, config: dict[str, Any], binds: dict[str, str]) -> None:
        self.root, self.config, self.binds = root, config, binds

    def command(self, *words: str, network: bool = False, environment: dict[str, str] | None = None) -> list[str]:
        """`words` inside the image, as process 1 of new namespaces: by its user, in its folder, with its variables."""
        variables = dict(pair.split("=", 1) for pair in self.config["Env"]) | (environment or {})
        inside = ["chroot", f"--userspec={self.config['User']}", str(self.root)]
        inside += ["/usr/bin/env", "--ignore-environment", f"--chdir={self.config['WorkingDir']}"]
        inside += [f"{name}={value}" for name, value in variables.items()] + list(words)
        mounts = [f"mount --bind {source} {self.root}{target}" for target, source in self.binds.items()]
        mounts += [f"mount -t proc proc {self.root}/proc", f"mount --rbind /dev {self.root}/dev"]
        setup = [*mounts, *([] if network else ["ip link set lo up"]), 'exec "$@"']
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"] + ([] if network else ["--net"])
        return [*unshare, "bash", "-ec", "\n".join(setup), "bash", *inside]

    def run(self, *words: str, network: bool = False, environment: dict[str, str] | None = None) -> str:
        command = self.command(*words, network=network, environment=environment)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()


def bind_targets(root: Path, volumes: list[str], work: Path, pip_conf: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return what is bound into the image, by its path there: the build's volumes, pip's settings, and an empty folder,
    made here, for each of the image's own volumes."""
    binds = {"/etc/pip.conf": str(pip_conf), "/etc/resolv.conf": "/etc/resolv.conf"}
    for volume in volumes:
        if volume != "--volume":
            source, target, _ = volume.split(":")
            binds[target] = source
    uid, gid = (int(part) for part in config["User"].split(":"))
    for number, target in enumerate(config["Volumes"]):
        folder = work / f"volume{number}"
        folder.mkdir()
        os.chown(folder, uid, gid)
        binds[target] = str(folder)
    for target, source in binds.items():
        place = Path(f"{root}{target}")
        if Path(source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    return binds


class Server:
    """The image's own command, running; this process then looks at the network from inside of its namespace."""

    def __init__(self, container: Container, log: Path) -> None:
        config = container.config
        self.log = log
        with log.open("wb") as output:
            self.outer = subprocess.Popen(
                container.command(*config["Entrypoint"], *config["Cmd"]), stdout=output, stderr=output
            )
        self.pid = self._process_one()
        with open(f"/proc/{self.pid}/ns/net") as namespace:  # os.setns needs Python 3.12
            assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) == 0, ctypes.get_errno()

    def _process_one(self) -> int:
        """The process that unshare started: process 1 in there."""
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children")
        deadline = time.monotonic() + 10
        while True:
            found = children.read_text().split()
            if found and os.readlink(f"/proc/{found[0]}/ns/net") != os.readlink("/proc/self/ns/net"):
                return int(found[0])
            assert self.outer.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def wait_until_ready(self) -> float:
        """Seconds since the start of waiting."""
        begun = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ready", timeout=5):
                    return time.monotonic() - begun
            except OSError:
                pass
            assert self.outer.poll() is None, self.log.read_text()
            assert time.monotonic() - begun < START_SECONDS, self.log.read_text()
            time.sleep(0.2)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The open response of a POST."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=120)


def stream(server: Server, started: threading.Event, chunks: list[dict[str, Any]]) -> None:
    """Reads a long completion; `started` is set once its first text has come. [DONE] is {"done": True}."""
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": STREAM_TOKENS, "ignore_eos": True}
    with server.post("/v1/completions", body | {"stream": True, "temperature": 0}) as response:
        for line in response:
            if line.startswith(b"data: "):
                data = line[6:].strip()
                chunks.append({"done": True} if data == b"[DONE]" else json.loads(data))
                started.set()


def main(root: Path, config_file: Path, pip_conf: Path, volumes: list[str]) -> None:
    config = json.loads(config_file.read_text())["Docker"]["config"]
    size = size_of(root)
    print(f"size: {size / 1e9:.2f} GB of files (limit {LIMIT_GB:.2f})")
    assert size < LIMIT_GB * 1e9
    found = [
        name for name in COMPILERS for place in ("bin", "usr/bin", "usr/local/bin") if (root / place / name).exists()
    ]
    assert not found, f"compilers in the image: {found}"
    print("compilers: none")
    assert config["User"].split(":")[0] not in ("", "0", "root"), config["User"]
    print(f"user: {config['User']}, command: {' '.join([*config['Entrypoint'], *config['Cmd']])}")
    print(f"volumes: {', '.join(config['Volumes'])}; health check: {' '.join(config['Healthcheck']['Test'])}")

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        work.chmod(0o755)
        container = Container(root, config, bind_targets(root, volumes, work, pip_conf, config))
        print(container.run("pilotfish", "--version"))
        print(f"python: {container.run('python', '--version')}, torch: "
              + container.run("python", "-c", "import torch; print(torch.__version__)"))  # fmt: skip
        kernels = "from pilotfish.engine.kernels import native; print('native' if native.load_library() else 'torch')"
        kernels = container.run("python", "-c", kernels)
        print(f"kernels: {kernels}")
        assert kernels == "native"
        assert container.run("id", "-u") == config["User"].split(":")[0]
        resolve = f"from pilotfish.checkpoints.catalog import resolve; print(resolve({MODEL!r}).path.name)"
        print(f"model: downloaded into the volume, {container.run('python', '-c', resolve, network=True)}")

        server = Server(container, work / "server.log")
        try:
            check(server, container)
        except BaseException:
            print(server.log.read_text(), file=sys.stderr)
            raise
        finally:
            if server.outer.poll() is None:
                server.outer.kill()
    print("all is as it should be")


def check(server: Server, container: Container) -> None:
    """A completion, the health check, and a drain."""
    print(f"ready: after {server.wait_until_ready():.1f} s, without a network")
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    with server.post("/v1/completions", body) as response:
        print(f"completion: {json.load(response)['choices'][0]['text']!r}")
    probe = ["nsenter", f"--target={server.pid}", "--net", "--mount", "--pid", "--root", "--wd", "/usr/bin/env", "-i"]
    probe += [*container.config["Env"], *container.config["Healthcheck"]["Test"][1:]]
    health = subprocess.run(probe, capture_output=True, text=True)
    assert health.returncode == 0, health.stdout + health.stderr
    print(f"health check: status 0, {health.stdout.strip()}")

    started, chunks = threading.Event(), []
    reader = threading.Thread(target=stream, args=(server, started, chunks))
    reader.start()
    assert started.wait(60), "the stream did not begin"
    had = len(chunks)
    os.kill(server.pid, signal.SIGTERM)
    begun = time.monotonic()
    status = server.outer.wait(60)
    seconds = time.monotonic() - begun
    reader.join(10)
    assert chunks[-1:] == [{"done": True}], chunks[-3:]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk.get("choices", ())]
    assert reasons[-1] == "length", reasons[-1]
    assert len(chunks) > had + 5, f"all but {len(chunks) - had} chunks had come before SIGTERM: nothing was drained"
    assert status == 0, status
    print(f"SIGTERM: the running stream was finished ({len(chunks) - had} of its {len(chunks)} events came after it); "
          f"status {status} after {seconds:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
