"""Runs one seed, and judges it: every stream exact, every block accounted for, nothing left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from clients.decoder import DecoderClient
from clients.errors import CallError, DeadlineError, ExhaustedError
from tests.chaos.director import Director
from tests.chaos.host import TTL_S, Host, ManagerView, Serving
from tests.chaos.oracle import Expected
from tests.chaos.plan import BLOCK_SIZES, DECODERS, FEWEST_TOKENS, MANAGER, Plan, StreamPlan, requests
from tests.e2e.followed import Followed, Pace, Sample, follow
from tests.e2e.pool_files import check_pool_files, held_locks
from tests.e2e.processes import silent_s

LIMIT_S = 180.0
RETURN_LIMIT_S = 60.0
_POLL_S = 0.1
# While no stream has got a token: where one request fills the pool, the others are refused until it has ended.
_MAX_EXHAUSTED = 400
_MAX_STANDSTILL_S = 30.0  # in which so many may be refused: one that is stopped may hold all blocks
# A manager that ticks counts nobody's silence for longer; after a gap of its own it gives everybody a whole TTL again.
_LONGEST_SILENCE_S = 1.5 * TTL_S
_TALLIED = ("preempted", "evicted", "hits", "deduplicated", "revoked")


class ChaosError(AssertionError):
    """A seed failed."""


@dataclass
class Report:
    """What came of a seed."""

    plan: Plan
    num_streams: int = 0
    num_samples: int = 0
    num_broken: int = 0
    num_resumed: int = 0
    num_exhausted: int = 0
    num_cached_tokens: int = 0
    num_quarantined: int = 0  # the most that was seen
    tally: Counter[str] = field(default_factory=Counter)  # what the manager counted, over all its lives
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""

    def __str__(self) -> str:
        plan = self.plan
        kinds = Counter(fault.split(" at ")[0] for fault in self.faults)
        faults = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in sorted(kinds.items()))
        what = f"FAILED: {self.problem}" if self.problem else "ok"
        return (
            f"seed {plan.seed}: {what} | {self.seconds:.1f} s, {plan.num_blocks} blocks of {plan.block_size},"
            f" {self.num_streams} streams of {self.num_samples} samples, broken {self.num_broken}, resumed {self.num_resumed}, exhausted"
            f" {self.num_exhausted}, cached {self.num_cached_tokens} tokens, quarantined {self.num_quarantined},"
            f" {', '.join(f'{name} {count}' for name, count in sorted(self.tally.items()))} | {faults}"
        )


@dataclass
class Run:
    """One seed's run, from its first process to its verdict."""

    host: Host
    expected: Sequence[Sequence[Expected]]
    report: Report
    on_progress: Callable[[str], None]
    pace: Pace = field(default_factory=Pace)
    streams: dict[int, Followed] = field(default_factory=dict)
    # How many tokens there were when a request was refused last, and how many were refused since there were fewer.
    _num_tokens: int = -1
    _num_fruitless: int = 0
    _moved_at: float = 0.0

    async def run(self) -> None:
        """Raises ChaosError, or another AssertionError, when the seed fails."""
        manager = ManagerView(self.host.address(MANAGER))
        try:
            await self.host.start_all()
            await self._disturbed(manager)
            await self._all_up()
            await self._everything_returns(manager)
        finally:
            await manager.close()
        self._judge_streams()
        self._judge_revocations()
        await self._stop_all()
        self._judge_files()

    async def _disturbed(self, manager: ManagerView) -> None:
        director = Director(self.host, manager, self.pace)
        async with DecoderClient(self.host.decoder_addresses) as client:
            streams = asyncio.gather(*(self._stream(client, i, s) for i, s in enumerate(self.host.plan.streams)))
            watch = asyncio.create_task(self._watch(manager))
            try:
                async with asyncio.timeout(LIMIT_S):
                    await director.run(streams)
                    await streams
            except TimeoutError:
                raise ChaosError(await self._stuck(manager)) from None
            finally:
                streams.cancel()
                watch.cancel()
                self.report.faults = [str(fault) for fault in director.done]
                await asyncio.gather(streams, return_exceptions=True)
            with suppress(asyncio.CancelledError):
                await watch

    async def _stream(self, client: DecoderClient, index: int, plan: StreamPlan) -> None:
        request = requests()[plan.request]
        request.request_id = f"stream-{index}"
        followed = self.streams.setdefault(index, Followed())
        jitter = random.Random(index)
        await self.pace.reach(plan.start_at)
        try:
            while True:
                with suppress(ExhaustedError):
                    return await self._follow(client, request, plan, followed)
                # A client that waits and asks again; a stream that is under way must not be refused.
                if followed.started is not None:
                    raise ChaosError(
                        f"stream {index} was refused for want of blocks after {len(followed.token_ids)} tokens"
                    )
                self._note_refusal()
                await asyncio.sleep(jitter.uniform(0.05, 0.5))
        except CallError as error:
            raise ChaosError(f"stream {index} failed after {len(followed.token_ids)} tokens: {error}") from error
        finally:
            self.pace.add(max(0, FEWEST_TOKENS - len(followed.token_ids)))

    def _note_refusal(self) -> None:
        self.report.num_exhausted += 1
        num_tokens = sum(len(followed.token_ids) for followed in self.streams.values())
        now = asyncio.get_running_loop().time()
        self._num_fruitless += 1
        if num_tokens != self._num_tokens:
            self._num_tokens, self._num_fruitless, self._moved_at = num_tokens, 0, now
        if self._num_fruitless > _MAX_EXHAUSTED and now > self._moved_at + _MAX_STANDSTILL_S:
            raise ChaosError(f"{_MAX_EXHAUSTED} requests were refused for want of blocks, and no stream got a token")

    async def _follow(self, client: DecoderClient, request: object, plan: StreamPlan, followed: Followed) -> None:
        try:
            await follow(
                client,
                request,  # type: ignore[arg-type]
                pace=self.pace,
                cancel_at=plan.cancel_at,
                timeout_s=plan.timeout_s,
                tenant=plan.tenant,
                into=followed,
            )
        except DeadlineError:
            if plan.timeout_s is None:
                raise

    async def _watch(self, manager: ManagerView) -> None:
        last: dict[str, int] = {}
        while True:
            stats = await manager.stats()
            num_done = sum(stream.finished is not None for stream in self.streams.values())
            blocks = "manager silent"
            if stats is not None:
                self.report.num_quarantined = max(self.report.num_quarantined, stats.quarantined)
                for name in _TALLIED:
                    count: int = getattr(stats, f"num_{name}")
                    # Less than before: another life of the manager.
                    self.report.tally[name] += count - last.get(name, 0) if count >= last.get(name, 0) else count
                    last[name] = count
                blocks = f"{stats.free} free, {stats.cached} cached, {stats.quarantined} quarantined"
            self.on_progress(
                f"seed {self.host.plan.seed}: {num_done}/{len(self.host.plan.streams)} streams,"
                f" {self.pace.num_tokens} tokens, {blocks}"
            )
            await asyncio.sleep(_POLL_S)

    async def _stuck(self, manager: ManagerView) -> str:
        open_streams = [i for i, s in self.streams.items() if s.finished is None]
        try:
            held = str(await manager.leases())
        except Exception as error:  # whatever keeps it from answering is worth telling
            held = repr(error)
        return f"streams not done within {LIMIT_S} s: {open_streams}\n{held}"

    async def _all_up(self) -> None:
        await self.host.wait_serving((MANAGER, *DECODERS))

    async def _everything_returns(self, manager: ManagerView) -> None:
        """All blocks are free to take, the sealed ones are whole, and when they are flushed all are free."""
        loop = asyncio.get_running_loop()
        end = loop.time() + RETURN_LIMIT_S
        while True:
            stats = await manager.stats()
            if stats is not None and stats.free + stats.cached == stats.num_blocks and stats.num_leases == 0:
                break
            if loop.time() > end:
                raise ChaosError(
                    f"blocks did not come back within {RETURN_LIMIT_S} s:\n{stats}\n{await manager.leases()}"
                )
            await asyncio.sleep(_POLL_S)
        scrubbed = await manager.scrub()
        if not scrubbed.done or scrubbed.num_corrupt or scrubbed.num_checked != stats.cached:
            raise ChaosError(f"the scrub did not pass, with {stats.cached} blocks cached:\n{scrubbed}")
        await manager.flush()
        stats = await manager.stats()
        if stats is None or stats.free != stats.num_blocks:
            raise ChaosError(f"not every block is free after a flush:\n{stats}")

    def _judge_streams(self) -> None:
        for index, plan in enumerate(self.host.plan.streams):
            stream = self.streams[index]
            self.report.num_streams += 1
            self.report.num_broken += len(stream.broken)
            self.report.num_resumed += len(stream.resumed)
            if any(not resumed.exact for resumed in stream.resumed):
                raise ChaosError(f"stream {index} was resumed inexactly")
            for sample_index, expected in enumerate(self.expected[plan.request]):
                sample = stream.sample(sample_index)
                where = (
                    f"stream {index} (request {plan.request}, sample {sample_index} of"
                    f" {len(self.expected[plan.request])}, {len(sample.token_ids)} tokens,"
                    f" resumed {len(stream.resumed)} times)"
                )
                _judge_sample(where, sample, expected)
                self.report.num_samples += 1
                if sample.finished is not None:
                    self.report.num_cached_tokens += sample.finished.num_cached_tokens
                elif plan.cancel_at is None and plan.timeout_s is None:
                    raise ChaosError(f"{where} did not finish")

    def _judge_revocations(self) -> None:
        """A manager that was stopped makes a leap in time, and nobody could be heard meanwhile: that is no decoder's silence."""
        for service in self.host.lives:
            for event in service.events("revoked"):
                if silent_s(event) > _LONGEST_SILENCE_S:
                    raise ChaosError(f"a manager counted its own standstill for a decoder's silence: {event}")

    async def _stop_all(self) -> None:
        for name in (*DECODERS, MANAGER):
            code = await self.host.terminate(name)
            if code != 0:
                raise ChaosError(f"{name} ended with {code} after SIGTERM")
        for service in self.host.lives:
            if service.has_traceback():
                raise ChaosError(f"a traceback in {service.log_path}")

    def _judge_files(self) -> None:
        locked = held_locks(self.host.pool_dir)
        if locked:
            raise ChaosError(f"locks are held still: {locked}")
        counts = check_pool_files(self.host.pool_dir, self.host.plan.block_size)
        if counts["free"] != self.host.plan.num_blocks:
            raise ChaosError(f"not every block is free in the files: {counts}")


