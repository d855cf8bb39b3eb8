"""What a full block holds, as a name: a chain of hashes over tokens, seeded with everything else that decides its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from protos.pool_format import FORMAT_VERSION
from services.decoder.leases import KvGeometry

HASH_BYTES = 32
_DOMAIN = b"leasehold.block"


class BlockHasher:
    """Hashes the blocks of one pool and model. Two blocks of one hash hold the same bytes, whoever computed them."""

    def __init__(self, geometry: KvGeometry, numerics_id: str, block_size: int, shares_tenants: bool = False) -> None:
        """With `shares_tenants` all tenants have one salt, and hit each other's blocks."""
        self._geometry = geometry
        self._numerics_id = numerics_id
        self.block_size = block_size
        self._shares_tenants = shares_tenants

    def seed(self, tenant: str) -> bytes:
        """The parent of a tenant's first blocks."""
        return _digest(
            _DOMAIN,
            _number(FORMAT_VERSION),
            self._geometry.model_fingerprint,
            self._geometry.kv_dtype.encode(),
            self._geometry.kv_layout.encode(),
            _number(self.block_size),
            b"" if self._shares_tenants else tenant.encode(),
            self._numerics_id.encode(),
        )

    def hash_block(self, parent: bytes, token_ids: Sequence[int], extra: bytes = b"") -> bytes:
        """The hash of a block after `parent`. `extra` is what decides its bytes beside the token ids."""
        return _digest(parent, np.asarray(token_ids, "<u4").tobytes(), extra)


def _digest(*fields: bytes) -> bytes:
    # Each with its length before it, so that bytes cannot move from one field to the next unnoticed.
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")
