"""A pool in GPU memory, as `leasehold status` and `leasehold up` have it."""

from __future__ import annotations

from pathlib import Path

from clients.cli import status
from clients.cli.arguments import build_parser
from clients.cli.up import stack_config
from protos import kv_manager_pb2 as pb


def test_status_says_where_the_pool_is_and_what_became_of_its_memory() -> None:
    info = pb.PoolInfo(num_blocks=8, block_stride_bytes=4096)
    lost = pb.DescribePoolResponse(pool_memory="cuda", num_lost_pools=1)
    absent = pb.DescribePoolResponse(pool_memory="cuda", memory_is_absent=True, pool=info)
    host = pb.DescribePoolResponse(pool_memory="host", pool=info)
    said = [status.to_text(pb.StatsResponse(), pb.ListLeasesResponse(), pool) for pool in (lost, absent, host)]
    assert "in GPU memory; 1 lost since the start" in said[0]
    assert "which no decoder has brought back" in said[1]
    assert "GPU" not in said[2]
    objects = [status.to_object(pb.StatsResponse(), pb.ListLeasesResponse(), pool) for pool in (lost, absent)]
    assert [found["num_lost_pools"] for found in objects] == [1, 0]
    assert [found["memory_is_absent"] for found in objects] == [False, True]


def test_up_with_the_cuda_backend_has_its_pool_there(tmp_path: Path) -> None:
    flags = ["up", "--model", "demo", "--backend", "cuda"]
    config = stack_config(build_parser().parse_args(flags), tmp_path, tmp_path)
    assert list(config.manager_flags)[-4:] == ["--pool-memory", "cuda", "--log-level", "info"]
    assert "--pool-memory" not in config.decoder_flags
