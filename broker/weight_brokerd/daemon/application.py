"""Puts the broker's parts together, runs them and takes them apart again."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

import grpc
import structlog

from weight_brokerd import __version__
from weight_brokerd.api.admission.gate import Gate
from weight_brokerd.api.admission.interceptor import AdmissionInterceptor
from weight_brokerd.api.caller import Callers
from weight_brokerd.api.errors import ErrorInterceptor
from weight_brokerd.api.front.front import Front
from weight_brokerd.api.health import Health, add_reflection
from weight_brokerd.api.incoming.reception import LARGE_BYTES, Reception
from weight_brokerd.api.incoming.turns import Turns as LongWork
from weight_brokerd.api.server import SERVICE_NAMES, add_services
from weight_brokerd.attach.server import AttachServer
from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.cards.health import CardState
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.loading import Config
from weight_brokerd.config.rules import split_address
from weight_brokerd.control.control import Control
from weight_brokerd.core.conduct.turns import Turns
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.model import Limits
from weight_brokerd.daemon import identity
from weight_brokerd.daemon.lock import RuntimeLock
from weight_brokerd.daemon.notify import Notifier
from weight_brokerd.daemon.quotas import ACQUIRE, WATCHES, connections_to_keep, make_quotas
from weight_brokerd.daemon.runtime_directory import RuntimeDirectory
from weight_brokerd.directory.memory import MemoryDirectory
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.setup import make_kinds
from weight_brokerd.telemetry.metrics import Metrics

MAXIMUM_PENDING_CALLS = 1 << 20
STOP_SECONDS = 1.0
"""For calls to end once no transfer runs any more."""
LAST_WORD_SECONDS = 0.1
"""For callers to read the end of a Watch before their connection closes: gRPC drops a connection at the first failed
write, with its unread data."""
STATUS_SECONDS = 15.0
"""Interval of the status for the service manager, unless its watchdog needs a shorter one."""

_SIGNS_OF_LIFE_PER_WATCHDOG = 2
_GARBAGE_THRESHOLDS = (10_000, 10, 50)
_GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", LARGE_BYTES),
    ("grpc.max_send_message_length", LARGE_BYTES),
    # Only uncompressed requests: gRPC would unpack a small one to any size.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Calls may wait for minutes without a message, and their callers ping meanwhile: allow that.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # gRPC drops calls at random, with CANCELLED, where more wait to be accepted. Streams and connections bound them.
    ("grpc.server.max_pending_requests", MAXIMUM_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", MAXIMUM_PENDING_CALLS),
)
_STREAMS_OF_CONNECTION = 2048
"""What a client opens before it knows the limit is reset, so an honest burst must fit."""

log = structlog.get_logger("weight_brokerd.daemon.application")


class Application:
    """One broker. The caller holds the lock of the runtime directory."""

    def __init__(
        self, config: Config, directory: RuntimeDirectory, lock: RuntimeLock, *, reload: Callable[[], None]
    ) -> None:
        """`reload` is called on SIGHUP."""
        self._config = config
        self._directory = directory
        self._reload = reload
        self._loop = asyncio.get_running_loop()
        self._notifier = Notifier()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._host_id = identity.host_id(config.broker.host_id)
        generations = identity.generation_range(lock.generation_mark())
        lock.write(generations.stop)
        self._quotas = make_quotas(config.limits)
        self._front = Front(
            directory.path,
            per_process=config.limits.connections_per_process,
            total=connections_to_keep(self._quotas.open_files),
        )
        self._regions = RegionTable(
            regions_per_instance=config.limits.regions_per_instance,
            quotas=(self._quotas.regions, self._quotas.descriptors),
        )
        self._staging = StagingConnections(self._staging_lost)
        self._kinds = make_kinds(config, directory.path, self._regions, self._staging, self)
        self._control = self._make_control(first=generations.start)
        self._metrics = self._make_metrics()
        self._health = Health(SERVICE_NAMES)
        self._control.draining.on_begin(self._health.stop_serving)
        self._attach_server = AttachServer(
            self._control.sessions,
            host_id=self._host_id,
            broker_version=__version__,
            entrances=self._front.entrances,
        )

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains. Raises `StartError` if it cannot begin."""
        self._loop.set_exception_handler(_log_loop_error)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_stop_signal)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        _look_for_garbage_rarely()
        server = await self._start()
        log.info("ready", version=__version__, host_id=self._host_id, directory=str(self._directory.path))
        self._notifier.ready(self._status())
        heartbeat = self._loop.create_task(self._heartbeat()) if self._notifier.active else None
        await self._stop.wait()
        await self._drain()
        await self._end(server)
        if heartbeat is not None:
            heartbeat.cancel()
        await _last_turns()
        log.info("stopped")

    # Parts

    def _make_control(self, *, first: int) -> Control:
        limits = self._config.limits
        directory = MemoryDirectory(lease_seconds=limits.cold_load_lease_seconds, first_token=first)
        coordinator = Coordinator(
            host_id=self._host_id,
            limits=Limits(
                readers_per_publication=limits.readers_per_publication,
                publications=limits.publications,
                instances=limits.instances,
                instances_per_process=limits.instances_per_process,
                layout_tensors=limits.layout_tensors,
                layout_tensors_per_process=limits.layout_tensors_per_process,
                cold_load_lease_seconds=limits.cold_load_lease_seconds,
            ),
            first_generation=first,
        )
        return Control(
            coordinator=coordinator,
            regions=self._regions,
            directory=directory,
            kinds=self._kinds,
            staging=self._staging,
            descriptors=self._quotas.descriptors,
        )

    def _make_metrics(self) -> Metrics | None:
        if not self._config.metrics.listen:
            return None
        return Metrics(self._control.counts, SERVICE_NAMES)

    # Start

    async def _start(self) -> grpc.aio.Server:
        turns = LongWork()
        callers = Callers(self._control, self._front)
        interceptors: list[grpc.aio.ServerInterceptor] = [
            self._admission(callers),
            ErrorInterceptor(Reception(self._control, callers, turns)),
        ]
        if self._metrics is not None:
            interceptors.insert(0, self._metrics.interceptor())
            self._listen_for_prometheus(self._metrics)
        # More streams than the quota of Acquire calls, so that a caller with too many is refused by name.
        streams = max(_STREAMS_OF_CONNECTION, 2 * self._config.limits.acquires_per_process)
        options = (*_GRPC_OPTIONS, ("grpc.max_concurrent_streams", streams))
        server = grpc.aio.server(interceptors=interceptors, options=options)
        self._health.serve(server)
        add_services(server, self._control, self._config, turns)
        add_reflection(server, SERVICE_NAMES)
        try:
            with self._directory.binding_hidden():
                server.add_insecure_port(f"unix:{quote(str(self._directory.server_socket))}")
            self._front.hide(self._directory.server_socket)
            await server.start()
            with self._directory.binding(self._directory.grpc_socket):
                self._front.open(self._directory.grpc_socket)
            # Last: an attached process may call at once.
            with self._directory.binding(self._directory.attach_socket):
                self._attach_server.open(self._directory.attach_socket)
                self._control.ready_at = self._control.loop.now()
        except (OSError, RuntimeError) as error:
            raise StartError(f"the sockets in {self._directory.path} cannot be bound: {error}") from error
        self._health.start_serving()
        self._kinds.start()  # returns at once: a device's driver may take long, and host memory is served meanwhile
        return server

    def _admission(self, callers: Callers) -> AdmissionInterceptor:
        quotas = self._quotas
        turns = Turns[asyncio.Future[None]](process=quotas.process_pace, user=quotas.user_pace)
        streams = {ACQUIRE: quotas.acquires} | dict.fromkeys(WATCHES, quotas.watches)
        gate = Gate(turns, self._control.loop.now)
        self._front.allowances.overrun = gate.overrun
        return AdmissionInterceptor(callers, gate, streams)

    def _listen_for_prometheus(self, metrics: Metrics) -> None:
        listen = self._config.metrics.listen
        try:
            metrics.serve(*split_address(listen))
        except OSError as error:
            raise StartError(f"metrics.listen: {listen} cannot be bound: {error.strerror or error}") from error

    # While it runs

    async def _heartbeat(self) -> None:
        watchdog = self._notifier.watchdog_seconds
        interval = STATUS_SECONDS if watchdog is None else watchdog / _SIGNS_OF_LIFE_PER_WATCHDOG
        while True:
            await asyncio.sleep(interval)
            self._notifier.watchdog()
            if not self._stop.is_set():
                self._notifier.status(self._status())

    def _status(self) -> str:
        counts = self._control.counts()
        text = (
            f"{counts.instances} instances, {counts.publications} publications "
            f"({counts.region_bytes / 1e9:.1f} GB), {counts.running_transfers} transfers"
        )
        cards = [card for _, card in self._kinds.health]
        ready = sum(card.state is CardState.READY for card in cards)
        return text + (f", {ready} of {len(cards)} cards ready" if cards or self._kinds.problem else "")

    # Events of kinds of memory and stage connections (weight_brokerd.kinds.kind.KindEvents)

    def memory_lost(self, kind: str, publication_ids: Iterable[str], why: str) -> None:
        """Published memory became unreachable."""
        self._control.memory_lost(kind, publication_ids, why)

    def _staging_lost(self, instance_id: str, why: str) -> None:
        self._control.publishing.staging_lost(instance_id, why)

    def health_changed(self) -> None:
        """The health of a device or of its worker has changed."""
        for _, card in self._kinds.health:
            log.info("card", device_id=card.identity, state=card.state.value, problem=card.problem)
            self._health.set_card(card.identity, card.state is CardState.READY)
        self._notifier.status(self._status())

    def _on_stop_signal(self) -> None:
        if self._stop.is_set():
            log.warning("stopping_at_once", why="a second signal")
            self._hurry.set()
        self._stop.set()

    # End

    async def _drain(self) -> None:
        seconds = self._config.limits.drain_seconds
        running = self._control.counts().running_transfers
        log.info("draining", running_transfers=running, limit_seconds=seconds)
        self._notifier.stopping(f"draining: {running} transfers run")
        self._control.draining.begin()
        drained = self._loop.create_task(self._control.draining.drain(seconds))
        hurried = self._loop.create_task(self._hurry.wait())
        await asyncio.wait({drained, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not (drained.done() and drained.result()):
            self._control.draining.cut_off()
        for task in (drained, hurried):
            task.cancel()
        # An open Watch would delay the server's stop for the full STOP_SECONDS.
        self._control.watch.close()
        self._health.end_watches()
        await asyncio.sleep(LAST_WORD_SECONDS)

    async def _end(self, server: grpc.aio.Server) -> None:
        self._front.stop_accepting()
        await server.stop(STOP_SECONDS)
        await self._front.close(LAST_WORD_SECONDS)
        self._attach_server.close()
        ending = self._loop.create_task(self._control.end_movements())
        await asyncio.wait({ending}, timeout=STOP_SECONDS)
        self._staging.close()  # an instance that hangs, and keeps a staging buffer, does not keep the daemon
        await ending
        await self._kinds.close()
        self._control.close()
        self._regions.close()
        if self._metrics is not None:
            await self._metrics.close()
        self._directory.remove_sockets()


def _look_for_garbage_rarely() -> None:
    """Python's collector stops everything while it looks at all objects there are. What is there now, modules and the
    broker's parts, stays; of the rest it looks at everything after millions of new objects, not after 70,000."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE_THRESHOLDS)


async def _last_turns() -> None:
    """Wait for the other tasks of the loop: a call that was cut off ends some turns after its server, and gRPC logs a
    traceback if the loop ends first."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=STOP_SECONDS)


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    log.error("internal_error", message=context.get("message"), exc_info=context.get("exception"))
