"""The content hashes: what must change them does, and nothing else."""

from __future__ import annotations

from array import array
from dataclasses import replace
from hashlib import blake2b

from services.decoder.block_hash import HASH_BYTES, BlockHasher
from services.decoder.leases import KvGeometry

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_dim=8, kv_dtype="bf16", model_fingerprint=bytes(range(32)))
TOKENS = list(range(16))


def test_the_bytes_are_as_documented() -> None:
    def digest(*fields: bytes) -> bytes:
        text = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
        return blake2b(text, digest_size=32).digest()

    hasher = BlockHasher(GEOMETRY, "mlx-1", 16)
    seed = digest(
        b"leasehold.block",
        (1).to_bytes(8, "little"),
        bytes(range(32)),
        b"bf16",
        b"hnd",
        (16).to_bytes(8, "little"),
        b"alice",
        b"mlx-1",
    )
    assert hasher.seed("alice") == seed
    tokens = b"".join(token_id.to_bytes(4, "little") for token_id in TOKENS)
    assert hasher.hash_block(seed, TOKENS) == digest(seed, tokens, b"")
    assert hasher.hash_block(seed, array("i", TOKENS)) == digest(seed, tokens, b"")
    assert len(seed) == HASH_BYTES


def test_everything_that_decides_the_bytes_decides_the_seed() -> None:
    hasher = BlockHasher(GEOMETRY, "mlx-1", 16)
    seeds = [
        hasher.seed(""),
        hasher.seed("alice"),
        BlockHasher(GEOMETRY, "mlx-2", 16).seed(""),
        BlockHasher(GEOMETRY, "mlx-1", 32).seed(""),
        BlockHasher(replace(GEOMETRY, kv_dtype="f16"), "mlx-1", 16).seed(""),
        BlockHasher(replace(GEOMETRY, kv_layout="nhd"), "mlx-1", 16).seed(""),
        BlockHasher(replace(GEOMETRY, model_fingerprint=bytes(32)), "mlx-1", 16).seed(""),
    ]
    assert len(set(seeds)) == len(seeds)
    sharing = BlockHasher(GEOMETRY, "mlx-1", 16, shares_tenants=True)
    assert sharing.seed("alice") == sharing.seed("bob") == hasher.seed("")


def test_parent_tokens_and_extra_decide_the_hash() -> None:
    hasher = BlockHasher(GEOMETRY, "mlx-1", 16)
    seed = hasher.seed("")
    hashes = [
        hasher.hash_block(seed, TOKENS),
        hasher.hash_block(hasher.seed("x"), TOKENS),
        hasher.hash_block(seed, [*TOKENS[:-1], 99]),
        hasher.hash_block(seed, TOKENS[:-1]),
        hasher.hash_block(seed, TOKENS, b"lora"),
    ]
    assert len(set(hashes)) == len(hashes)
