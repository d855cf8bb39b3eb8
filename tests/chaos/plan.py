"""What a seed stands for: the pool, the requests, and the faults. Nothing here depends on time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

from protos import decoder_pb2 as pb

VOCAB_SIZE = 320
BLOCK_SIZES = (8, 16, 32)
MAX_PROMPT = 90
MAX_TOKENS = 70
NUM_REQUESTS = 64
MAX_SAMPLES = 3
NUM_STREAMS = 24
FEWEST_TOKENS = 4  # that a stream makes, or is credited with when it ends

MANAGER = "manager"
DECODERS = ("decoder-0", "decoder-1")


class Kind(Enum):
    """What is done to a process."""

    KILL = "kill -9, and start again"
    TERMINATE = "SIGTERM, and start again"
    PAUSE = "SIGSTOP for a moment"
    HANG = "SIGSTOP past the TTL, then SIGCONT"
    HANG_KILL = "SIGSTOP past the TTL, then kill -9, and start again"
    FLUSH = "drop everything that is cached"
    SCRUB = "verify everything that is sealed"


@dataclass(frozen=True)
class Fault:
    """Begins when the streams have at_tokens tokens in all, and ends after for_tokens more, or after for_s seconds."""

    target: str
    kind: Kind
    at_tokens: int
    for_tokens: int
    for_s: float

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.target} at {self.at_tokens}"


@dataclass(frozen=True)
class StreamPlan:
    """One client: which request it sends, and when it begins and gives up."""

    request: int  # index into `requests()`
    tenant: str
    start_at: int  # tokens of all streams
    cancel_at: int | None = None  # tokens of its own
    timeout_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """One seed."""

    seed: int
    block_size: int
    num_blocks: int
    max_seqs: int
    max_num_batched_tokens: int
    reserve_full: bool
    streams: tuple[StreamPlan, ...]
    faults: tuple[Fault, ...]


def requests() -> list[pb.GenerateRequest]:
    """The requests that all seeds draw from: shared prefixes, repeats, several samples, greedy or not, with and without penalties."""
    rng = random.Random(4)
    prefixes = [_tokens(rng, MAX_PROMPT - 10) for _ in range(4)]
    # The same blocks after other blocks: content that is the same and means another K/V.
    segments = [_tokens(rng, max(BLOCK_SIZES)) for _ in range(3)]
    prefixes += [[*rng.choice(segments), *rng.choice(segments), *_tokens(rng, 16)] for _ in range(4)]
    return [_request(rng, rng.choice(prefixes)) for _ in range(NUM_REQUESTS)]


def _tokens(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(num)]


def _request(rng: random.Random, prefix: list[int]) -> pb.GenerateRequest:
    prompt = prefix[: rng.randint(len(prefix) // 4, len(prefix))] + _tokens(rng, rng.randint(1, 10))
    sampling = pb.SamplingParams()
    if rng.random() < 0.5:
        sampling = pb.SamplingParams(temperature=rng.choice([0.5, 1.0]), seed=rng.randrange(2**53))
        sampling.top_k = rng.choice([0, 0, 20])
        sampling.top_p = rng.choice([1.0, 0.9])
        sampling.presence_penalty = rng.choice([0.0, 0.5])
        sampling.repetition_penalty = rng.choice([1.0, 1.1])
    stop = pb.StopConditions(max_tokens=rng.randint(15, MAX_TOKENS), ignore_eos=True)
    if rng.random() < 0.3:  # what may come at any moment, or never
        stop.strings.extend(["e", "th", "\N{REPLACEMENT CHARACTER}" * 4])
        stop.token_ids.extend(_tokens(rng, 3))
    # Parallel samples: forks of one lease, which the smallest pools have to compute one after the other.
    num_samples = rng.choice([1, 1, 1, 2, MAX_SAMPLES])
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, stop=stop, n=num_samples)


def make_plan(seed: int) -> Plan:
    """The plan of a seed."""
    rng = random.Random(seed)
    block_size = rng.choice(BLOCK_SIZES)
    most = -(-(MAX_PROMPT + MAX_TOKENS) // block_size)  # blocks of the longest request
    streams = tuple(_stream(rng, index) for index in range(NUM_STREAMS))
    all_requests = requests()
    asked = [all_requests[stream.request] for stream in streams]
    num_tokens = sum(request.stop.max_tokens * request.n for request in asked)
    max_seqs = rng.choice([4, 8, 32])
    return Plan(
        seed=seed,
        block_size=block_size,
        # From a pool that holds little more than one request to one that holds all of them.
        num_blocks=int(most * rng.choice([1.2, 2, 4, 20])) + 1,
        max_seqs=max_seqs,
        max_num_batched_tokens=rng.choice([max_seqs, 32, 200]),
        reserve_full=rng.random() < 0.2,
        streams=streams,
        faults=tuple(_fault(rng, num_tokens) for _ in range(rng.randint(3, 7))),
    )


def _stream(rng: random.Random, index: int) -> StreamPlan:
    cancel_at = timeout_s = None
    ending = rng.random()
    if ending < 0.15:
        cancel_at = rng.randint(1, 20)
    elif ending < 0.25:
        timeout_s = rng.uniform(0.1, 4.0)
    return StreamPlan(
        request=rng.randrange(NUM_REQUESTS),
        tenant=rng.choice(["", "", "", "other"]),
        start_at=rng.randint(0, FEWEST_TOKENS * index),
        cancel_at=cancel_at,
        timeout_s=timeout_s,
    )


def _fault(rng: random.Random, num_tokens: int) -> Fault:
    target = rng.choice([MANAGER, MANAGER, *DECODERS, *DECODERS])
    kinds = [Kind.KILL, Kind.KILL, Kind.TERMINATE, Kind.PAUSE, Kind.HANG, Kind.HANG_KILL]
    kind = rng.choice([*kinds, Kind.FLUSH, Kind.SCRUB] if target == MANAGER else kinds)
    return Fault(target, kind, int(num_tokens * rng.uniform(0, 0.6)), rng.randint(5, 120), rng.uniform(0.05, 1.5))
