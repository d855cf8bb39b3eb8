"""An engine whose events the test makes, and a client of the Decoder service in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from protos import decoder_pb2 as pb
from services.decoder.errors import DecoderError
from services.decoder.event_router import EventRouter
from services.decoder.request import DecodeRequest, Event
from services.decoder.tokenizer import Tokenizer
from tests.decoder.tokenizers_for_tests import EOS, VOCAB_SIZE, byte_level

INNER = byte_level()
TOKENIZER = Tokenizer(INNER, VOCAB_SIZE, {})
EOS_ID = INNER.token_to_id(EOS)
CAPACITY = 100
TIMEOUT_S = 30.0


def ids_of(text: str) -> list[int]:
    """Token ids of a text."""
    return TOKENIZER.encode(text, "text", add_special_tokens=False)


@dataclass
class FakeEngine:
    """Remembers what it is asked; the test emits the events."""

    submitted: list[DecodeRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    refusal: DecoderError | None = None
    fullness: DecoderError | None = None
    on_submit: Callable[[DecodeRequest], None] = lambda request: None

    def submit(self, *requests: DecodeRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.extend(requests)
        for request in requests:
            self.on_submit(request)

    def require_room(self) -> None:
        if self.fullness is not None:
            raise self.fullness

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        return any(request.request_id == request_id for request in self.submitted)


@dataclass
class Harness:
    """A server with its fake engine, and a client."""

    engine: FakeEngine
    router: EventRouter
    stub: Any

    def answer_with(self, *steps: Sequence[Event]) -> None:
        """Every request is answered with these events, one emit a step."""

        def emit(request: DecodeRequest) -> None:
            for step in steps:
                self.router.emit([(request.request_id, event) for event in step])

        self.engine.on_submit = emit

    async def generate(self, **fields: Any) -> list[pb.GenerateResponse]:
        """All responses of one request."""
        if "resume" not in fields:
            fields.setdefault("token_ids", pb.TokenIds(ids=[1, 2, 3]))
        metadata = fields.pop("metadata", None)
        call = self.stub.Generate(pb.GenerateRequest(**fields), timeout=TIMEOUT_S, metadata=metadata)
        return [response async for response in call]
