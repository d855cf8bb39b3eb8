"""What waits for what among open asks."""

from __future__ import annotations

from services.decoder.leases import AcquireAsk, ExtendAsk, SealAsk
from services.decoder.outbox import CallNumbers, Outbox, ReleaseAsk


def acquire(cache_id: int, *prefix_hashes: bytes) -> AcquireAsk:
    return AcquireAsk(cache_id, 1, 0, "", None, prefix_hashes)


def seal(cache_id: int, index: int, content_hash: bytes) -> SealAsk:
    return SealAsk(cache_id, index, 10 + index, content_hash, b"parent", 16)


def filled(*asks: AcquireAsk | ExtendAsk | SealAsk | ReleaseAsk) -> Outbox:
    outbox = Outbox()
    for ask in asks:
        outbox.put(ask)
    outbox.sort()
    return outbox


def test_a_release_withdraws_what_was_asked_for_its_lease_and_is_sent_itself() -> None:
    outbox = filled(acquire(1), acquire(2), ExtendAsk(1, 3, False), ReleaseAsk(1))
    assert [ask.cache_id for ask in outbox.next_acquires(())] == [2]
    assert outbox.next_extends(()) == []
    assert outbox.next_releases() == [ReleaseAsk(1)]
    assert not outbox.all_released.is_set()
    outbox.end_releases(outbox.next_releases())
    assert outbox.all_released.is_set()


def test_a_release_waits_for_the_seals_of_its_lease() -> None:
    first, second = seal(1, 0, b"a"), seal(1, 1, b"b")
    outbox = filled(first, second, ReleaseAsk(1), ReleaseAsk(2), ReleaseAsk(1, 7))
    assert outbox.next_releases() == [ReleaseAsk(2), ReleaseAsk(1, 7)]
    outbox.end_seals([first])
    assert ReleaseAsk(1) not in outbox.next_releases()
    outbox.end_seals([second])
    outbox.end_seals([second])
    assert outbox.next_releases() == [ReleaseAsk(2), ReleaseAsk(1, 7), ReleaseAsk(1)]


def test_an_acquire_waits_for_the_seals_that_it_could_hit_and_for_no_others() -> None:
    first, second = seal(1, 0, b"a"), seal(1, 1, b"b")
    outbox = filled(first, second, acquire(2, b"a", b"b", b"c"), acquire(3, b"x"))
    assert [ask.cache_id for ask in outbox.next_acquires(())] == [3]
    outbox.put(seal(1, 2, b"c"))  # came later, and is not waited for
    outbox.sort()
    outbox.end_seals([first, second])
    assert [ask.cache_id for ask in outbox.next_acquires({3})] == [2]


def test_a_new_session_is_asked_for_whole_leases_only_to_be_given_back() -> None:
    outbox = filled(ReleaseAsk(1, 7), ReleaseAsk(2), ReleaseAsk(1, 8))
    outbox.drop_block_releases()
    assert outbox.next_releases() == [ReleaseAsk(2)]
    outbox.end_releases(outbox.next_releases())
    assert outbox.all_released.is_set()


def test_a_lost_pool_holds_nothing_up() -> None:
    outbox = filled(seal(1, 0, b"a"), acquire(2, b"a"), ReleaseAsk(1))
    outbox.drop_seals()
    assert outbox.next_seals() == []
    assert [ask.cache_id for ask in outbox.next_acquires(())] == [2]
    assert outbox.next_releases() == [ReleaseAsk(1)]


def test_acked_seq_is_that_of_the_last_call_before_the_oldest_open_one() -> None:
    numbers = CallNumbers()
    assert numbers.begin() == (1, 0)
    assert numbers.begin() == (2, 0)
    numbers.end(2)
    assert numbers.begin() == (3, 0)
    numbers.end(1)
    assert numbers.begin() == (4, 2)
    numbers.end(3)
    numbers.end(4)
    assert numbers.begin() == (5, 4)