def _judge_sample(where: str, sample: Sample, expected: Expected) -> None:
    """What came of it is the beginning of what it is undisturbed; finished, it is all of it."""
    num_tokens = len(sample.token_ids)
    if sample.token_ids != expected.token_ids[:num_tokens]:
        pairs = enumerate(zip(sample.token_ids, expected.token_ids, strict=False))
        differs = next((i for i, (found, wanted) in pairs if found != wanted), len(expected.token_ids))
        raise ChaosError(f"{where} differs from the undisturbed one from token {differs} on")
    if not expected.text.startswith(sample.text):
        raise ChaosError(f"{where} has another text: {sample.text!r}, not {expected.text!r}")
    if sample.finished is None:
        return
    if (sample.token_ids, sample.text) != (expected.token_ids, expected.text):
        raise ChaosError(f"{where} is not whole")
    ended = (sample.finished.reason, sample.finished.stop_string)
    if ended != (expected.reason, expected.stop_string):
        raise ChaosError(f"{where} ended with {ended}, not {expected.reason, expected.stop_string}")


async def run_seed(
    plan: Plan,
    directory: Path,
    serving: Serving,
    expected: Sequence[Sequence[Expected]],
    on_progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """One seed; `problem` of the report says why it failed, if it did."""
    assert plan.block_size in BLOCK_SIZES
    report = Report(plan)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with Host(directory, plan, serving) as host:
        try:
            await Run(host, expected, report, on_progress).run()
        except* Exception as group:
            report.problem = "; ".join(f"{type(e).__name__}: {e}" for e in _leaves(group))
    report.seconds = loop.time() - began
    return report


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
