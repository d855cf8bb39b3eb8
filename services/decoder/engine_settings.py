"""The limits of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from services.decoder.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Limits of one engine; raises ConfigError when they contradict each other."""

    max_seqs: int = 32  # sequences in a step
    max_waiting: int = 1024  # samples of new requests beyond those in a step
    kv_capacity: int = 2048  # tokens of one request, prompt plus output; at most the model's maximum
    max_num_batched_tokens: int = 512  # tokens in a step, decode and prefill together
    reserve_full: bool = False  # lease ceil(kv_capacity / block_size) blocks up front, not on demand
    growth_blocks: int = 2  # blocks asked for at once when a sequence grows
    shares_prefixes_between_tenants: bool = False  # one salt for all tenants

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-seqs", self.max_seqs),
            ("--kv-capacity", self.kv_capacity),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
        ):
            if value < 1:
                raise ConfigError(f"{flag}: {value} is not at least 1")
        if self.max_waiting < 0:
            raise ConfigError(f"--max-waiting: {self.max_waiting} is not at least 0")
        if self.max_num_batched_tokens < self.max_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens: {self.max_num_batched_tokens} is less than --max-seqs {self.max_seqs}, "
                "so that not every sequence could decode in each step; raise it or lower --max-seqs"
            )
