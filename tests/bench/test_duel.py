"""What the step benchmarks count and compare; their times are nobody's to assert."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.decoder import demo_model
from services.decoder.loader import open_checkpoint
from services.decoder.ops.native import why_unavailable
from tests.bench import decode_step
from tests.bench.duel import WeightBytes, is_void

CHECKPOINT = Path(demo_model.__file__).parent / "checkpoint"


@pytest.mark.parametrize("fill", [False, True])
def test_only_timed_steps_are_counted_and_each_is_announced(fill: bool) -> None:
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    bench = decode_step.Bench(CHECKPOINT, decode_step.make_bench_ops("native", "exact", 1), "f32")
    announced: list[int] = []
    counted: list[tuple[int, int]] = []
    take = bench.ops.take_routing  # type: ignore[attr-defined]

    def take_and_note() -> tuple[int, int]:
        counted.append(take())
        return counted[-1]

    bench.ops.take_routing = take_and_note  # type: ignore[attr-defined]
    result = bench.decode(2, 8, 5, announced.append, fill)
    assert announced == [0, 1, 2, 3, 4]
    assert len(result["times"]) == 5
    num_blocks, num_experts = counted[1]
    assert num_blocks == 5 * bench.config.num_hidden_layers
    assert result["experts_per_layer"] == round(num_experts / num_blocks, 1)


def test_a_step_over_all_experts_reads_every_weight_once() -> None:
    checkpoint = open_checkpoint(CHECKPOINT)
    num_bytes = WeightBytes(checkpoint)
    everything = sum(tensor.numpy().nbytes for tensor in checkpoint.tensors.values())
    assert num_bytes.of_step(8) == everything  # the embedding is the head here
    stacks = sum(tensor.numpy().nbytes for name, tensor in checkpoint.tensors.items() if ".switch_mlp." in name)
    assert stacks > 0
    assert num_bytes.of_step(2) == everything - stacks * 6 / 8


def test_sides_that_read_other_numbers_of_experts_are_not_compared() -> None:
    assert not is_void(10.0, 10.9)
    assert is_void(10.0, 11.2)
    assert is_void(11.2, 10.0)
