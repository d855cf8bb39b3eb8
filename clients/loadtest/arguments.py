"""What `leasehold loadtest` may be told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from clients.cli import values
from clients.loadtest.arrivals import PATTERNS
from clients.loadtest.chaos import parse_troubles
from clients.loadtest.figures import parse_service_level
from clients.loadtest.lengths import SpecError, parse_numbers, parse_shares
from clients.probes import TASKS

ACTIONS = ("run", "sweep", "compare")

EXAMPLES = """\
examples:
  leasehold loadtest --users 16 --duration 20      a closed loop: each of 16 users asks, waits, asks again
  leasehold loadtest --rate 8 --html report.html   an open loop: Poisson arrivals, never held back by slow answers
  leasehold loadtest --rate 1,20 --arrivals ramp --prompts tokens --prompt-tokens 64-256 --output-tokens 32
  leasehold loadtest --users 8 --turns 4 --think 1-3 --shared-prefix 100
  leasehold loadtest --up --model demo --decoders 2 --rate 10 --chaos 5:kill:decoder-1,10:start:decoder-1
                                                   its own services, one of which is killed and comes back
  leasehold loadtest sweep --slo ttft=0.5,tpot=0.05
                                                   raise the load until the service level breaks
  leasehold loadtest compare before.jsonl after.jsonl

