"""One decoder process: loads, registers, serves and stops, in that order."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from clients.kv_manager import KvManagerClient
from protos import decoder_pb2, decoder_pb2_grpc, kv_manager_pb2
from services import serving
from services.decoder.chat_template import load_chat_template
from services.decoder.config import (
    DecoderConfig,
    check_kv,
    resolve_backend,
    resolve_kv_capacity,
    resolve_kv_dtype,
    resolve_precision,
)
from services.decoder.contiguous_leases import ContiguousLeases
from services.decoder.cuda_model import warm_up
from services.decoder.cuda_start import refuse_mps
from services.decoder.engine import Engine, EngineSettings, LoadedModel
from services.decoder.event_router import EventRouter
from services.decoder.gpu_pool import map_gpu_pool
from services.decoder.kv_view import ContiguousKv, PagedKv
from services.decoder.lease_watch import LeaseWatch
from services.decoder.leases import KvGeometry
from services.decoder.loaded_model import load
from services.decoder.loader import open_checkpoint
from services.decoder.metrics import DecoderCollector
from services.decoder.model_config import ModelConfig, read_model_config
from services.decoder.ops.base import Ops
from services.decoder.request_meter import RequestFigures
from services.decoder.request_parser import Limits, RequestParser
from services.decoder.servicer import DecoderServicer
from services.decoder.session import ManagerLeases, MappedPool, WorkerSettings
from services.decoder.tokenizer import load_tokenizer
from services.metrics import MetricsEndpoint

_log = structlog.get_logger(__name__)

SERVICE_NAME = "leasehold.v1.Decoder"
# After the engine has ended every request, its last responses still have to go out.
_LAST_WORDS_S = 2.0

_Result = TypeVar("_Result")


class DecoderService:
    """A decoder from its configuration on. `stop` may be called at any stage, and gives back whatever was taken."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._is_loaded = False
        self._watch: LeaseWatch | None = None
        self._server: grpc.aio.Server | None = None
        self._health: health_aio.HealthServicer | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._figures = RequestFigures()
        self._collector = DecoderCollector(self._figures)
        self.metrics = MetricsEndpoint(self._collector)
        self.address = ""  # as bound

    @property
    def is_loading(self) -> bool:
        """Whether the engine's thread reads weights, which nothing can interrupt but the end of the process."""
        return self._engine is not None and not self._is_loaded

    async def start(self) -> None:
        """Returns when it serves; raises ConfigError, CheckpointError or AddressError when it never can."""
        config = self._config
        await _in_thread(lambda: refuse_taken(config.listen))
        if config.metrics_listen is not None:
            await self.metrics.start(config.metrics_listen)
            _log.info("metrics", address=self.metrics.address)
        backend = resolve_backend(config.backend)
        checkpoint = await _in_thread(lambda: open_checkpoint(config.model))
        model_config = read_model_config(checkpoint)
        precision = resolve_precision(config.precision, backend, model_config.kv_dtype)
        kv_capacity = resolve_kv_capacity(config.kv_capacity, model_config.max_position_embeddings)
        kv_dtype = resolve_kv_dtype(config.kv_dtype, model_config.kv_dtype, backend, precision)
        check_kv(kv_dtype, config.kv_layout, backend, precision)
        tokenizer = await _in_thread(lambda: load_tokenizer(config.model, model_config.vocab_size))
        template = load_chat_template(config.model, tokenizer.special_tokens)

        router = EventRouter(asyncio.get_running_loop())
        leases = self._lease_port(kv_capacity, kv_dtype, backend)
        self._collector.watch = self._watch = LeaseWatch(leases)
        if backend == "cuda" and isinstance(leases, ManagerLeases):  # parse_args has refused --no-paged with it
            refuse_mps()
            await leases.hold_lock()
        settings = EngineSettings(
            max_seqs=config.max_seqs,
            max_waiting=config.max_waiting,
            kv_capacity=kv_capacity,
            max_num_batched_tokens=config.max_num_batched_tokens,
            reserve_full=config.reserve_full,
            shares_prefixes_between_tenants=config.shares_prefixes_between_tenants,
        )
        built: list[tuple[LoadedModel, Ops]] = []

        def build_model() -> LoadedModel:
            threads, layout = config.threads, config.kv_layout
            built.append(load(checkpoint, model_config, kv_dtype, backend, precision, threads, layout))
            if backend == "cuda":
                warm_up(built[0][0].model, model_config, kv_dtype, settings)
            return built[0][0]

        self._collector.engine = self._engine = Engine(build_model, self._watch, settings, router.emit)
        await _in_thread(self._load)
        await self._open_leases(self._watch)

        info = self._info(*built[0], model_config, kv_capacity)
        info.has_chat_template = template is not None
        self._collector.info = info
        limits = Limits(
            info.vocab_size,
            kv_capacity,
            numerics_id=info.numerics_id,
            model_stop_token_ids=frozenset(info.stop_token_ids),
            max_seqs=config.max_seqs,
        )
        parser = RequestParser(tokenizer, template, limits)
        await self._serve(DecoderServicer(self._engine, router, parser, tokenizer, info, self._figures), self._watch)

    async def stop(self) -> None:
        """Refuses new requests, lets running ones end within the grace time, fails the rest, and releases every lease."""
        if self._health_task is not None:
            self._health_task.cancel()
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        if self._engine is not None and not self.is_loading:
            engine, grace_s = self._engine, self._config.grace_s
            # The engine refuses new requests, not gRPC, which would cancel them without a reason.
            await _in_thread(lambda: engine.stop(grace_s))
        if self._server is not None:
            await self._server.stop(_LAST_WORDS_S)
        if self._watch is not None and not self.is_loading:
            await self._watch.close()
        self.metrics.stop()
        _log.info("stopped")

    def _load(self) -> None:
        assert self._engine is not None
        try:
            self._engine.start()
        finally:  # on the thread that waits for it: a cancelled `start` has not loaded anything
            self._is_loaded = True

    def _lease_port(self, kv_capacity: int, kv_dtype: str, backend: str) -> ManagerLeases | ContiguousLeases:
        config = self._config
        if not config.paged:

            def make_kv(geometry: KvGeometry) -> ContiguousKv:
                return contiguous_kv(geometry, config.max_seqs, kv_capacity)

            return ContiguousLeases(make_kv)

        memory = "cuda" if backend == "cuda" else "host"

        def map_pool(pool: kv_manager_pb2.PoolInfo) -> MappedPool:
            path = Path(pool.kv_path)
            if memory == "cuda":
                return map_gpu_pool(path, config.worker_id, kv_dtype)
            kv = PagedKv(path, kv_dtype)
            if kv.pool_id != pool.pool_id:
                raise ValueError(f"{pool.kv_path} is another pool; mount the manager's pool directory at the same path")
            return kv

        settings = WorkerSettings(config.worker_id, config.max_seqs, kv_capacity, memory)
        return ManagerLeases(KvManagerClient(config.kv_manager), settings, map_pool)

    async def _open_leases(self, watch: LeaseWatch) -> None:
        await watch.open()
        # The pool's messages come through the loop; a manager that answered has been heard after one turn.
        await asyncio.sleep(0)
        if not watch.can_serve:
            _log.warning("waiting for the KV manager", address=self._config.kv_manager)
        await watch.until_can_serve()

    async def _serve(self, servicer: DecoderServicer, watch: LeaseWatch) -> None:
        self._server = grpc.aio.server(options=serving.SERVER_OPTIONS)
        decoder_pb2_grpc.add_DecoderServicer_to_server(servicer, self._server)
        self._health = await serving.add_health_and_reflection(self._server, [SERVICE_NAME])
        self._health_task = asyncio.create_task(_follow(watch, self._health))
        # Last: gRPC accepts connections from here on.
        self.address = serving.bind(self._server, "--listen", self._config.listen)
        await self._server.start()
        _log.info("serving", address=self.address, worker_id=self._config.worker_id, paged=self._config.paged)

    def _info(
        self, loaded: LoadedModel, ops: Ops, model_config: ModelConfig, kv_capacity: int
    ) -> decoder_pb2.GetModelInfoResponse:
        config = self._config
        return decoder_pb2.GetModelInfoResponse(
            model_type=model_config.model_type,
            name=config.model.name,
            vocab_size=model_config.vocab_size,
            kv_capacity_tokens=kv_capacity,
            max_seqs=config.max_seqs,
            numerics_id=loaded.numerics_id,
            batch_invariant=ops.batch_invariant,
            stop_token_ids=model_config.eos_token_ids,
            backend=ops.backend,
            kv_storage=decoder_pb2.KV_STORAGE_PAGED if config.paged else decoder_pb2.KV_STORAGE_CONTIGUOUS,
            block_size=self._watch.block_size if config.paged and self._watch is not None else 0,
            kv_dtype=loaded.kv_geometry.kv_dtype,
            model_fingerprint=loaded.kv_geometry.model_fingerprint,
            worker_id=config.worker_id,
        )


