"""`leasehold loadtest`: one run, a sweep, or a comparison of two runs."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.cli.messages import describe, say
from clients.decoder import DecoderClient
from clients.errors import ClientError
from clients.kv_manager import KvManagerClient
from clients.loadtest import monitors
from clients.loadtest.arrivals import Arrivals
from clients.loadtest.chaos import check_names, make_trouble
from clients.loadtest.driver import Driver, Plan, Reference, record_reference
from clients.loadtest.figures import ServiceLevel, failures, summarize
from clients.loadtest.html_report import render
from clients.loadtest.lengths import SpecError
from clients.loadtest.live import Live
from clients.loadtest.records import RunRecord, to_lines
from clients.loadtest.system import System, open_system, print_service_line
from clients.loadtest.tables import compare_text, run_text, sweep_text
from clients.loadtest.workload import FileWorkload, Mix, ProbeWorkload, RepeatedWorkload, TokenWorkload, Workload
from clients.loadtest.workload import read_requests as read_request_file
from clients.probes import TASKS
from protos import decoder_pb2 as pb

DEFAULT_USERS = 8
_HIGHEST_LOAD = 1e6


async def run(args: argparse.Namespace, default_decoder: str) -> int:
    """Does what the flags say and returns the exit code; a cancellation is passed on after the figures are out."""
    try:
        if args.action == "compare":
            print(compare_text(read_summary(args.first), read_summary(args.second)))
            return 0
        plan = make_plan(args)
        if args.action == "run" and args.chaos and not args.up:
            raise SpecError("--chaos: works on processes of its own only; give --up")
        async with open_system(args, default_decoder) as system:
            bench = await Bench.open(args, system)
            return await (_sweep(bench, plan) if args.action == "sweep" else _run_once(bench, plan))
    except (ClientError, SpecError, OSError) as error:
        say(describe(error) if isinstance(error, ClientError) else str(error))
        return 2 if isinstance(error, SpecError) else 1


@dataclass
class Bench:
    """A system and a workload, ready for any number of runs."""

    args: argparse.Namespace
    system: System
    workload: Workload
    reference: Reference | None

    @classmethod
    async def open(cls, args: argparse.Namespace, system: System) -> Bench:
        """Asks the model what it is, and records the reference run where one is wanted."""
        if args.action == "run":
            check_names(args.chaos, system.processes)
        async with DecoderClient(system.decoders) as client:
            info = await client.model_info(retry_for_s=args.retry_for)
            workload = make_workload(args, info, calm=False)
            reference: Reference | None = None
            if args.verify == "recorded":
                workload = RepeatedWorkload(workload, args.distinct)
                say(f"recording {args.distinct} conversations, one request at a time")
                calm = RepeatedWorkload(make_workload(args, info, calm=True), args.distinct)
                reference = await record_reference(client.generate, calm, args.distinct)
        return cls(args, system, workload, reference)

    async def measure(self, plan: Plan, label: str) -> tuple[RunRecord, asyncio.CancelledError | None]:
        """One run; when it is cancelled, what came so far and the cancellation."""
        record = RunRecord(label, _settings(self.args))
        cancelled: asyncio.CancelledError | None = None
        # What lives now lives on: the collector need not walk it, which took tens of milliseconds, again and again.
        gc.collect()
        gc.freeze()
        async with AsyncExitStack() as closing:
            client = await closing.enter_async_context(DecoderClient(self.system.decoders))
            driver = Driver(
                client.generate, self.workload, plan, record, self.reference, reference_size=self.args.distinct
            )
            watchers = self._watchers(driver, closing)
            try:
                await driver.drive()
            except asyncio.CancelledError as error:
                cancelled = error
            finally:
                for watcher in watchers:
                    watcher.cancel()
                for result in await asyncio.gather(*watchers, return_exceptions=True):
                    if isinstance(result, Exception):
                        say(f"beside the load: {describe_any(result)}")
                gc.unfreeze()
        return record, cancelled

    def _watchers(self, driver: Driver, closing: AsyncExitStack) -> list[asyncio.Task[None]]:
        args, record, now_s = self.args, driver.run, driver.now_s
        work = [monitors.watch_lag(record, now_s)]
        if self.system.manager is not None:
            manager = KvManagerClient(self.system.manager)
            closing.push_async_callback(manager.close)
            work.append(monitors.watch_pool(record, now_s, manager))
        work += [monitors.watch_steps(record, now_s, address) for address in args.metrics]
        if not args.quiet:
            work.append(Live(driver).show())
        if args.action == "run" and args.chaos:
            work.append(make_trouble(args.chaos, self.system.processes, now_s, record.marks, print_service_line))
        return [asyncio.create_task(one) for one in work]


async def _run_once(bench: Bench, plan: Plan) -> int:
    args = bench.args
    record, cancelled = await bench.measure(plan, args.label)
    summary = summarize(record, args.slo or ServiceLevel(), args.warmup)
    leases_left = 0 if cancelled else await bench.system.leases_left()
    print(json.dumps(summary) if args.json else run_text(summary), flush=True)
    if args.jsonl:
        _write_lines(args.jsonl, to_lines(record, summary))
    if args.html:
        _write(args.html, render(record, summary))
    if cancelled:
        raise cancelled
    if leases_left:
        say(f"{leases_left} leases were not given back")
    return 1 if failures(summary) or leases_left else 0


async def _sweep(bench: Bench, plan: Plan) -> int:
    args = bench.args
    if args.slo is None:
        raise SpecError("--slo: a sweep needs a service level to break, as in ttft=1,tpot=0.1")
    levels: list[tuple[float, dict[str, Any]]] = []

    async def keeps(load: float) -> bool:
        record, cancelled = await bench.measure(with_load(plan, load), f"{load:g}")
        if cancelled:
            raise cancelled
        summary = summarize(record, args.slo, args.warmup)
        levels.append((load, summary))
        say(f"load {load:g}: {summary['good_share']:.1%} good")
        return bool(summary["good_share"] >= args.attain)

    whole = plan.arrivals is None
    first = float(plan.users) if plan.arrivals is None else plan.arrivals.rates[0]
    knee = await find_knee(keeps, args.loads, first, args.refine, whole)
    if args.json:
        print(json.dumps({"knee": knee, "levels": [{"load": load, **summary} for load, summary in levels]}))
    else:
        print(sweep_text(levels, knee, "users" if whole else "conversations/s"))
    if args.jsonl:
        _write_lines(args.jsonl, [{"type": "level", "load": load, **summary} for load, summary in levels])
    return 1 if any(summary["requests"]["wrong"] for _, summary in levels) else 0


async def find_knee(
    keeps: Callable[[float], Any], loads: list[float] | None, first: float, refine: int, whole: bool
) -> float | None:
    """The highest load that keeps the level: doubled (or as listed) until it breaks, then halved in between."""
    good: float | None = None
    bad: float | None = None
    load = sorted(loads)[0] if loads else first
    rest = sorted(loads)[1:] if loads else []
    while load <= _HIGHEST_LOAD:
        if not await keeps(load):
            bad = load
            break
        good = load
        if loads and not rest:
            break
        load = rest.pop(0) if rest else load * 2
    if good is None or bad is None:
        return good
    for _ in range(refine):
        middle = round((good + bad) / 2) if whole else (good + bad) / 2
        if middle in (good, bad):
            break
        if await keeps(middle):
            good = middle
        else:
            bad = middle
    return good


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan of the flags; raises SpecError for ones that contradict each other."""
    arrivals = None
    if args.rate is not None:
        arrivals = Arrivals(args.arrivals, args.rate, args.duration, args.burst_size)
    return Plan(
        duration_s=args.duration,
        drain_s=args.drain,
        arrivals=arrivals,
        users=args.users or DEFAULT_USERS,
        ramp_up_s=args.ramp_up,
        think_s=args.think,
        max_conversations=args.conversations,
        retry_for_s=args.retry_for,
        seed=args.load_seed,
    )


