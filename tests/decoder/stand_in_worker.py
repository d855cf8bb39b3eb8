"""A worker with a fake model on a pool in stand-in memory, in a process of its own: `python -m tests.decoder.stand_in_worker ADDRESS ID`.

Lines on stdin: `run ID PROMPT NUM_PROMPT MAX_TOKENS` answers with the request's tokens; `hold ...` starts one and stops in its third
step; `go` lets it end, and answers like `run`. PROMPT is the name that tests.decoder.engine_fakes.make_request makes the prompt of.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

from services.decoder.errors import ManagerUnavailableError
from services.decoder.request import DecodeRequest, Failed, Finished
from services.logs import configure_logs
from tests.decoder.engine_fakes import Outcome, make_request
from tests.decoder.leasing import Decoder
from tests.gpu_stand_in import StandInPool


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


async def _served(decoder: Decoder, request: DecodeRequest) -> Outcome:
    """What comes of a request, sent as a client does: again where the decoder is without its manager for a moment."""
    [outcome] = await decoder.run(request)
    for attempt in count(1):
        if not isinstance(outcome.last, Failed) or not isinstance(outcome.error, ManagerUnavailableError):
            break
        await asyncio.sleep(0.02)
        [outcome] = await decoder.run(replace(request, request_id=f"{request.request_id} {attempt}"))
    return outcome


async def main(address: str, worker_id: str) -> None:
    """See the module's docstring."""
    configure_logs("info")

    def map_pool(pool: object) -> StandInPool:
        return StandInPool(Path(pool.kv_path), worker_id, "f32")  # type: ignore[attr-defined]

    async with Decoder(address, worker_id, map_pool=map_pool, pool_memory="cuda") as decoder:
        attempt = 0
        while not isinstance((await decoder.run(make_request(f"ready {attempt}")))[0].last, Finished):
            attempt += 1  # it has no pool yet
            await asyncio.sleep(0.02)
        _say(event="ready")
        held = ""
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, *arguments = line.split()
            if command == "go":
                decoder.model.gate.set()
                outcome = await decoder.outcome(held)
                _say(event="done", tokens=outcome.tokens, cached=outcome.finished.num_cached_tokens)
                continue
            request_id, prompt, num_prompt, max_tokens = arguments
            request = replace(make_request(prompt, int(num_prompt), int(max_tokens)), request_id=request_id)
            if command == "hold":
                decoder.model.hold_at = len(decoder.model.batches) + 2
                decoder.submit(request)
                await asyncio.to_thread(decoder.model.until_held)
                held = request_id
                _say(event="held")
                continue
            outcome = await _served(decoder, request)
            _say(event="done", tokens=outcome.tokens, cached=outcome.finished.num_cached_tokens)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
