"""A Decoder service that only keeps time: `python -m tests.bench.paced_decoder --ttft 0.3 --itl 0.2 --tokens 50`.

It prints its address, and at the end of input the truth: one JSON line with the seconds from receiving each request to
sending its first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from protos import decoder_pb2 as pb
from protos import decoder_pb2_grpc as pb_grpc
from services.serving import SERVER_OPTIONS

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class PacedDecoder(pb_grpc.DecoderServicer):
    """The first token after ttft_s, one more every itl_s; nothing at all is sent between the two ends of a stall."""

    def __init__(self, ttft_s: float, itl_s: float, num_tokens: int, stall: tuple[float, float] | None = None) -> None:
        self._ttft_s, self._itl_s, self._num_tokens = ttft_s, itl_s, num_tokens
        self._stall = stall  # seconds since the first request
        self._began: float | None = None
        self.ttfts: list[float] = []

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        loop = asyncio.get_running_loop()
        received = loop.time()
        if self._began is None:
            self._began = received
        yield pb.GenerateResponse(
            started=pb.Started(prompt_token_ids=request.token_ids.ids, seed=1, max_tokens=self._num_tokens)
        )
        for position in range(self._num_tokens):
            at = received + self._ttft_s + position * self._itl_s
            if self._stall and self._stall[0] <= at - self._began < self._stall[1]:
                at = self._began + self._stall[1]
            await asyncio.sleep(at - loop.time())
            if position == 0:
                self.ttfts.append(loop.time() - received)
            yield pb.GenerateResponse(delta=pb.Delta(position=position, token_ids=[position], text="x"))
        finished = pb.Finished(
            reason=pb.FINISH_REASON_LENGTH,
            num_prompt_tokens=len(request.token_ids.ids),
            num_output_tokens=self._num_tokens,
        )
        yield pb.GenerateResponse(finished=finished)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(name="paced", vocab_size=1000)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return pb.TokenizeResponse()

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        return pb.AbortResponse()


async def main(args: argparse.Namespace) -> None:
    decoder = PacedDecoder(args.ttft, args.itl, args.tokens, args.stall)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    pb_grpc.add_DecoderServicer_to_server(decoder, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(decoder.ttfts), flush=True)
    await server.stop(None)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ttft", type=float, default=0.3, metavar="S")
    parser.add_argument("--itl", type=float, default=0.2, metavar="S")
    parser.add_argument("--tokens", type=int, default=50, metavar="N")
    parser.add_argument("--stall", type=float, nargs=2, metavar=("BEGIN", "END"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    asyncio.run(main(parse()))
