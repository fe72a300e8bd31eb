"""A divided model behind the real server: whichever process ends or stops, the others end too, whoever waits for an
answer is told so, and the log says which it was. Two hosts on one: as two commands, over loopback."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from pilotfish.engine.child_process import environment
from tests.support.ports import free_port
from tests.support.running_server import MODEL, RunningServer

pytestmark = pytest.mark.process

FLAGS = ("--kv-cache-memory", "16MiB", "--num-threads", "1", "--drafter", "ngram", "--rank-timeout", "3")
NO_RESTARTS = ("--engine-restarts", "0")
ENDLESS: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
SHORT: dict[str, Any] = {"model": MODEL, "prompt": "The sea", "max_tokens": 16, "temperature": 0, "seed": 1}


@pytest.fixture
def divided(tiny_llama: Path, tmp_path: Path) -> Iterator[RunningServer]:
    flags = ("--model", str(tiny_llama), "--tensor-parallel-size", "2", *FLAGS, *NO_RESTARTS)
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    running = RunningServer(tmp_path / "log", *flags, variables={"TMPDIR": str(sockets)})
    try:
        running.wait_for("/ready", 200)
        processes = [running.engine, worker_of(running)]
        yield running
        wait_until_gone(*processes)
        running.stop()
        assert not list(sockets.glob("pilotfish-*"))
    finally:
        running.stop()


def worker_of(running: RunningServer) -> psutil.Process:
    """The process of rank 1."""
    (worker,) = running.engine.children()
    return worker


def wait_until_gone(*processes: psutil.Process) -> None:
    _, left = psutil.wait_procs(processes, timeout=20)
    assert not left


def end_while_an_answer_runs(running: RunningServer, process: psutil.Process, number: int) -> str:
    """Returns what the log says of it. Two answers are running, one of them streamed: both clients are told that the
    engine has ended, and nothing of its processes."""
    told: list[str] = []
    with running.client() as client:

        def wait() -> None:
            try:
                client.completions.create(**ENDLESS)
            except openai.APIError as error:
                told.append(error.message)

        waiting = threading.Thread(target=wait)
        waiting.start()
        stream = client.completions.create(**ENDLESS, stream=True)
        next(iter(stream))
        running.wait_until(lambda: running.metric("pilotfish_sequences_running") == 2)
        process.send_signal(number)
        with pytest.raises(openai.APIError) as broken:
            list(stream)
        waiting.join(30)
    (other,) = told
    assert "The engine has ended" in other
    assert broken.value.code == "engine_dead"
    assert broken.value.message in other
    for inner in (socket.gethostname(), str(process.pid), "rank"):
        assert inner not in other
    return running.log.read_text()


def test_metrics_tell_of_every_rank(divided: RunningServer) -> None:
    with divided.client() as client:
        assert client.completions.create(**SHORT).usage.completion_tokens > 0
    for rank in (0, 1):
        assert divided.metric(f'pilotfish_rank_memory_bytes{{kind="resident",rank="{rank}"}}') > 10_000_000
    assert 'tensor_parallel_size="2"' in divided.http.get("/metrics").text
    divided.stop()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "rank 1 (pid {pid}, {host}) was ended by SIGKILL"),
        (signal.SIGSTOP, "rank 1 (pid {pid}, {host}) was silent for 3 s"),
    ],
)
def test_a_rank_that_ends_or_stops_is_named_in_the_log(divided: RunningServer, number: int, said: str) -> None:
    worker = worker_of(divided)
    message = end_while_an_answer_runs(divided, worker, number)
    assert said.format(pid=worker.pid, host=socket.gethostname()) in message
    assert divided.status("/health") == 503


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "the engine process was ended by SIGKILL"),
        (signal.SIGSTOP, "rank 0 (the engine process, pid {pid} on {host}) was silent for"),
    ],
)
def test_so_is_rank_0(divided: RunningServer, number: int, said: str) -> None:
    engine = divided.engine
    message = end_while_an_answer_runs(divided, engine, number)
    assert said.format(pid=engine.pid, host=socket.gethostname()) in message


def test_a_server_that_is_killed_leaves_no_rank(divided: RunningServer) -> None:
    processes = [divided.engine, worker_of(divided)]
    divided.process.kill()
    divided.process.wait()
    wait_until_gone(*processes)


def test_a_rank_that_ends_while_the_server_is_idle_ends_the_engine(divided: RunningServer) -> None:
    """Its main thread sleeps, and does not hear of it: another has to say so."""
    worker_of(divided).kill()
    divided.wait_for("/health", 503)
    with divided.client() as client, pytest.raises(openai.APIError, match="The engine has ended"):
        client.completions.create(**SHORT)
    assert re.search(r"the engine has ended: rank 1 \(pid .* was ended by SIGKILL", divided.log.read_text())


def test_a_rank_that_is_killed_brings_the_engine_down_and_up(tiny_llama: Path, tmp_path: Path) -> None:
    running = RunningServer(tmp_path / "log", "--model", str(tiny_llama), "--tensor-parallel-size", "2", *FLAGS)
    try:
        running.wait_for("/ready", 200)
        old = [running.engine, worker_of(running)]
        with running.client() as client:
            before = client.completions.create(**SHORT).choices[0].text
            stream = client.completions.create(**ENDLESS, stream=True)
            next(iter(stream))
            worker_of(running).kill()
            with pytest.raises(openai.APIError) as broken:
                list(stream)
            assert broken.value.code == "engine_restarting"
            assert running.status("/health") == 200
            running.wait_for("/ready", 200)
            assert client.completions.create(**SHORT).choices[0].text == before
        wait_until_gone(*old)
        assert worker_of(running).is_running()
        assert running.metric("pilotfish_engine_restarts_total") == 1
    finally:
        running.stop()


# Two hosts.


class Hosts:
    """Two nodes on this machine, one rank each."""

    def __init__(self, tiny_llama: Path, folder: Path, *other: str) -> None:
        flags = ["--model", str(tiny_llama), *FLAGS, "--tensor-parallel-size", "2", "--nnodes", "2"]
        flags += ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
        self.log = folder / "node1"
        command = [sys.executable, "-m", "pilotfish.server.cli.main", "serve", *flags, *other, "--node-rank", "1"]
        with self.log.open("wb") as output:
            self.second = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
        self.first = RunningServer(folder / "node0", *flags, *NO_RESTARTS)

    @property
    def worker(self) -> psutil.Process:
        (child,) = psutil.Process(self.second.pid).children()
        return child

    def stop(self) -> None:
        self.first.stop()
        if self.second.poll() is None:
            self.second.kill()
            self.second.wait()


@pytest.fixture
def hosts(tiny_llama: Path, tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tiny_llama, tmp_path)
    try:
        made.first.wait_for("/ready", 200)
        worker = made.worker
        yield made
        wait_until_gone(worker)
    finally:
        made.stop()


def test_two_hosts_say_what_one_says_and_end_together(hosts: Hosts, server: RunningServer) -> None:
    with hosts.first.client() as client, server.client() as alone:
        assert client.completions.create(**SHORT).choices[0].text == alone.completions.create(**SHORT).choices[0].text
    hosts.first.process.terminate()
    assert hosts.first.process.wait(20) == 0
    assert hosts.second.wait(20) == 0
    assert "node 1 (ranks 1): the engine was stopped" in hosts.log.read_text()


def test_a_rank_of_another_host_is_named_with_what_happened_to_it(hosts: Hosts) -> None:
    worker = hosts.worker
    message = end_while_an_answer_runs(hosts.first, worker, signal.SIGKILL)
    assert f"rank 1 (pid {worker.pid}, {socket.gethostname()}) was ended by SIGKILL" in message
    assert hosts.second.wait(20) == 1
    assert "was ended by SIGKILL" in hosts.log.read_text()


def test_a_host_whose_command_differs_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    hosts = Hosts(tiny_llama, tmp_path, "--max-num-seqs", "3")
    try:
        assert hosts.first.process.wait(60) == 1
        said = "max_num_seqs is 3 there and 0 on rank 0; start the same command on each host, but for node_rank"
        assert said in hosts.first.log.read_text()
        assert hosts.second.wait(20) == 1
        assert said in hosts.log.read_text()
    finally:
        hosts.stop()


def test_a_node_0_that_is_no_host_is_refused(tiny_llama: Path) -> None:
    flags = [
        "--model",
        str(tiny_llama),
        "--tensor-parallel-size",
        "2",
        "--nnodes",
        "2",
        "--master-addr",
        "no-host.test",
    ]
    for rank in ("0", "1"):
        command = [
            sys.executable,
            "-m",
            "pilotfish.server.cli.main",
            "serve",
            *flags,
            "--node-rank",
            rank,
            "--port",
            "0",
        ]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == (2 if rank == "1" else 1)
        assert "master_addr is 'no-host.test', which has no address here" in done.stderr
