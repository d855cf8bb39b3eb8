"""What the manager tells Prometheus: the counts of Stats and of call_meter.py under their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protos import kv_manager_pb2 as pb
from services.kv_manager import translate
from services.kv_manager.call_meter import CallMeter
from services.kv_manager.lessor import Lessor
from services.kv_manager.sessions import ABSENT, LIVE, ORPHANED, REVOKED
from services.metrics import histogram_family

_PREFIX = "leasehold_kv_manager_"
_BLOCK_STATES = ("free", "leased", "sealed", "cached", "quarantined")

# Name, field of Stats, what it is.
_GAUGES = (
    ("leases", "num_leases", "Leases that are held."),
    ("leases_waiting", "num_waiting", "Leases that wait for blocks."),
    (
        "unverified_blocks",
        "num_unverified",
        "Sealed blocks not checked since the start; they are before their first hit.",
    ),
)
_COUNTERS = (
    ("leases_acquired", "num_acquired", "Leases created."),
    ("leases_extended", "num_extended", "Extensions that added blocks."),
    ("leases_released", "num_released", "Leases given back."),
    ("leases_exhausted", "num_exhausted", "Leases and extensions refused for want of blocks."),
    ("leases_preempted", "num_preempted", "Leases that had to give way to an older request."),
    ("sessions_revoked", "num_revoked", "Sessions revoked because their worker was silent or hung."),
    ("prefix_looked_up_blocks", "num_looked_up", "Blocks that new leases looked for."),
    ("prefix_hit_blocks", "num_hits", "Of these, blocks that were found and shared."),
    ("sealed_blocks", "num_seals", "Blocks sealed."),
    ("deduplicated_blocks", "num_deduplicated", "Of these, blocks whose content was there already."),
    ("evicted_blocks", "num_evicted", "Cached blocks that gave way to leases."),
    ("corrupt_blocks", "num_corrupt", "Blocks whose bytes did not match their checksum."),
)


class ManagerCollector(Collector):
    """One manager as Prometheus' metrics. Collected on the event loop, which owns the lessor."""

    def __init__(self, lessor: Lessor, calls: CallMeter) -> None:
        self._lessor = lessor
        self._calls = calls

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        stats = translate.stats(self._lessor)
        yield from _of_stats(stats)
        yield from self._of_sessions()
        yield from self._of_calls()

    def _of_sessions(self) -> Iterable[Metric]:
        lessor = self._lessor
        family = GaugeMetricFamily(_PREFIX + "sessions", "Sessions of workers, by state.", labels=["state"])
        states = Counter(session.state for session in lessor.sessions())
        for state in (LIVE, REVOKED, ABSENT, ORPHANED):
            family.add_metric([state], float(states[state]))
        yield family
        yield CounterMetricFamily(
            _PREFIX + "lost_pools",
            "Pools in GPU memory, since the start, that no living worker could bring back: their cache was lost.",
            value=lessor.num_pools_lost,
        )
        yield GaugeMetricFamily(
            _PREFIX + "epoch", "Grows with every start on the same pool.", value=lessor.manager_epoch
        )
        stride = lessor.pool.files.data.header.shape.stride_bytes if lessor.pool is not None else 0
        yield GaugeMetricFamily(
            _PREFIX + "block_size_bytes", "Bytes of a block; 0: there is no pool yet.", value=stride
        )

    def _of_calls(self) -> Iterable[Metric]:
        calls = self._calls
        ended = CounterMetricFamily(_PREFIX + "calls", "Calls that ended.", labels=["method", "code"])
        for (method, code), count in calls.ended.items():
            ended.add_metric([method, code], float(count))
        yield ended
        streams = GaugeMetricFamily(_PREFIX + "open_streams", "Streaming calls that go on.", labels=["method"])
        for method, count in calls.open_streams.items():
            streams.add_metric([method], float(count))
        yield streams
        name = _PREFIX + "call_seconds"
        documentation = "Time of a call, with the wait for blocks that an Acquire or Extend asked for."
        yield histogram_family(name, documentation, calls.latencies, "method")


def _of_stats(stats: pb.StatsResponse) -> Iterable[Metric]:
    blocks = GaugeMetricFamily(_PREFIX + "blocks", "Blocks of the pool, by state.", labels=["state"])
    for state in _BLOCK_STATES:
        blocks.add_metric([state], float(getattr(stats, state)))
    yield blocks
    for name, field, documentation in _GAUGES:
        yield GaugeMetricFamily(_PREFIX + name, documentation, value=float(getattr(stats, field)))
    for name, field, documentation in _COUNTERS:
        yield CounterMetricFamily(_PREFIX + name, documentation, value=float(getattr(stats, field)))
