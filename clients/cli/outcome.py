"""What came of one request, however it ended: gathered event by event, printed at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from clients.cli.messages import error_object
from clients.errors import ClientError
from clients.events import Event, Finished, Started, StreamResumed, TokenLogprobs, Tokens

CANCELLED = "cancelled"
DEADLINE = "deadline"
ERROR = "error"


@dataclass
class SampleOutcome:
    """What came of one sample."""

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The text that was delivered."""
        return "".join(self.pieces)

    def to_object(self, with_logprobs: bool) -> dict[str, object]:
        """Its part of the object that `--json` prints."""
        result: dict[str, object] = {
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
        }
        if with_logprobs:
            result["logprobs"] = [
                {
                    "token_id": item.token_id,
                    "logprob": item.logprob,
                    "top": [{"token_id": token_id, "logprob": logprob} for token_id, logprob in item.top],
                }
                for item in self.logprobs
            ]
        return result


@dataclass
class Outcome:
    """The state of one request; `clock` gives seconds, and `seed` is the one that is sent."""

    seed: int
    clock: Callable[[], float]
    num_samples: int = 1
    began: float = field(init=False)
    samples: list[SampleOutcome] = field(init=False)
    num_prompt_tokens: int | None = None  # None: no decoder took the request
    num_cached_tokens: int | None = None
    ttft_s: float | None = None
    e2e_s: float = 0.0
    num_resumptions: int = 0
    exact_resume: bool = True
    error: ClientError | None = None

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.samples = [SampleOutcome() for _ in range(self.num_samples)]

    @property
    def is_whole(self) -> bool:
        """Whether every sample came to its own end."""
        return all(sample.finish_reason in ("stop", "length") for sample in self.samples)

    def take(self, event: Event) -> None:
        """Counts an event in."""
        if isinstance(event, Tokens):
            if self.ttft_s is None and event.token_ids:
                self.ttft_s = self.clock() - self.began
            sample = self.samples[event.sample_index]
            sample.token_ids.extend(event.token_ids)
            sample.logprobs.extend(event.logprobs)
            sample.pieces.append(event.text)
        elif isinstance(event, Started):
            self.seed = event.seed
            self.num_prompt_tokens = len(event.prompt_token_ids)
            self.num_cached_tokens = event.num_cached_tokens
        elif isinstance(event, StreamResumed):
            self.num_resumptions += 1
            self.exact_resume = self.exact_resume and event.exact
        elif isinstance(event, Finished):
            self.num_prompt_tokens = event.num_prompt_tokens
            if event.sample_index == 0:  # the others find what it has computed
                self.num_cached_tokens = event.num_cached_tokens
            self.samples[event.sample_index].finish_reason = event.reason.value

    def end(self, finish_reason: str | None = None, error: ClientError | None = None) -> None:
        """Stops the clock; `finish_reason` says why, where no Finished event does."""
        self.e2e_s = self.clock() - self.began
        self.error = error
        if finish_reason is not None:
            for sample in self.samples:
                # What had finished did so, whatever became of the others.
                sample.finish_reason = sample.finish_reason or finish_reason

    def to_object(self, with_logprobs: bool) -> dict[str, object]:
        """The one object that `--json` prints: the fields of sample 0, and all samples when there are more."""
        result = self.samples[0].to_object(with_logprobs) | {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "seed": self.seed,
            "ttft_s": self.ttft_s,
            "e2e_s": self.e2e_s,
        }
        if self.num_samples > 1:
            result["samples"] = [
                {"sample_index": index, **sample.to_object(with_logprobs)} for index, sample in enumerate(self.samples)
            ]
        if self.num_resumptions:
            result["num_resumptions"] = self.num_resumptions
            result["exact_resume"] = self.exact_resume
        if self.error is not None:
            result["error"] = error_object(self.error)
        return result

    def summary(self) -> str:
        """One line about the request for people."""
        count = sum(len(sample.token_ids) for sample in self.samples)
        parts = [f"{self.samples[0].finish_reason}", f"{count} tokens"]
        if self.num_samples > 1:
            parts = [f"{self.num_samples} samples", f"{count} tokens"]
        if self.num_prompt_tokens is not None:
            parts.append(f"prompt {self.num_prompt_tokens} ({self.num_cached_tokens} cached)")
        if self.ttft_s is not None:
            parts.append(f"first token after {self.ttft_s:.3f} s")
            rest_s = self.e2e_s - self.ttft_s
            if count > 1 and rest_s > 0:
                parts.append(f"{(count - 1) / rest_s:.1f} tokens/s")
        parts.append(f"seed {self.seed}")
        return ", ".join(parts)
