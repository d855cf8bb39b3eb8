"""A service process without a service: `python -m tests.clients.fake_service --listen ADDR MODE`."""

from __future__ import annotations

import asyncio
import signal
import sys

import grpc

from services.serving import SERVER_OPTIONS, add_health_and_reflection, bind


async def main(address: str, mode: str) -> int:
    print("a line of log", flush=True)
    if mode == "dies":
        return 3
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if mode == "deaf" else stop.set)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    await add_health_and_reflection(server, ["leasehold.v1.Decoder"])
    bind(server, "--listen", address)
    await server.start()
    await stop.wait()
    await server.stop(None)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[2], sys.argv[3])))
