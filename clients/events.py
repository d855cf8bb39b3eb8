"""What a stream of DecoderClient.generate is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from clients.errors import CallError


class FinishReason(Enum):
    """Why a sample ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, before temperature and filters; `top` in falling order."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]]  # (token id, logprob)


@dataclass(frozen=True, slots=True)
class Started:
    """The request was taken: once a stream, before any token. Everything in it is resolved."""

    request_id: str
    target: str
    prompt_token_ids: Sequence[int]
    seed: int
    max_tokens: int
    numerics_id: str
    num_cached_tokens: int  # prompt tokens whose K/V was there already


@dataclass(frozen=True, slots=True)
class Tokens:
    """More of one sample: its tokens from `position` on, and more of its text, which may lag behind the tokens."""

    sample_index: int
    position: int  # index of the first token among all generated ones
    token_ids: Sequence[int]
    text: str
    logprobs: Sequence[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class Finished:
    """One sample is complete."""

    sample_index: int
    reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    stop_string: str
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class StreamBroken:
    """The stream broke off, and the client tries again after `retry_in_s` seconds, at `next_target`."""

    error: CallError
    retry_in_s: float
    next_target: str


@dataclass(frozen=True, slots=True)
class StreamResumed:
    """The stream goes on at `target`.

    `exact` is False when tokens were made by a decoder of another numerics id: those to come may differ from what
    the first decoder would have made.
    """

    target: str
    exact: bool
    num_output_tokens: int  # kept from before, over all samples


Event = Started | Tokens | Finished | StreamBroken | StreamResumed
