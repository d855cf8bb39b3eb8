"""Decoders of one host share the weights: on the native backend nobody has a copy of his own."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.decoder.ops.native import why_unavailable
from tests.bench.two_decoders import mapped_share, memory_of, read_weights
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.processes import Processes


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="proportional memory is read off /proc")
@pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())
def test_two_native_decoders_on_one_checkpoint_map_its_weights_once(processes: Processes, tmp_path: Path) -> None:
    config = TinyConfig(vocab_size=40_000, hidden_size=512, moe_intermediate_size=512, bits_of={})
    model = write_tiny_checkpoint(tmp_path / "model", config, 4)
    weight_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert weight_bytes > 150 << 20
    manager = processes.start_manager(num_blocks=64)
    decoders = [processes.start_decoder(manager, "--kv-dtype", "f32", model=model, backend="native") for _ in range(2)]
    for seed, decoder in enumerate(decoders):
        read_weights(decoder, seed, 200)
    # A page that both have mapped counts half for each; what one alone has read counts for him, and a copy of one's own for himself.
    shares = [mapped_share(decoder.process.pid, model) for decoder in decoders]
    assert weight_bytes / 3 < sum(shares) < 1.02 * weight_bytes
    for decoder in decoders:
        assert memory_of(decoder.process.pid, "Anonymous") < 0.75 * weight_bytes
