"""Which samples an engine has, and whether it takes more. Any thread asks; the engine's own ends them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from services.decoder.engine_settings import EngineSettings
from services.decoder.errors import (
    DuplicateRequestError,
    InvalidRequestError,
    NeverFitsError,
    QueueFullError,
    ShuttingDownError,
)
from services.decoder.request import DecodeRequest, request_id_of


class OpenRequests:
    """The ids of all samples between their submission and their last event."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._ids: set[str] = set()
        self._closed = False

    def __contains__(self, sample_id: str) -> bool:
        with self._lock:
            return sample_id in self._ids

    def require_room(self) -> None:
        """Raises what any new request would be refused with now: ShuttingDownError or QueueFullError."""
        with self._lock:
            self._require_open()
            self._require_room(1)

    def add(self, requests: Sequence[DecodeRequest], hand_over: Callable[[], None]) -> None:
        """Takes samples of one prompt, all or none, and hands them over before `close` can come between.

        Raises InvalidRequestError, NeverFitsError, ShuttingDownError, DuplicateRequestError or, for a request that is not resumed,
        QueueFullError.
        """
        for request in requests:
            self._require_fit(request)
        with self._lock:
            self._require_open()
            for request in requests:
                if request.request_id in self._ids:
                    raise DuplicateRequestError(
                        f"request_id: a request {request_id_of(request.request_id)!r} is running; choose another id"
                    )
            if not all(request.is_resumed for request in requests):
                self._require_room(len(requests))
            self._ids.update(request.request_id for request in requests)
            hand_over()

    def remove(self, sample_ids: Iterable[str]) -> None:
        """These have ended, and their ids are free."""
        with self._lock:
            self._ids.difference_update(sample_ids)

    def close(self) -> None:
        """Nothing is taken any more."""
        with self._lock:
            self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise ShuttingDownError("the decoder is shutting down")

    def _require_room(self, num_samples: int) -> None:
        max_seqs, max_waiting = self._settings.max_seqs, self._settings.max_waiting
        if len(self._ids) + num_samples > max_seqs + max_waiting:
            raise QueueFullError(max(0, len(self._ids) - max_seqs), num_samples, max_waiting)

    def _require_fit(self, request: DecodeRequest) -> None:
        if not request.prompt_token_ids:
            raise InvalidRequestError("prompt", "it is empty; send at least one token")
        num_tokens = len(request.prompt_token_ids) + request.max_tokens
        if num_tokens > self._settings.kv_capacity:
            raise NeverFitsError(
                f"{len(request.prompt_token_ids)} prompt tokens plus max_tokens {request.max_tokens} exceed the "
                f"{self._settings.kv_capacity} tokens of one request; shorten them or raise --kv-capacity"
            )