Answers are checked while under load: the default prompts are questions with one right answer (for the bundled model);
--verify recorded compares token by token with a run of one request at a time. Latencies count from when a request was
due, so a server that stalls cannot hide it. A TTFT holds the queue time; an ITL is the time between arrivals of tokens.
exit codes: 0 every request ended as it should, 1 some failed or were wrong, 2 wrong usage, 130 Ctrl-C
"""

_T = TypeVar("_T")


def spec(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """A parser for argparse of one that raises SpecError."""

    def parse_argument(text: str) -> _T:
        try:
            return parse(text)
        except SpecError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


def rates(text: str) -> list[float]:
    """Numbers of 0 or more with commas between them."""
    parse = values.number(0, 1e6)
    return [parse(part.strip()) for part in text.split(",")]


def add_loadtest(parser: argparse.ArgumentParser, add_stack_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds the actions of the load test; without one, `run` is meant."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    run = actions.add_parser("run", help="send one load (what happens without an ACTION)", allow_abbrev=False)
    sweep = actions.add_parser("sweep", help="raise the load until the service level breaks", allow_abbrev=False)
    compare = actions.add_parser("compare", help="put two runs side by side", allow_abbrev=False)
    for action in (run, sweep):
        _add_system(action, add_stack_flags)
        _add_load(action)
        _add_prompts(action)
        _add_mix(action)
        _add_output(action)
    run.add_argument(
        "--chaos",
        type=spec(parse_troubles),
        default=[],
        metavar="AT:ACTION:NAME,...",
        help="kill, stop, start, restart, freeze or thaw processes of --up, AT seconds after the start",
    )
    sweep.add_argument("--loads", type=rates, metavar="1,2,4", help="the loads to try (doubled from --rate or --users)")
    sweep.add_argument("--attain", type=values.number(0, 1), default=0.95, metavar="SHARE", help="(%(default)g)")
    sweep.add_argument("--refine", type=values.whole(0, 10), default=3, metavar="N", help="halvings at the knee (3)")
    compare.add_argument("first", metavar="A.jsonl", help="a run that --jsonl wrote")
    compare.add_argument("second", metavar="B.jsonl", help="another one")


def _add_system(parser: argparse.ArgumentParser, add_stack_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    group = parser.add_argument_group("the system under load")
    group.add_argument("--decoder", type=values.target, action="append", metavar="HOST:PORT", help="repeatable")
    group.add_argument("--kv-manager", type=values.target, metavar="HOST:PORT", help="its pool is watched, if given")
    group.add_argument(
        "--metrics",
        type=values.target,
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a decoder's Prometheus endpoint, for the step time by part; repeatable",
    )
    group.add_argument("--up", action="store_true", help="start a manager and decoders, and stop them at the end")
    group.add_argument("--model", default="demo", metavar="DIR", help="with --up: the checkpoint (%(default)s)")
    add_stack_flags(parser)


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the load")
    loop = group.add_mutually_exclusive_group()
    loop.add_argument("--users", type=values.whole(1, 100_000), metavar="N", help="closed loop of N users (8)")
    loop.add_argument("--rate", type=rates, metavar="R[,R...]", help="open loop of R conversations a second")
    group.add_argument("--arrivals", choices=PATTERNS, default="poisson", help="pattern of an open loop (%(default)s)")
    group.add_argument("--burst-size", type=values.whole(1, 100_000), default=8, metavar="N", help="(%(default)s)")
    add = group.add_argument
    add("--duration", type=values.number(0, 1e6, above=True), default=30.0, metavar="S", help="of arrivals (30)")
    add("--conversations", type=values.whole(1, 10**9), metavar="N", help="end after so many, if sooner")
    add("--warmup", type=values.seconds, default=0.0, metavar="S", help="leave requests due before out of the figures")
    add("--drain", type=values.seconds, default=60.0, metavar="S", help="how long requests may go on at the end (60)")
    add("--ramp-up", type=values.seconds, default=0.0, metavar="S", help="over which the users begin (0)")
    add("--think", type=spec(parse_numbers), default="0", metavar="S|A-B|@FILE", help="seconds between turns (0)")
    add("--retry-for", type=values.seconds, default=30.0, metavar="S", help="seconds a stream waits for a decoder (30)")
    add("--load-seed", type=values.whole(0, 2**63), default=0, metavar="N", help="fixes prompts and arrivals (0)")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    add = group.add_argument
    add(
        "--prompts",
        choices=("probes", "tokens", "file"),
        default="probes",
        help="questions with one right answer, random token ids, or --requests-file (%(default)s)",
    )
    add("--tasks", default="recall", metavar="A,B", help=f"kinds of probes: {', '.join(TASKS)} (%(default)s)")
    add("--prompt-tokens", type=spec(_length), default="128", metavar="N|A-B|@FILE", help="with tokens (128)")
    add("--output-tokens", type=spec(_length), default="64", metavar="N|A-B|@FILE", help="with tokens (64)")
    add("--requests-file", metavar="FILE", help="JSON lines: prompt, token_ids or messages; max_tokens, answer")
    add("--turns", type=values.whole(1, 1000), default=1, metavar="N", help="turns of a conversation (1)")
    add("--shared-prefix", type=values.whole(0, 10**6), default=0, metavar="N", help="tokens (words, with probes)")
    add("--prefixes", type=values.whole(1, 10**6), default=1, metavar="N", help="how many different prefixes (1)")
    add("--temperature", type=values.number(0, 1e3), default=0.0, metavar="T", help="(%(default)g)")
    add(
        "--verify",
        choices=("auto", "recorded", "none"),
        default="auto",
        help="auto checks known answers; recorded compares with a run of one request at a time",
    )
    add("--distinct", type=values.whole(1, 10**6), default=16, metavar="N", help="conversations of recorded (16)")


def _add_mix(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mixed in, by share from 0 to 1")
    add = group.add_argument
    add("--cancel-share", type=values.number(0, 1), default=0.0, metavar="SHARE", help="cancelled after some tokens")
    add("--deadline-share", type=values.number(0, 1), default=0.0, metavar="SHARE", help="given a deadline")
    add("--deadline", type=values.number(0, 1e6, above=True), default=1.0, metavar="S", help="of these, seconds (1)")
    add("--priority", type=spec(parse_shares), action="append", default=[], metavar="P=SHARE", help="repeatable")
    add("--tenant", type=spec(parse_shares), action="append", default=[], metavar="NAME=SHARE", help="repeatable")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what comes out")
    add = group.add_argument
    add("--slo", type=spec(parse_service_level), metavar="ttft=S,tpot=S,e2e=S", help="the service level of goodput")
    add("--label", default="", metavar="TEXT", help="names the run in reports")
    add("--html", metavar="FILE", help="write one self-contained report")
    add("--jsonl", metavar="FILE", help="write every record as JSON lines, for machines and for compare")
    add("--json", action="store_true", help="print the figures as one JSON object instead of a table")
    add("--quiet", action="store_true", help="no display while it runs")


def _length(text: str) -> object:
    return parse_numbers(text, minimum=1)