def with_load(plan: Plan, load: float) -> Plan:
    """The plan with another load: users of a closed loop, conversations a second of an open one."""
    values = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    if plan.arrivals is None:
        values["users"] = max(1, round(load))
    else:
        scale = load / plan.arrivals.rates[0]
        rates = [rate * scale for rate in plan.arrivals.rates]
        values["arrivals"] = Arrivals(plan.arrivals.pattern, rates, plan.duration_s, plan.arrivals.burst_size)
    return Plan(**values)


def make_workload(args: argparse.Namespace, info: pb.GetModelInfoResponse, calm: bool) -> Workload:
    """The workload of the flags; a `calm` one has the same prompts without cancellations and deadlines."""
    mix = Mix(
        cancel_share=0.0 if calm else args.cancel_share,
        deadline_share=0.0 if calm else args.deadline_share,
        deadline_s=args.deadline,
        priorities=_whole_names(args.priority),
        tenants=args.tenant,
        temperature=args.temperature,
    )
    if args.prompts == "file":
        if not args.requests_file:
            raise SpecError("--requests-file: --prompts file needs one")
        return FileWorkload(read_request_file(args.requests_file), mix, args.load_seed)
    if args.prompts == "tokens":
        return TokenWorkload(
            args.prompt_tokens,
            args.output_tokens,
            info.vocab_size,
            args.turns,
            mix,
            args.load_seed,
            args.shared_prefix,
            args.prefixes,
        )
    if not info.has_chat_template:
        raise SpecError(f"--prompts: {info.name} has no chat template, which probes need; use --prompts tokens")
    tasks = [task.strip() for task in args.tasks.split(",")]
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise SpecError(f"--tasks: {unknown[0]!r} is none of {', '.join(TASKS)}")
    return ProbeWorkload(tasks, args.turns, mix, args.load_seed, args.shared_prefix, args.prefixes)


def read_summary(path: str) -> dict[str, Any]:
    """The figures of a run that --jsonl wrote; raises SpecError when there are none."""
    summary: dict[str, Any] | None = None
    with Path(path).open() as lines:
        for line in lines:
            if '"type": "summary"' in line:
                summary = json.loads(line)
    if summary is None:
        raise SpecError(f"{path} holds no run; write one with `leasehold loadtest --jsonl FILE`")
    summary["label"] = summary["label"] or Path(path).stem
    return summary


def describe_any(error: BaseException) -> str:
    """The first error of a group, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return describe(error) if isinstance(error, ClientError) else repr(error)


def _write_lines(path: str, lines: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(line) + "\n" for line in lines))


def _write(path: str, text: str) -> None:
    Path(path).expanduser().write_text(text, encoding="utf-8")


def _whole_names(shares: list[tuple[str, float]]) -> list[tuple[str, float]]:
    for name, _ in shares:
        if not name.removeprefix("-").isdigit():
            raise SpecError(f"--priority: {name!r} is no whole number; write P=SHARE, as in 5=0.1")
    return shares


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as they go into reports."""
    return {key: str(value) for key, value in vars(args).items()}
