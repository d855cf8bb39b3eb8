"""Counts the manager's calls, and times those that are one request and one reply."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from services.metrics import FAST_BOUNDS, Histogram

_Handler = Any  # grpc.RpcMethodHandler; the stubs do not say what is in one
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallMeter(grpc.aio.ServerInterceptor):
    """An interceptor for one service; calls of others (health, reflection) pass by."""

    def __init__(self, service_name: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._prefix = f"/{service_name}/"
        self._clock = clock
        self._handlers: dict[str, _Handler] = {}
        self.latencies: dict[str, Histogram] = {}
        self.ended: Counter[tuple[str, str]] = Counter()  # by method and status code
        self.open_streams: Counter[str] = Counter()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]], details: grpc.HandlerCallDetails
    ) -> _Handler:
        """See grpc.aio.ServerInterceptor."""
        name = str(details.method)
        if not name.startswith(self._prefix):
            return await continuation(details)
        handler = self._handlers.get(name)
        if handler is None:
            inner = await continuation(details)
            if inner is None:  # no such method; what a client makes up must not fill the memory
                return inner
            handler = self._handlers[name] = self._measured(name.removeprefix(self._prefix), inner)
        return handler

    def _measured(self, method: str, inner: _Handler) -> _Handler:
        codecs = {
            "request_deserializer": inner.request_deserializer,
            "response_serializer": inner.response_serializer,
        }
        if inner.response_streaming:
            self.open_streams[method] = 0
            if inner.request_streaming:
                return grpc.stream_stream_rpc_method_handler(self._stream(method, inner.stream_stream), **codecs)
            return grpc.unary_stream_rpc_method_handler(self._stream(method, inner.unary_stream), **codecs)
        self.latencies[method] = Histogram(FAST_BOUNDS)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, inner.unary_unary), **codecs)

    def _unary(self, method: str, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        latency, clock = self.latencies[method], self._clock

        async def measured(request: Any, context: Any) -> Any:
            began = clock()
            code = "CANCELLED"
            try:
                reply = await behaviour(request, context)
                code = "OK"
                return reply
            except Exception:
                code = _code_name(context)
                raise
            finally:
                latency.observe(clock() - began)
                self.ended[method, code] += 1

        return measured

    def _stream(
        self, method: str, behaviour: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., AsyncGenerator[Any, None]]:
        async def measured(request: Any, context: Any) -> AsyncGenerator[Any, None]:
            self.open_streams[method] += 1
            code = "CANCELLED"
            try:
                async with aclosing(behaviour(request, context)) as replies:
                    async for reply in replies:
                        yield reply
                code = "OK"
            except Exception:
                code = _code_name(context)
                raise
            finally:
                self.open_streams[method] -= 1
                self.ended[method, code] += 1

        return measured


def _code_name(context: Any) -> str:
    """The status that a failing call was given; UNKNOWN is what gRPC makes of an exception of Python's."""
    code = context.code()
    if not isinstance(code, grpc.StatusCode):
        code = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    return (grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code).name
