"""Tenants through real processes: each finds its own prefixes only, unless the decoder is told to share them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

from clients.decoder import DecoderClient
from tests.decoder.tiny_models import TinyConfig, write_tiny_checkpoint
from tests.e2e.followed import Followed, follow, token_request
from tests.e2e.processes import Processes

BLOCK_SIZE = 16
PROMPT = [index % 90 for index in range(5 * BLOCK_SIZE + 3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tenants") / "model", TinyConfig(vocab_size=96), 3)


def _cached(stream: Followed) -> int:
    assert stream.finished is not None
    return stream.finished.num_cached_tokens


@pytest.mark.parametrize("flags", [(), ("--share-prefixes-between-tenants",)])
async def test_a_tenant_hits_anothers_prefixes_only_where_the_decoder_shares_them(
    processes: Processes, model: Path, flags: tuple[str, ...]
) -> None:
    manager = processes.start_manager()
    decoder = processes.start_decoder(manager, *flags, model=model)
    request = token_request(PROMPT, 20)
    cached: dict[str, int] = {}
    tokens: list[list[int]] = []
    async with DecoderClient(decoder.address) as client:
        for name, tenant in (("first", "alice"), ("other", "bob"), ("nobody", ""), ("again", "alice")):
            stream = await follow(client, request, tenant=tenant)
            cached[name] = _cached(stream)
            tokens.append(stream.token_ids)
            manager.wait_all_free()
    assert tokens == tokens[:1] * 4
    shared = 5 * BLOCK_SIZE if flags else 0
    assert cached == {"first": 0, "other": shared, "nobody": shared, "again": 5 * BLOCK_SIZE}


async def test_decoders_that_share_and_decoders_that_do_not_keep_apart(processes: Processes, model: Path) -> None:
    manager = processes.start_manager()
    sharing = processes.start_decoder(manager, "--share-prefixes-between-tenants", model=model)
    apart = processes.start_decoder(manager, model=model)
    request = token_request(PROMPT, 4)
    for decoder in (sharing, apart):  # neither finds what the other has left of a tenant's
        async with DecoderClient(decoder.address) as client:
            assert _cached(await follow(client, request, tenant="alice")) == 0
        manager.wait_all_free()
