"""Prometheus metrics, off unless `metrics.listen` names an address.

Names and labels:
- `grpc_server_call_started_total{grpc_method}` and `grpc_server_call_duration_seconds{grpc_method, grpc_status}`, after
  gRFC A66. Health and reflection are counted as `other`.
- `weight_broker_<field>` for every number in `Counts`, read when Prometheus asks.
- `weight_broker_cards{state}`: how many cards are ready, degraded, failed.
- `weight_broker_transfers_total{data_plane}`: transfers that succeeded, by what moved the bytes.
- `weight_broker_acquisitions_total{outcome}`: acquisitions that ended, by how.
- `weight_broker_datasystem_workers{state}`: how many datasystem workers answer or are silent.
- `weight_broker_log_lines_dropped_total`: lines of the log that standard error did not take.
- `weight_broker_damage_reports_total{finding}`: reports of damage by receivers, by what a check of the source found.
- `weight_broker_build_info{version}`, always 1.

Every series exists from the start, at 0: the first event is an increase.

prometheus_client is imported only if the endpoint is on: it costs start time and memory.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pool

from weight_brokerd import __version__
from weight_brokerd.telemetry.counts import Counts

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

OTHER_METHOD = "other"

_READ_SECONDS = 5.0
# Calls here take from a fraction of a millisecond (a miss) to an hour (waiting for a cold load).
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600)
_HELP = {
    "instances": "Attached instances.",
    "publications": "Publications that are not gone.",
    "regions": "Regions that the broker holds.",
    "region_bytes": "Bytes in those regions.",
    "running_transfers": "Transfers that run now.",
    "waiting_acquisitions": "Acquisitions that wait now.",
    "cold_load_leases": "Cold-load leases that are held now.",
    "suspect_receivers": "Processes whose reports of damage keep proving false.",
    "damage_reports": "Reports of damage, by what the check of the source found.",
    "cards": "Cards of this host, by whether they serve.",
    "transfers": "Transfers that succeeded, by what moved the bytes.",
    "acquisitions": "Acquisitions that ended, by how: transferred, cold_load or the reason of their error.",
    "datasystem_workers": "Datasystem workers, by whether they answer.",
    "log_lines_dropped": "Lines of the log that standard error did not take.",
}
_BY = {
    "cards": "state",
    "datasystem_workers": "state",
    "transfers": "data_plane",
    "acquisitions": "outcome",
    "damage_reports": "finding",
}
"""The label of each number that is a table."""
_COUNTERS = frozenset({"transfers", "acquisitions", "damage_reports", "log_lines_dropped"})


class Metrics:
    """All metrics of one broker in a private registry, and their HTTP endpoint."""

    def __init__(self, counts: Callable[[], Counts], services: Iterable[str]) -> None:
        """`counts` is called on the running event loop. Methods of `services` are counted by name, others together."""
        import prometheus_client

        self.registry = prometheus_client.CollectorRegistry()
        self._counts = counts
        self._loop = asyncio.get_running_loop()
        self._services = frozenset(services)
        self._close: Callable[[], None] | None = None
        self._started = prometheus_client.Counter(
            "grpc_server_call_started", "RPCs that began.", ["grpc_method"], registry=self.registry
        )
        self._duration = prometheus_client.Histogram(
            "grpc_server_call_duration_seconds",
            "Time from the start of an RPC to its end, by its status.",
            ["grpc_method", "grpc_status"],
            registry=self.registry,
            buckets=_BUCKETS,
        )
        build = prometheus_client.Gauge(
            "weight_broker_build_info", "Version of the broker.", ["version"], registry=self.registry
        )
        build.labels(version=__version__).set(1)
        for method in _methods_of(self._services):
            self._started.labels(method)
            self._duration.labels(method, grpc.StatusCode.OK.name)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The gauges, for prometheus_client; called in a thread of the endpoint."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        for name, value in asdict(reading.result(_READ_SECONDS)).items():
            make = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
            if not isinstance(value, Mapping):
                yield make(f"weight_broker_{name}", _HELP[name], value)
                continue
            family = make(f"weight_broker_{name}", _HELP[name], labels=[_BY[name]])
            for label, count in value.items():
                family.add_metric([label], count)
            yield family

    def describe(self) -> Iterator[Metric]:
        """Nothing: registration runs on the event loop, which must not wait for its own counts."""
        return iter(())

    def serve(self, host: str, port: int) -> int:
        """Starts the endpoint; returns its port. Raises `OSError` if the address cannot be bound."""
        import prometheus_client

        server, thread = prometheus_client.start_http_server(port, host, registry=self.registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._close = close
        return int(server.server_port)

    async def close(self) -> None:
        """Stop the endpoint in a thread: a last reader may wait for the event loop."""
        if self._close is not None:
            await asyncio.to_thread(self._close)
            self._close = None

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        """Counts and times the calls of a server. Must be the first interceptor, to see the final status."""
        return _Interceptor(self._observe, self._services)

    async def _read(self) -> Counts:
        return self._counts()

    @contextmanager
    def _observe(self, method: str, context: Any) -> Iterator[None]:
        self._started.labels(method).inc()
        begin = time.monotonic()
        status = "UNKNOWN"
        try:
            yield
            status = _status(context, grpc.StatusCode.OK)
        except asyncio.CancelledError:
            status = grpc.StatusCode.CANCELLED.name
            raise
        except GeneratorExit:
            status = grpc.StatusCode.CANCELLED.name
            raise
        except BaseException:
            status = _status(context, grpc.StatusCode.UNKNOWN)
            raise
        finally:
            self._duration.labels(method, status).observe(time.monotonic() - begin)


def _methods_of(services: Iterable[str]) -> Iterator[str]:
    """The methods of those services that this process knows, as SERVICE/METHOD."""
    for service in services:
        with suppress(KeyError):
            methods = descriptor_pool.Default().FindServiceByName(service).methods
            yield from (f"{service}/{method.name}" for method in methods)


def _status(context: Any, otherwise: grpc.StatusCode) -> str:
    """Name of the call's status. grpc.aio has a number; 0 or None if no status was set."""
    code = context.code()
    if isinstance(code, int):
        code = next((status for status in grpc.StatusCode if status.value[0] == code), grpc.StatusCode.UNKNOWN)
    name: str = otherwise.name if code in (None, grpc.StatusCode.OK) else code.name
    return name


_Observe = Callable[[str, Any], Any]


class _Interceptor(grpc.aio.ServerInterceptor):
    def __init__(self, observe: _Observe, services: frozenset[str]) -> None:
        self._observe = observe
        self._services = services

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        # The method has a handler, so it exists: labels of known services are bounded.
        name = handler_call_details.method.removeprefix("/")
        name = name if name.partition("/")[0] in self._services else OTHER_METHOD
        make, inner = {
            (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
            (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
            (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
            (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        return make(self._wrap(name, inner), handler.request_deserializer, handler.response_serializer)

    def _wrap(self, name: str, inner: Any) -> Any:
        # A streaming method is either an asynchronous generator or a coroutine that writes to the context.
        if inspect.isasyncgenfunction(inner):

            async def generate(request: object, context: Any) -> AsyncIterator[object]:
                with self._observe(name, context):
                    async for response in inner(request, context):
                        yield response

            return generate

        async def call(request: object, context: Any) -> object:
            with self._observe(name, context):
                return await inner(request, context)

        return call
