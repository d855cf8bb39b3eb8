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
class Outcome:
    """The state of one request; `clock` gives seconds, and `seed` is the one that is sent."""

    seed: int
    clock: Callable[[], float]
    began: float = field(init=False)
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None  # None: no decoder took the request
    num_cached_tokens: int | None = None
    ttft_s: float | None = None
    e2e_s: float = 0.0
    num_resumptions: int = 0
    exact_resume: bool = True
    error: ClientError | None = None

    def __post_init__(self) -> None:
        self.began = self.clock()

    @property
    def text(self) -> str:
        """The text that was delivered."""
        return "".join(self.pieces)

    def take(self, event: Event) -> None:
        """Counts an event in."""
        if isinstance(event, Tokens):
            if self.ttft_s is None and event.token_ids:
                self.ttft_s = self.clock() - self.began
            self.token_ids.extend(event.token_ids)
            self.logprobs.extend(event.logprobs)
            self.pieces.append(event.text)
        elif isinstance(event, Started):
            self.seed = event.seed
            self.num_prompt_tokens = len(event.prompt_token_ids)
            self.num_cached_tokens = event.num_cached_tokens
        elif isinstance(event, StreamResumed):
            self.num_resumptions += 1
            self.exact_resume = self.exact_resume and event.exact
        elif isinstance(event, Finished):
            self.num_prompt_tokens = event.num_prompt_tokens
            self.num_cached_tokens = event.num_cached_tokens
            self.finish_reason = event.reason.value

    def end(self, finish_reason: str | None = None, error: ClientError | None = None) -> None:
        """Stops the clock; `finish_reason` says why, where no Finished event does."""
        self.e2e_s = self.clock() - self.began
        self.error = error
        if finish_reason is not None:
            self.finish_reason = finish_reason

    def to_object(self, with_logprobs: bool) -> dict[str, object]:
        """The one object that `--json` prints."""
        result: dict[str, object] = {
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "seed": self.seed,
            "ttft_s": self.ttft_s,
            "e2e_s": self.e2e_s,
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
        if self.num_resumptions:
            result["num_resumptions"] = self.num_resumptions
            result["exact_resume"] = self.exact_resume
        if self.error is not None:
            result["error"] = error_object(self.error)
        return result

    def summary(self) -> str:
        """One line about the request for people."""
        count = len(self.token_ids)
        parts = [f"{self.finish_reason}", f"{count} tokens"]
        if self.num_prompt_tokens is not None:
            parts.append(f"prompt {self.num_prompt_tokens} ({self.num_cached_tokens} cached)")
        if self.ttft_s is not None:
            parts.append(f"first token after {self.ttft_s:.3f} s")
            rest_s = self.e2e_s - self.ttft_s
            if count > 1 and rest_s > 0:
                parts.append(f"{(count - 1) / rest_s:.1f} tokens/s")
        parts.append(f"seed {self.seed}")
        return ", ".join(parts)
