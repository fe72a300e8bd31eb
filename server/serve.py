"""Runs the server: model files, the port, the engine, uvicorn, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import uvicorn

from pilotfish import __version__, logs
from pilotfish.checkpoints.catalog import ModelFiles, resolve
from pilotfish.engine.config import EngineConfig
from pilotfish.engine.process.supervisor import EngineEvents, RestartPolicy, SupervisedEngine
from pilotfish.engine.ranks.node import run_node
from pilotfish.engine.speculation.drafters.registry import check_speculation, find
from pilotfish.errors import ConfigError, EngineDeadError
from pilotfish.logs import Logs
from pilotfish.server.admission import Gate
from pilotfish.server.app import create_app
from pilotfish.server.config import ServerConfig
from pilotfish.server.connections import SEND_BUFFER, ConnectionLimits, most_connections
from pilotfish.server.console import Console
from pilotfish.server.http_protocol import LimitedProtocol
from pilotfish.server.metrics import Metrics
from pilotfish.server.telemetry.tracing import Tracing, open_tracing
from pilotfish.text.template_process import fault_of
from pilotfish.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
CLOSE_SECONDS = 5
"""Time for connections to close after the last answer has been written."""
SWITCH_SECONDS = 0.001
"""How long another thread may run while the event loop waits for its turn; Python's own 5 ms show in streams."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(engine_config: EngineConfig, config: ServerConfig, console: Console) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the process's exit status: 0 after a drain, 1 if the engine could not
    start, 128 plus the signal's number if a second signal cut the drain short. On nodes other than 0: `run_node`'s.

    Raises ConfigError or ModelError for wrong settings or model files, before anything is started.
    """
    engine_config.check()
    config.check()
    console.line(f"Pilotfish {__version__}")
    weights = engine_config.load_format != "dummy"
    if engine_config.node_rank:
        return _hold_ranks(engine_config, console, weights)
    template = _read_template(config.chat_template)
    tracing = open_tracing(config.otlp_endpoint)
    with _bound(config) as listener:
        files = resolve(engine_config.model, console.progress, weights)
        check_speculation(engine_config.speculation, find(engine_config.drafter, files.name, console.progress))
        run = _Run(engine_config, config, console, files, template, tracing)
        sys.setswitchinterval(SWITCH_SECONDS)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(run.run(listener))


def _hold_ranks(config: EngineConfig, console: Console, weights: bool) -> int:
    """Run a node other than 0, which needs neither HTTP nor a tokenizer."""
    files = resolve(config.model, console.progress, weights)
    if config.draft_tensor_parallel_size > 1:
        find(config.drafter, files.name, console.progress, config.suffix_memory > 0)
    console.line(f"Node {config.node_rank} of {config.nnodes}: holds ranks of {files.name}, node 0 serves it")
    return run_node(config)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would close the port before the last answers are written."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Run:
    """One run of the server, from its start to its exit status."""

    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        console: Console,
        files: ModelFiles,
        chat_template: str | None,
        tracing: Tracing | None,
    ) -> None:
        self._config = config
        self._console = console
        self._files = files
        self._names = config.served_model_name or (files.name,)
        self._chat_template = chat_template
        self._tracing = tracing
        self._metrics = Metrics(self._names[0] if config.vllm_metrics else None)
        events = EngineEvents(
            stats=self._metrics.step,
            loading=console.progress,
            ready=self._metrics.ready,
            restarting=self._metrics.restarting,
            replayed=self._metrics.replayed,
        )
        policy = RestartPolicy(config.engine_restarts, config.engine_restart_window)
        self._engine = SupervisedEngine(engine_config, policy, events, logs=logs_of(config))
        self._server: _Server | None = None
        self._gate: Gate | None = None
        self._asked = asyncio.Event()
        """Set when the server has been asked to stop."""
        self._forced = False
        self._status = 0

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            self._console.progress("starting the engine", 0.0)
            await self._engine.start()  # it loads while the tokenizer does
            tokenizer = await asyncio.to_thread(self._load_tokenizer)
            with contextlib.closing(tokenizer):
                if not self._asked.is_set():
                    await self._serve(tokenizer, listener)
        finally:
            await self._engine.stop()
            if self._tracing is not None and not self._forced:
                await asyncio.to_thread(self._tracing.close)
        return self._status

    def _load_tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self._files)
        if self._chat_template is not None:
            tokenizer.chat_template = self._chat_template
        elif tokenizer.chat_template is not None and (fault := fault_of(tokenizer.chat_template)) is not None:
            logger.warning(
                "the chat template of %s is wrong (%s), and chat requests will be refused: give another with "
                "--chat-template",
                self._files.name,
                fault,
            )
        tokenizer.isolate_templates()
        return tokenizer

    async def _serve(self, tokenizer: Tokenizer, listener: socket.socket) -> None:
        app = create_app(self._engine, tokenizer, self._config, self._metrics, self._names, self._tracing)
        self._gate = app.state.service.gate
        if self._config.api_key_file is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, app.state.keys.reload)
        most, patience = most_connections(self._config.max_connections), self._config.client_timeout
        limits = ConnectionLimits(most, patience, KEEP_ALIVE_SECONDS, self._metrics.connection_ended)
        uvicorn_config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # server.telemetry.request_log logs more
            http=partial(LimitedProtocol, limits=limits),  # type: ignore[arg-type]  # it is only called
            ws="none",
            lifespan="on",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            backlog=2048,
        )
        self._server = _Server(uvicorn_config)
        self._metrics.watch_connections(lambda: len(self._server.server_state.connections) if self._server else 0)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        announcement = asyncio.create_task(self._announce(url))
        drain = asyncio.create_task(self._drain_when_asked())
        try:
            with app.state.service.reclaimer.collecting():
                await self._server.serve(sockets=[listener])
        finally:
            for task in (announcement, drain):
                task.cancel()
            await asyncio.gather(announcement, drain, return_exceptions=True)

    async def _announce(self, url: str) -> None:
        """Wait for the engine and announce that it is ready. Ends the server if the engine cannot start."""
        try:
            info = await self._engine.wait_ready()
        except EngineDeadError as error:
            if not self._asked.is_set():
                self._console.error(f"pilotfish: the engine could not start: {error}")
                self._status = 1
                assert self._server is not None
                self._server.should_exit = True
            return
        needs_key = bool(self._config.api_key or self._config.api_key_file)
        self._console.ready(info, url, self._names[0], needs_key, self._config.page)

    def _on_signal(self, number: int) -> None:
        """The first signal asks for a graceful shutdown, the second for an immediate one."""
        if self._gate is not None:
            self._gate.close()  # from here on /ready and new requests are answered with 503
        if not self._asked.is_set():
            self._asked.set()
            return
        self._console.line("Stopping now")
        self._forced = True
        self._status = 128 + number
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of cut connections
        self._engine.kill()
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True

    async def _drain_when_asked(self) -> None:
        """Once asked to stop, accept no more requests, let the running ones finish, and stop uvicorn."""
        await self._asked.wait()
        assert self._gate is not None
        assert self._server is not None
        self._gate.close()
        began, left = time.monotonic(), self._gate.in_flight
        if left:
            allowed = self._config.drain_timeout
            self._console.line(f"Stopping: {left} answers may take {allowed:g} s to finish (again to stop now)")
        else:
            self._console.line("Stopping")
        if not await self._gate.wait_idle(self._config.drain_timeout):
            self._console.line(f"Aborting {self._gate.in_flight} answers")
            await self._engine.stop()  # they end with an error
        elif left and not self._forced:
            self._console.line(f"All answers are finished, after {time.monotonic() - began:.1f} s")
        self._server.should_exit = True


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's event loop factory if it is installed, as it is on Linux and macOS; None otherwise."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


@contextlib.contextmanager
def _bound(config: ServerConfig) -> Iterator[socket.socket]:
    """Yield a socket bound to the configured host and port: a port in use is found before a model is loaded."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # of each connection
        try:
            listener.bind((config.host, config.port))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot listen on {config.host}, port {config.port}: {reason}") from error
        yield listener


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template in {path}: {error}") from error
    if (fault := fault_of(text)) is not None:
        raise ConfigError(f"the chat template in {path} is wrong, {fault}")
    return text


def logs_of(config: ServerConfig) -> Logs:
    """Return the logging options of this process and of the engine's."""
    return Logs(format=config.log_format, level=config.log_level)


def configure_logging(config: ServerConfig) -> None:
    """Log each message as one line to standard error; libraries log only warnings and errors."""
    logs.configure(logs_of(config))
    for name in ("uvicorn.error", "httpx", "huggingface_hub", "asyncio", "opentelemetry", "urllib3"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
