"""One sample's responses, from the engine's events: deltas, `finished`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from protos import decoder_pb2
from services.decoder.errors import DecoderError
from services.decoder.request import (
    Admitted,
    DecodeRequest,
    Event,
    Failed,
    Finished,
    FinishReason,
    Token,
    TokenLogprobs,
)
from services.decoder.text_stream import TextStream
from services.decoder.tokenizer import Tokenizer

_REASONS = {
    FinishReason.STOP: decoder_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: decoder_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: decoder_pb2.FINISH_REASON_CANCELLED,
}


class SampleStream:
    """Turns events into responses, and ends the sample at a stop string, which the engine knows nothing of."""

    def __init__(
        self, request: DecodeRequest, stop_strings: Sequence[str], delivered_text: str, tokenizer: Tokenizer
    ) -> None:
        """Raises InvalidRequestError when delivered_text, of before a resumption, is not that of its tokens."""
        self._request = request
        self._text = TextStream(tokenizer, stop_strings)
        outputs = self._request.output_token_ids
        self.num_output_tokens = len(outputs)
        self._num_cached_tokens = 0
        is_stopped = bool(outputs) and outputs[-1] in self._request.stop_token_ids
        self._undelivered = self._text.resume(
            outputs[:-1] if is_stopped else outputs,
            delivered_text,
            f"resume.samples[{request.sample_index}].delivered_text",
            is_whole=is_stopped or len(outputs) >= self._request.max_tokens,
        )
        self.finish_reason: FinishReason | None = None  # set when `finished` is out
        self.error: DecoderError | None = None  # set when the sample failed instead

    @property
    def stopped_by_text(self) -> bool:
        """Whether the text holds a stop string: the engine has nothing more to do."""
        return self._text.stop_string is not None

    @property
    def ended(self) -> bool:
        """Whether no event matters any more."""
        return self.finish_reason is not None or self.error is not None

    def take(self, events: Sequence[Event]) -> Iterator[decoder_pb2.GenerateResponse]:
        """The responses that some events amount to; tokens that came together share a delta."""
        response: decoder_pb2.GenerateResponse | None = None
        for event in events:
            if self.ended:
                break
            if isinstance(event, Token):
                if response is None:
                    response = self._new_delta()
                self._add(event, response.delta)
                if self.stopped_by_text:
                    yield from self._end(response, FinishReason.STOP)
                    response = None
            elif isinstance(event, Admitted):
                self._num_cached_tokens = event.num_cached_tokens
            elif isinstance(event, Finished):
                self._num_cached_tokens = event.num_cached_tokens
                yield from self._end(response, event.reason, event.stop_token_id)
                response = None
            else:
                self._fail(event)
        if response is not None:
            yield response

    def catch_up(self) -> Iterator[decoder_pb2.GenerateResponse]:
        """What a resuming client lacks of the text; `finished` too when that already ends the sample."""
        response = self._new_delta() if self._undelivered else None
        if response is not None:
            response.delta.text, self._undelivered = self._undelivered, ""
        if self.stopped_by_text:
            yield from self._end(response, FinishReason.STOP)
        elif response is not None:
            yield response

    def _new_delta(self) -> decoder_pb2.GenerateResponse:
        # Filled in place, here and where tokens are added: a message passed to a constructor is copied.
        response = decoder_pb2.GenerateResponse()
        delta = response.delta
        delta.position = self.num_output_tokens
        if self._request.sample_index:
            delta.sample_index = self._request.sample_index
        return response

    def _add(self, token: Token, delta: decoder_pb2.Delta) -> None:
        delta.token_ids.append(token.token_id)
        if token.logprobs is not None:
            delta.logprobs.append(_logprobs(token.logprobs))
        self.num_output_tokens += 1
        # A stop token ends the text, and is no part of it.
        if token.token_id not in self._request.stop_token_ids:
            text = self._text.push(token.token_id)
            if text:
                delta.text += text

    def _end(
        self, response: decoder_pb2.GenerateResponse | None, reason: FinishReason, stop_token_id: int | None = None
    ) -> Iterator[decoder_pb2.GenerateResponse]:
        rest = self._text.finish()
        if self.stopped_by_text:
            reason, stop_token_id = FinishReason.STOP, None
        if rest:
            response = self._new_delta() if response is None else response
            response.delta.text += rest
        if response is not None:
            yield response
        self.finish_reason = reason
        yield decoder_pb2.GenerateResponse(
            finished=decoder_pb2.Finished(
                sample_index=self._request.sample_index,
                reason=_REASONS[reason],
                num_prompt_tokens=len(self._request.prompt_token_ids),
                num_output_tokens=self.num_output_tokens,
                num_cached_tokens=self._num_cached_tokens,
                stop_string=self._text.stop_string or "",
                stop_token_id=stop_token_id,
            )
        )

    def _fail(self, failed: Failed) -> None:
        self.error = failed.error


def _logprobs(logprobs: TokenLogprobs) -> decoder_pb2.Logprobs:
    return decoder_pb2.Logprobs(
        sampled=decoder_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[decoder_pb2.TokenLogprob(token_id=token_id, logprob=value) for token_id, value in logprobs.top],
    )