def contiguous_kv(geometry: KvGeometry, max_seqs: int, kv_capacity: int) -> ContiguousKv:
    """Caches for --no-paged, one for each running request; their memory is taken when they are first used."""
    return ContiguousKv(
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        kv_dtype=geometry.kv_dtype,
        kv_capacity=kv_capacity,
        max_seqs=max_seqs,
        layout=geometry.kv_layout,
    )


def refuse_taken(address: str) -> None:
    """Raises AddressError when somebody listens there: before minutes of loading, which `bind` comes after."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:").removeprefix("//")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            # gRPC replaces a socket file, also one that is in use.
            if probe.connect_ex(path) == 0:
                raise serving.AddressError(
                    f"--listen: cannot listen on {address}: another process does; choose another"
                )
        return
    host, port = address.rsplit(":", 1)
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise serving.AddressError(f"--listen: cannot listen on {address}: {error.strerror or error}") from error
    family, kind, protocol, _, where = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError as error:
            fix = "stop what runs there, or choose another port"
            if error.errno == errno.EADDRNOTAVAIL:
                fix = "choose an address of this host"
            raise serving.AddressError(f"--listen: cannot listen on {address}: {error.strerror}; {fix}") from error


async def _follow(watch: LeaseWatch, health: health_aio.HealthServicer) -> None:
    """Keeps the decoder's health at what it can do: without its manager it refuses new requests."""
    while True:
        await watch.changed.wait()
        watch.changed.clear()
        status = health_pb2.HealthCheckResponse
        await health.set(SERVICE_NAME, status.SERVING if watch.can_serve else status.NOT_SERVING)


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """Runs work on a thread that does not keep the process alive, as the loop's own pool would."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_Result] = loop.create_future()

    def settle(result: _Result | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # work's own result, when it raised nothing

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, name="blocking", daemon=True).start()
    return await done
