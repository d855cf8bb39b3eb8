"""All responses of one request: `started` once, and its samples' deltas and ends, in whatever order they come."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

from protos import decoder_pb2
from services.decoder.errors import DecoderError
from services.decoder.request import Admitted, DecodeRequest, Event, Failed, FinishReason
from services.decoder.request_parser import ParsedRequest
from services.decoder.sample_stream import SampleStream
from services.decoder.tokenizer import Tokenizer


class RequestStream:
    """Turns the engine's events into responses. A sample that fails fails the request."""

    def __init__(self, parsed: ParsedRequest, tokenizer: Tokenizer, numerics_id: str) -> None:
        """Raises InvalidRequestError when a text delivered before a resumption is not that of its tokens."""
        self._parsed = parsed
        self._numerics_id = numerics_id
        self._is_started = False
        self._samples = {
            request.request_id: SampleStream(request, parsed.stop_strings, text, tokenizer)
            for request, text in zip(parsed.samples, parsed.delivered_texts, strict=True)
        }

    @property
    def open_requests(self) -> list[DecodeRequest]:
        """The samples that are the engine's to go on with: all but those that a stop string had ended."""
        return [request for request in self._parsed.samples if not self._samples[request.request_id].stopped_by_text]

    @property
    def stopped_by_text(self) -> list[str]:
        """The engine's ids of the samples that a stop string has ended, of which it knows nothing."""
        return [sample_id for sample_id, sample in self._samples.items() if sample.stopped_by_text]

    @property
    def error(self) -> DecoderError | None:
        """What the request fails with, if it does."""
        for sample in self._samples.values():
            if sample.error is not None:
                return sample.error
        return None

    @property
    def ended(self) -> bool:
        """Whether no event matters any more."""
        # Asked for at every step: a generator for `all` would cost more than what it looks at.
        for sample in self._samples.values():
            if not sample.ended:
                return self.error is not None
        return True

    @property
    def finish_reason(self) -> FinishReason | None:
        """How it ended: as its first sample did, when all of them came to their ends."""
        reasons = [sample.finish_reason for sample in self._samples.values()]
        return None if None in reasons else reasons[0]

    @property
    def num_output_tokens(self) -> int:
        """Over all samples, with those of before a resumption."""
        return sum(sample.num_output_tokens for sample in self._samples.values())

    def start(self, admitted: Admitted) -> Iterator[decoder_pb2.GenerateResponse]:
        """`started`, what a resuming client lacks of the texts, and the end of each sample that a stop string had ended."""
        if self._is_started:
            return
        self._is_started = True
        first = self._parsed.first
        yield decoder_pb2.GenerateResponse(
            started=decoder_pb2.Started(
                request_id=first.request_id,
                prompt_token_ids=first.prompt_token_ids,
                seed=first.sampling.seed,
                max_tokens=first.max_tokens,
                numerics_id=self._numerics_id,
                age_ticket=admitted.age_ticket or 0,
                num_cached_tokens=min(admitted.num_cached_tokens, len(first.prompt_token_ids)),
                exact_resume=self._parsed.exact_resume,
            )
        )
        for sample in self._samples.values():
            yield from sample.catch_up()

    def take(self, events: Mapping[str, Sequence[Event]]) -> Iterator[decoder_pb2.GenerateResponse]:
        """The responses that some events amount to, by the engine's ids of their samples."""
        if not self._is_started:
            events = yield from self._begin(events)
        for sample_id, came in events.items():
            yield from self._samples[sample_id].take(came)

    def _begin(
        self, events: Mapping[str, Sequence[Event]]
    ) -> Generator[decoder_pb2.GenerateResponse, None, Mapping[str, Sequence[Event]]]:
        """Starts the request when one of its samples was admitted; returns the events that still count."""
        first = next((e for came in events.values() for e in came if isinstance(e, (Admitted, Failed))), None)
        if isinstance(first, Admitted):
            yield from self.start(first)
        elif isinstance(first, Failed):
            # The first sample was refused, and another one was admitted before it could be ended: the request has not started.
            return {sample_id: [e for e in came if isinstance(e, Failed)] for sample_id, came in events.items()}
        return events
