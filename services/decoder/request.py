"""What the engine is asked to do, and what it answers: the border between the server's event loop and the engine's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from services.decoder.errors import DecoderError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; already validated. temperature 0 is greedy, top_k 0 keeps all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # uint64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


# Stands in no client's request id, because those are printable.
_SAMPLE_SEPARATOR = "\0"


def sample_id(request_id: str, sample_index: int) -> str:
    """The engine's id of one sample of a client's request."""
    return f"{request_id}{_SAMPLE_SEPARATOR}{sample_index}" if sample_index else request_id


def request_id_of(sample_id: str) -> str:
    """The client's own id of the request that a sample belongs to."""
    return sample_id.partition(_SAMPLE_SEPARATOR)[0]


@dataclass(frozen=True)
class DecodeRequest:
    """One sample of one request, with everything resolved and checked against the model's limits."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    max_tokens: int  # generated tokens, those of before a resumption included
    output_token_ids: Sequence[int] = ()  # generated before a resumption
    sample_index: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    num_logprobs: int | None = None  # alternatives beside the sampled token; None: no logprobs
    priority: int = 0
    tenant: str = ""
    age_ticket: int | None = None
    is_resumed: bool = False  # a decoder had started it before; never refused for want of room in the queue

    @property
    def log_ids(self) -> dict[str, str | int]:
        """What a log line about it names: the client's own id, and the sample when it is not the first."""
        return {
            "request_id": request_id_of(self.request_id),
            **({"sample_index": self.sample_index} if self.sample_index else {}),
        }


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, before temperature and filters."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]]  # (token id, logprob), in falling order


@dataclass(frozen=True)
class Admitted:
    """The request has its blocks and runs from now on. Sent once, before the first token."""

    num_cached_tokens: int
    age_ticket: int | None
    cache_id: int = field(default=0, compare=False)  # of its lease, for the logs; 0: none


@dataclass(slots=True)  # not frozen, which takes four times as long to make: there is one for every token
class Token:
    """One more generated token, a stop token included; `position` counts from 0 over all generated tokens. Nobody changes it."""

    position: int
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Finished:
    """The request ended and its blocks are on their way back."""

    reason: FinishReason
    num_output_tokens: int
    num_cached_tokens: int
    stop_token_id: int | None = None


@dataclass(frozen=True)
class Failed:
    """The request ended with an error and its blocks are on their way back."""

    error: DecoderError


Event = Admitted | Token | Finished | Failed

# Called by the engine's thread, once a step, with (request_id, event) pairs in order. It must not block.
Emit = Callable[[Sequence[tuple[str, Event]]], None]
