"""What Prometheus reads at /metrics: vLLM's names under mmdist:, so that its dashboards fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mmdist.engine.load import AnyEngine
from mmdist.engine.request import Output

if TYPE_CHECKING:
    from mmdist.serving.service import Call

FIRST_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 240, 480)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """Takes every output on the event loop; gauges of the engine are read when a scraper asks."""

    def __init__(self, engine: AnyEngine, model_name: str):
        self.registry = CollectorRegistry()
        self.registry.register(EngineGauges(engine, model_name))
        self.model_name = model_name
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, pictures included")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.request_success = Counter(
            "mmdist:request_success", "Requests ended", ["model_name", "finished_reason"], registry=self.registry
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token", FIRST_TOKEN_S)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens", TOKEN_S)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token", REQUEST_S)
        self.request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", "Tokens generated for one", TOKENS)
        self.last_token: dict[str, float] = {}  # by the engine's id: when its last token came

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"mmdist:{name}", help, ["model_name"], registry=self.registry).labels(self.model_name)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"mmdist:{name}", help, ["model_name"], registry=self.registry, buckets=buckets)
        return metric.labels(self.model_name)

    def take(self, call: Call, output: Output) -> None:
        now = time.monotonic()
        if output.token_id is not None:
            self._take_token(call, output, now)
        if output.finish_reason is not None:
            self.last_token.pop(output.id, None)
            self.request_success.labels(self.model_name, output.finish_reason).inc()
            self.e2e.observe(now - call.arrived)
            self.request_generation.observe(output.num_tokens)

    def _take_token(self, call: Call, output: Output, now: float) -> None:
        before = self.last_token.get(output.id)
        if before is None:
            self.first_token.observe(now - call.arrived)
            self.prompt_tokens.inc(len(output.prompt_token_ids))
            self.request_prompt.observe(len(output.prompt_token_ids))
        else:
            self.inter_token.observe(now - before)
        self.generation_tokens.inc()
        self.last_token[output.id] = now

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineGauges:
    """A collector of what the engine counts itself."""

    def __init__(self, engine: AnyEngine, model_name: str):
        self.engine, self.model_name = engine, model_name

    def collect(self) -> Iterator[Metric]:
        for name, value in self.engine.gauges().items():
            yield self._metric(GaugeMetricFamily, name, value)
        for name, value in self.engine.counters().items():
            yield self._metric(CounterMetricFamily, name, value)

    def _metric(self, kind: Callable[..., Metric], name: str, value: float) -> Metric:
        metric = kind(f"mmdist:{name}", name.replace("_", " "), labels=["model_name"])
        metric.add_metric([self.model_name], value)  # type: ignore[attr-defined]
        return metric
