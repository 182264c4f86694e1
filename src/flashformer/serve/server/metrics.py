"""Prometheus metrics, under the names that users of other engines already graph.

Steps and ended requests -> counters, gauges and histograms of one registry.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from flashformer.serve.server import wire
from flashformer.serve.server.flight import Flight

PREFIX = "flashformer:"
_STEP_BUCKETS = (2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5, 2.0)
_TOKEN_BUCKETS = (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 5.0)
_REQUEST_BUCKETS = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 180.0, 600.0)


class Metrics:
    """One server's numbers; nothing in them tells what a request said."""

    def __init__(self) -> None:
        # A second series beside each, which nobody graphs.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._make_gauges()
        self._make_counters()
        self._make_histograms()

    def _make_gauges(self) -> None:
        self.running = self._gauge("num_requests_running", "Sequences that hold a slot.")
        self.waiting = self._gauge("num_requests_waiting", "Sequences that wait for a slot.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV pages in use; 1: all.")
        self.bandwidth = self._gauge("achieved_bytes_per_second", "Bytes of a step over its time.")
        self.connections = self._gauge("open_connections", "TCP connections of clients.")
        self.tasks = self._gauge("event_loop_tasks", "Tasks of the HTTP process.")

    def _make_counters(self) -> None:
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of started requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self.success = self._counter(
            "request_success", "Requests that ended by themselves.", ("finished_reason",)
        )
        self.rejections = self._counter("admission_rejections", "Requests refused.", ("reason",))
        self.corrupted = self._counter("corrupted_requests", "Requests ended by an engine error.")
        self.restarts = self._counter("engine_restarts", "Engines started again.", ("reason",))
        self.replays = self._counter("replayed_requests", "Requests that went on elsewhere.")
        self.watchdog = self._counter("kernel_watchdog_trips", "Engines killed because they hung.")
        self.nonfinite = self._counter("nonfinite_logits", "Sequences ended by a NaN in a logit.")

    def _make_histograms(self) -> None:
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _REQUEST_BUCKETS
        )
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", _TOKEN_BUCKETS
        )
        self.per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean of a request.", _TOKEN_BUCKETS
        )
        self.latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_BUCKETS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival to a slot.", _REQUEST_BUCKETS
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "From a slot to the first token.", _REQUEST_BUCKETS
        )
        self.decode_time = self._histogram(
            "request_decode_time_seconds", "From the first to the last token.", _REQUEST_BUCKETS
        )
        self.step_time = self._histogram("kernel_step_seconds", "One engine step.", _STEP_BUCKETS)

    def on_step(self, step: wire.Step, num_tokens: int) -> None:
        """Count one step."""
        self.step_time.observe(step.seconds)
        self.generation_tokens.inc(num_tokens)
        if step.seconds > 0:
            self.bandwidth.set(step.nbytes / step.seconds)

    def on_usage(self, usage: wire.Usage, num_pages: int) -> None:
        """Note what is taken."""
        self.running.set(len(usage.slots))
        self.waiting.set(usage.num_waiting)
        self.kv_usage.set(usage.pages_used / max(1, num_pages))

    def on_end(self, flight: Flight) -> None:
        """Count a request that ended, whatever ended it."""
        if flight.started:
            self.prompt_tokens.inc(flight.num_prompt_tokens)
            self.prefix_queries.inc(flight.num_prompt_tokens)
            self.prefix_hits.inc(flight.num_cached)
            self.queue_time.observe(flight.started - flight.arrived)
        if flight.first_token:
            self.first_token.observe(flight.first_token - flight.arrived)
            self.prefill_time.observe(max(0.0, flight.first_token - flight.started))
            decode = flight.last_token - flight.first_token
            self.decode_time.observe(decode)
            if flight.num_generated > 1:
                self.per_token.observe(decode / (flight.num_generated - 1))
        if flight.exhausted and not flight.failed:
            self.latency.observe(flight.last_token - flight.arrived)
            self.success.labels(flight.finish_reason).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(PREFIX + name, what, registry=self.registry)

    def _counter(self, name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(PREFIX + name, what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, what, buckets=buckets, registry=self.registry)
