"""What Prometheus reads at /metrics: times by level, and the engine at a glance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flextron.serving.engine import Engine

_FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 60)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 1)
_QUEUE_SECONDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._names = [level.name for level in engine.levels]
        self.first = self._histogram(
            "time_to_first_token", "From a request to its first token, by its level.", _FIRST_SECONDS
        )
        self.token = self._histogram(
            "time_per_output_token", "From a token to the next, by the level of the next.", _TOKEN_SECONDS
        )
        self.queue = self._histogram(
            "queue_time", "From a request to its first step, by the level asked for.", _QUEUE_SECONDS
        )
        self.tokens = self._counter("tokens", "Tokens written.", "level")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.requests = self._counter("requests", "Requests answered, by finish reason or status.", "outcome")
        self.met = self._counter("objectives_met", "Objectives in time that were kept.", "objective")
        self.missed = self._counter("objectives_missed", "Objectives in time that were missed.", "objective")
        self.degraded = self._counter("degraded", "Texts that ran below the level that they asked for.")
        self.rejected = self._counter("rejected", "Requests that were refused, by the error's code.", "code")
        self.cancelled = self._counter("cancelled", "Texts whose client left before their end.")
        self.registry.register(_Glance(engine))

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Sequence[Histogram]:
        """Return one histogram for each level."""
        made = Histogram(f"flextron_{name}_seconds", text, ["level"], registry=self.registry, buckets=buckets)
        return [made.labels(level) for level in self._names]

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"flextron_{name}", text, labels, registry=self.registry)

    def objective(self, name: str, met: bool | None) -> None:
        """Count whether an objective was kept; None where there was none."""
        if met is not None:
            (self.met if met else self.missed).labels(name).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Glance(Collector):
    """The engine's own numbers, read when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield a gauge for each of them."""
        stats, levels = self._engine.stats(), self._engine.levels
        yield GaugeMetricFamily("flextron_running", "Texts that are being written.", stats.running)
        yield GaugeMetricFamily("flextron_waiting", "Texts that wait for their first step.", stats.waiting)
        yield GaugeMetricFamily("flextron_cap", "Level that texts without a fixed one get now at most.", stats.cap)
        yield GaugeMetricFamily("flextron_cap_share", "Share of cost of the cap's level.", levels[stats.cap].share)
        yield GaugeMetricFamily(
            "flextron_predicted_over_measured", "Time of a step, moving median.", stats.predicted_over_measured
        )
        yield GaugeMetricFamily("flextron_step_error", "Relative error of predicted times, median.", stats.step_error)
        yield GaugeMetricFamily("flextron_cache_used", "Share of the cache that is in use.", stats.cache_used)
        yield GaugeMetricFamily("flextron_steps", "Steps of the engine.", stats.steps)
        yield GaugeMetricFamily("flextron_preempted", "Texts that made room and began anew.", stats.preempted)
        yield GaugeMetricFamily("flextron_failed_steps", "Steps that failed.", stats.failed_steps)
        yield GaugeMetricFamily("flextron_healthy", "Whether the engine works.", float(stats.healthy))
        by_level = GaugeMetricFamily(
            "flextron_running_by_level", "Texts by the level of their last step.", None, ["level"]
        )
        for level, running in zip(levels, stats.by_level, strict=True):
            by_level.add_metric([level.name], running)
        yield by_level
