"""What a decoder tells Prometheus: the figures of request_meter.py, lease_watch.py and step_meter.py, under their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from protos import decoder_pb2
from services.decoder.engine import Engine
from services.decoder.lease_watch import LeaseWatch
from services.decoder.request_meter import RequestFigures
from services.decoder.step_meter import StepMeter
from services.metrics import histogram_family

_PREFIX = "leasehold_decoder_"


class DecoderCollector(Collector):
    """One decoder as Prometheus' metrics. What does not exist yet while it starts is left out."""

    def __init__(self, requests: RequestFigures) -> None:
        self._requests = requests
        self.watch: LeaseWatch | None = None
        self.engine: Engine | None = None
        self.info: decoder_pb2.GetModelInfoResponse | None = None

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        yield from self._of_requests()
        if self.watch is not None:
            yield from _of_leases(self.watch)
        if self.engine is not None:
            yield _counter("preemptions", "Leases given back, their requests queued again.", self.engine.num_preempted)
            held_back = "Times that a step left a sequence out because its seals were not answered yet."
            yield _counter("held_back", held_back, self.engine.num_held_back)
            yield from _of_steps(self.engine.meter)
        if self.info is not None:
            yield from _of_info(self.info)

    def _of_requests(self) -> Iterable[Metric]:
        figures = self._requests
        for name, documentation, histogram in (
            ("ttft_seconds", "Time to the first token, from the arrival of the request.", figures.ttft),
            ("tpot_seconds", "Time per output token after the first, one value a whole answer.", figures.tpot),
            ("itl_seconds", "Time between two tokens of a request.", figures.itl),
            ("e2e_seconds", "Time from the arrival of a request to its end, whole answers only.", figures.e2e),
            ("queue_seconds", "Time that a request waited for a seat in the batch and its blocks.", figures.queue),
        ):
            yield histogram_family(_PREFIX + name, documentation, {"": histogram})
        yield _gauge(
            "requests_waiting", "Requests that wait for a seat in the batch or for blocks.", figures.num_waiting
        )
        yield _gauge("requests_running", "Requests that hold a lease.", figures.num_running)
        yield _counter("requests", "Requests that ended, by how.", figures.outcomes, "outcome")
        yield _counter("errors", "Requests that failed or were refused, by reason.", figures.errors, "reason")
        yield _counter("prompt_tokens", "Prompt tokens of requests that got their blocks.", figures.num_prompt_tokens)
        yield _counter("cached_prompt_tokens", "Of these, tokens found in the pool.", figures.num_cached_tokens)


def _of_leases(watch: LeaseWatch) -> Iterable[Metric]:
    waits = watch.meter.waits
    yield histogram_family(_PREFIX + "lease_wait_seconds", "Time until an ask for blocks was answered.", waits, "call")
    yield _counter("leases_refused", "Asks for blocks that were refused.", watch.meter.num_refused)
    yield _gauge(
        "can_serve", "1 while there are blocks to lease: the KV manager answers, or none is needed.", watch.can_serve
    )


def _of_steps(steps: StepMeter) -> Iterable[Metric]:
    yield histogram_family(_PREFIX + "step_seconds", "Time of a step.", {"": steps.steps})
    yield histogram_family(_PREFIX + "step_part_seconds", "Time of a step by part.", steps.parts, "part")
    yield histogram_family(_PREFIX + "batch_size", "Sequences in a step.", {"": steps.batch_sizes})
    phases = {"prefill": steps.num_prefill_tokens, "decode": steps.num_decode_tokens}
    yield _counter("tokens", "Tokens whose K/V was computed, by phase.", phases, "phase")
    yield _counter("generated_tokens", "Tokens that were sampled.", steps.num_generated)
    yield _counter("steps_failed", "Steps that failed, and with them their requests.", steps.num_failed)


def _of_info(info: decoder_pb2.GetModelInfoResponse) -> Iterable[Metric]:
    labels = {"worker_id": info.worker_id, "model": info.name, "backend": info.backend, "numerics_id": info.numerics_id}
    yield InfoMetricFamily(_PREFIX.rstrip("_"), "What this decoder is.", labels)
    yield _gauge("max_seqs", "Requests that fit into a batch.", info.max_seqs)


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, documentation, value=float(value))


def _counter(
    name: str, documentation: str, values: float | Mapping[str, int], label: str | None = None
) -> CounterMetricFamily:
    if not isinstance(values, Mapping):
        return CounterMetricFamily(_PREFIX + name, documentation, value=float(values))
    family = CounterMetricFamily(_PREFIX + name, documentation, labels=[label or ""])
    for key, value in values.items():
        family.add_metric([key], float(value))
    return family
