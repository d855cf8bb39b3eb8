"""The engine: one thread that loads the model and steps all sequences through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from services.decoder.errors import ConfigError
from services.decoder.leases import LeasePort
from services.decoder.request import DecodeRequest, Emit


@dataclass(frozen=True)
class EngineSettings:
    """Limits of one engine; raises ConfigError when they contradict each other."""

    max_seqs: int = 32  # sequences in a step
    kv_capacity: int = 2048  # tokens of one request, prompt plus output; at most the model's maximum
    max_num_batched_tokens: int = 512  # tokens in a step, decode and prefill together
    reserve_full: bool = False  # lease ceil(kv_capacity / block_size) blocks up front, not on demand
    growth_blocks: int = 2  # blocks asked for at once when a sequence grows

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-seqs", self.max_seqs),
            ("--kv-capacity", self.kv_capacity),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
        ):
            if value < 1:
                raise ConfigError(f"{flag}: {value} is not at least 1")
        if self.max_num_batched_tokens < self.max_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens: {self.max_num_batched_tokens} is less than --max-seqs {self.max_seqs}, "
                "so that not every sequence could decode in each step; raise it or lower --max-seqs"
            )


class Engine:
    """Continuous batching over leased blocks. Every method may be called from any thread.

    Life cycle: `start` (blocking), `await leases.open()`, any number of `submit` and `abort`, `stop` (blocking), `await leases.close()`.
    """

    def __init__(self, build_model: Callable[[], Any], leases: LeasePort, settings: EngineSettings, emit: Emit) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Starts the thread and returns when the model is loaded on it; raises what build_model raised (CheckpointError)."""
        raise NotImplementedError

    def submit(self, request: DecodeRequest) -> None:
        """Hands a request over: Admitted, Tokens and one Finished or Failed follow through `emit`.

        request_id names one sample: samples of one client request need ids of their own. Raises DuplicateRequestError while a
        request of that id runs, ShuttingDownError after `stop` was called, NeverFitsError beyond kv_capacity.
        """
        raise NotImplementedError

    def abort(self, request_id: str) -> bool:
        """Cancels a request at the next step boundary (Finished with CANCELLED follows); False: no such request runs."""
        raise NotImplementedError

    def stop(self, drain_s: float) -> None:
        """Refuses new requests, lets running ones end for up to drain_s seconds, fails the rest with ShuttingDownError, ends the thread.

        Every lease is handed to the port for release before it returns.
        """
        raise NotImplementedError

    def busy_ms(self) -> int | None:
        """How long the present step has lasted, in milliseconds; None when idle."""
        raise NotImplementedError
