"""Where a request's time goes, as OpenTelemetry spans: `--enable-trace`, with the `otel` extra.

One span for each call that may cost something, child of the client's if it sent a `traceparent`, and below it one for each
phase, made when the phase is over. Where they go, which are kept and under which service name is said by the standard OTEL_*
variables. Spans hold counts and times, never texts, pictures, URLs or keys.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import sightline
from sightline.errors import SettingError
from sightline.types import Times

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"


class Tracing:
    """The way out for spans, which leave in batches by a thread of its own. Raises `SettingError` without OpenTelemetry."""

    def __init__(self) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SettingError("--enable-trace needs OpenTelemetry: pip install 'sightline[otel]'.") from error
        protocol = os.environ.get(_PROTOCOL.replace("OTLP", "OTLP_TRACES"), os.environ.get(_PROTOCOL, "http/protobuf"))
        if protocol != "http/protobuf":
            raise SettingError(f"{_PROTOCOL}={protocol}: only http/protobuf is spoken (port 4318 of most collectors).")
        resource = Resource.create({"service.version": sightline.__version__})
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "sightline"}))
        # At the end of the process the server closes it, once.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("sightline", sightline.__version__)

    def begin(self, headers: Mapping[bytes, bytes]) -> Trace:
        """A call has come. headers: its own, with lower-case names."""
        return Trace(self._tracer, headers)

    def close(self) -> None:
        """Send what is left; it may take as long as the exporter's time limit."""
        self._provider.shutdown()


class Trace:
    """The spans of one call. Times are seconds of the monotonic clock."""

    def __init__(self, tracer: Tracer, headers: Mapping[bytes, bytes]) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        given = {name: headers.get(name.encode(), b"").decode("latin-1") for name in propagator.fields}
        parent = propagator.extract({name: value for name, value in given.items() if value})
        self._tracer = tracer
        self._epoch = time.time() - time.monotonic()
        self._root = tracer.start_span("request", parent, SpanKind.SERVER)
        self._inside = set_span_in_context(self._root)
        carrier: dict[str, str] = {}
        propagator.inject(carrier, self._inside)
        self.id = format(self._root.get_span_context().trace_id, "032x")
        # Of another's state, which may be private, nothing is passed on to the hosts of pictures.
        self.outgoing = tuple((b"traceparent", v.encode()) for name, v in carrier.items() if name == "traceparent")

    def span(self, name: str, began: float, ended: float) -> None:
        """A phase that is over."""
        if self._root.is_recording():
            self._tracer.start_span(name, self._inside, start_time=self._nanoseconds(began)).end(
                self._nanoseconds(ended)
            )

    def engine(self, times: Times, ended: float) -> None:
        """What the engine did for one prompt, whose last token came at `ended`."""
        phases = {
            "engine.queue": (times.arrived, times.begun or ended),
            "engine.vision": (times.encode_began, times.encode_ended),
            "engine.prefill": (times.begun, times.first_token),
            "engine.decode": (times.first_token, ended),
        }
        for name, (began, until) in phases.items():
            if began and until:
                self.span(name, began, max(began, until))

    def end(self, name: str, attributes: Mapping[str, Any], *, failed: bool) -> None:
        """The call is over. Attributes that are None are left out."""
        from opentelemetry.trace import StatusCode

        self._root.update_name(name)
        self._root.set_attributes({key: value for key, value in attributes.items() if value is not None})
        if failed:
            self._root.set_status(StatusCode.ERROR)
        self._root.end()

    def _nanoseconds(self, seconds: float) -> int:
        return int((seconds + self._epoch) * 1e9)
