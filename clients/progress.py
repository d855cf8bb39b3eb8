"""What a client has of one stream: enough to send the request again anywhere and go on after the last token."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from clients.errors import ProtocolError
from clients.events import Event, Finished, FinishReason, Started, StreamResumed, TokenLogprobs, Tokens
from protos import decoder_pb2 as pb

_SEED_BITS = 53  # a drawn seed survives JSON readers that keep numbers as doubles

_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}


@dataclass(slots=True)
class _Sample:
    output_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # delivered pieces
    finished: bool = False


def draw_seed() -> int:
    """A random seed for a request that was given none."""
    return secrets.randbits(_SEED_BITS)


class StreamProgress:
    """Turns responses into events that neither repeat nor lose anything, over any number of broken streams."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = pb.GenerateRequest()
        self._request.CopyFrom(request)
        if not self._request.request_id:
            # Drawn here, so that the logs of all decoders that serve parts of the stream agree.
            self._request.request_id = uuid.uuid4().hex
        if not self._request.sampling.HasField("seed"):
            # Drawn here, so that a request that broke before `started` is sent again with the same noise.
            self._request.sampling.seed = draw_seed()
        num_samples = request.n if request.HasField("n") else 1
        self._samples = [_Sample() for _ in range(num_samples)]
        self._started: pb.Started | None = None
        self._awaits_started = True

    @property
    def request_id(self) -> str:
        """The id of the request in the logs of every decoder that serves it."""
        return self._request.request_id

    @property
    def done(self) -> bool:
        """Whether every sample is complete."""
        return all(sample.finished for sample in self._samples)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, over all samples."""
        return sum(len(sample.output_ids) for sample in self._samples)

    def next_request(self) -> pb.GenerateRequest:
        """The request for the next attempt: the caller's own at first, with `resume` once a decoder has taken it."""
        self._awaits_started = True
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        if self._started is None:
            return request
        request.ClearField("prompt")
        request.resume.CopyFrom(
            pb.Resume(
                prompt_token_ids=self._started.prompt_token_ids,
                samples=[
                    pb.SampleProgress(output_token_ids=s.output_ids, delivered_text="".join(s.text))
                    for s in self._samples
                ],
                seed=self._started.seed,
                numerics_id=self._started.numerics_id,
                age_ticket=self._started.age_ticket or None,
                max_tokens=self._started.max_tokens,
            )
        )
        return request

    def take(self, response: pb.GenerateResponse, target: str) -> Iterator[Event]:
        """The events that a response of `target` amounts to; raises ProtocolError when it would break the stream."""
        kind = response.WhichOneof("event")
        if (kind == "started") != self._awaits_started:
            raise ProtocolError(f"{target} sent {kind or 'an event of an unknown kind'!r} out of turn")
        if kind == "started":
            yield self._take_started(response.started, target)
        elif kind == "delta":
            yield from self._take_delta(response.delta, target)
        else:
            yield from self._take_finished(response.finished, target)

    def _take_started(self, started: pb.Started, target: str) -> Event:
        self._awaits_started = False
        if self._started is not None:
            exact = started.exact_resume or self.num_output_tokens == 0
            self._started.numerics_id = started.numerics_id
            if started.age_ticket:
                self._started.age_ticket = started.age_ticket
            return StreamResumed(target, exact, self.num_output_tokens)
        self._started = pb.Started()
        self._started.CopyFrom(started)
        return Started(
            request_id=self.request_id,
            target=target,
            prompt_token_ids=tuple(started.prompt_token_ids),
            seed=started.seed,
            max_tokens=started.max_tokens,
            numerics_id=started.numerics_id,
            num_cached_tokens=started.num_cached_tokens,
        )

    def _take_delta(self, delta: pb.Delta, target: str) -> Iterator[Event]:
        sample = self._sample(delta.sample_index, target)
        if sample.finished:  # complete before the stream broke
            return
        if delta.token_ids and delta.position != len(sample.output_ids):
            raise ProtocolError(
                f"{target} sent tokens from position {delta.position} of sample {delta.sample_index}, "
                f"where {len(sample.output_ids)} tokens have come"
            )
        position = len(sample.output_ids)
        sample.output_ids.extend(delta.token_ids)
        if delta.text:
            sample.text.append(delta.text)
        yield Tokens(
            sample_index=delta.sample_index,
            position=position,
            token_ids=tuple(delta.token_ids),
            text=delta.text,
            logprobs=tuple(_logprobs(item) for item in delta.logprobs),
        )

    def _take_finished(self, finished: pb.Finished, target: str) -> Iterator[Event]:
        sample = self._sample(finished.sample_index, target)
        if sample.finished:
            return
        if finished.num_output_tokens != len(sample.output_ids):
            raise ProtocolError(
                f"{target} finished sample {finished.sample_index} with {finished.num_output_tokens} tokens, "
                f"where {len(sample.output_ids)} have come"
            )
        reason = _REASONS.get(finished.reason)
        if reason is None:
            raise ProtocolError(f"{target} finished for an unknown reason, {finished.reason}")
        sample.finished = True
        yield Finished(
            sample_index=finished.sample_index,
            reason=reason,
            num_prompt_tokens=finished.num_prompt_tokens,
            num_output_tokens=finished.num_output_tokens,
            num_cached_tokens=finished.num_cached_tokens,
            stop_string=finished.stop_string,
            stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        )

    def _sample(self, index: int, target: str) -> _Sample:
        if index >= len(self._samples):
            raise ProtocolError(f"{target} sent sample {index} of a request for {len(self._samples)}")
        return self._samples[index]


def _logprobs(item: pb.Logprobs) -> TokenLogprobs:
    top = tuple((entry.token_id, entry.logprob) for entry in item.top)
    return TokenLogprobs(item.sampled.token_id, item.sampled.logprob, top)
