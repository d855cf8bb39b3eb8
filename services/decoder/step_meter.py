"""Where the engine's time goes, step by step. Written by the engine's thread, read by any."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from services.decoder.sequence import Chunk
from services.metrics import FAST_BOUNDS, Histogram

# The parts of a step, in order. "fill" is the batch and its hand-over to the backend; "tokens" takes the sampled ids in and
# asks to seal what became full; "emit" hands the events to the server.
PARTS = ("schedule", "fill", "forward", "commit", "tokens", "emit")
SIZE_BOUNDS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)


class StepMeter:
    """Times the parts of each step and counts its tokens. Costs some microseconds a step, however many tokens it has."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = 0.0
        self._began = 0.0
        self._took: list[tuple[str, float]] = []
        self._batch: tuple[int, int, int, int] | None = None  # sequences, prefill tokens, decode tokens, samples
        self.parts = {part: Histogram(FAST_BOUNDS) for part in PARTS}
        self.steps = Histogram()
        self.batch_sizes = Histogram(SIZE_BOUNDS)
        self.num_prefill_tokens = 0
        self.num_decode_tokens = 0
        self.num_generated = 0
        self.num_failed = 0

    def begin(self) -> None:
        """A turn begins. It is counted at its end if it was a step and did not fail."""
        self._batch = None
        self._began = self._last = self._clock()
        self._took.clear()

    def mark(self, part: str) -> None:
        """A part has ended, and the next begins."""
        now = self._clock()
        self._took.append((part, now - self._last))
        self._last = now

    def note_batch(self, chunks: Sequence[Chunk], num_samples: int) -> None:
        """What the step computes; to be called before it is."""
        num_decodes = num_prefill = 0
        for chunk in chunks:
            if chunk.sequence.num_remaining == 1:
                num_decodes += 1
            else:
                num_prefill += chunk.num_tokens
        self._batch = (len(chunks), num_prefill, num_decodes, num_samples)

    def fail(self) -> None:
        """The step failed: its time is no step's time."""
        self._batch = None
        self.num_failed += 1

    def end(self) -> None:
        """The turn's events are out."""
        if self._batch is None:
            return
        self.mark("emit")
        for part, seconds in self._took:
            self.parts[part].observe(seconds)
        self.steps.observe(self._last - self._began)
        num_seqs, num_prefill, num_decodes, num_samples = self._batch
        self.batch_sizes.observe(num_seqs)
        self.num_prefill_tokens += num_prefill
        self.num_decode_tokens += num_decodes
        self.num_generated += num_samples
