"""The command against real services: `up` in all its endings, and every other command while it runs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clients.checkpoints import find_model
from clients.decoder import DecoderClient
from clients.kv_manager import KvManagerClient
from clients.processes import DECODER_SERVICE, ServiceProcess
from clients.stack import Stack, StackConfig
from protos import decoder_pb2 as pb
from tests.e2e.followed import follow

pytest.importorskip("mlx.core")

_BACKEND = ("--backend", "mlx")
_STOP_TIMEOUT_S = 60
STORY = "Tell me a story about Nora the fox."


@dataclass(frozen=True)
class Running:
    """What `up` printed, and the process itself."""

    process: subprocess.Popen[str]
    manager: str
    decoders: list[str]

    def command(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return leasehold(*argv, stdin=stdin)

    def generate(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return leasehold("generate", "--decoder", self.decoders[0], *argv)

    def status(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(leasehold("status", "--kv-manager", self.manager, "--json").stdout)
        return result

    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(_STOP_TIMEOUT_S)


def leasehold(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "clients.cli", *argv], input=stdin, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@contextmanager
def up(*flags: str) -> Iterator[Running]:
    """`leasehold up` with the bundled model, from the moment that it is ready."""
    ports = ("--manager-port", "0", "--decoder-port", "0")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "clients.cli", "up", "--model", "demo", *_BACKEND, *ports, *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            addresses: dict[str, str] = {}
            for line in process.stdout:
                if line.startswith("ready"):
                    break
                name, address = line.split()
                addresses[name] = address
            log.seek(0)
            assert "kv-manager" in addresses, log.read()
            yield Running(process, addresses.pop("kv-manager"), list(addresses.values()))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(_STOP_TIMEOUT_S)
            assert process.stdout is not None
            process.stdout.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with up("--num-blocks", "256", "--kv-dtype", "int8", "--kv-layout", "nhd") as started:
        yield started


def test_generate_answers_and_every_block_is_free_again(running: Running) -> None:
    done = running.generate("--prompt", "Repeat: zebra-4821")
    assert (done.returncode, done.stdout) == (0, "zebra-4821\n")
    asyncio.run(all_released(running.manager))  # a moment after its end
    status = running.status()
    assert status["num_blocks"] == 256
    assert (status["kv_dtype"], status["kv_layout"]) == ("int8", "nhd")
    assert "MiB, int8 nhd\n" in leasehold("status", "--kv-manager", running.manager).stdout
    assert status["leased"] == status["num_leases"] == 0
    assert status["leases"] == []
    assert [session["state"] for session in status["sessions"]] == ["live"]


def test_json_from_a_prompt_and_from_its_token_ids_agree(running: Running) -> None:
    flags = ("--max-tokens", "6", "--ignore-eos", "--json")
    first = json.loads(running.generate("--prompt", "Repeat: zebra-4821", "--raw", *flags).stdout)
    assert first["finish_reason"] == "length"
    assert len(first["token_ids"]) == 6

    async def tokenize() -> list[int]:
        async with DecoderClient(running.decoders[0]) as client:
            return await client.tokenize(pb.TokenizeRequest(text="Repeat: zebra-4821"))

    ids = ",".join(str(token_id) for token_id in asyncio.run(tokenize()))
    second = json.loads(running.generate("--token-ids", ids, *flags).stdout)
    for key in ("token_ids", "text", "finish_reason", "num_prompt_tokens"):
        assert first[key] == second[key]


def test_a_seed_fixes_what_sampling_draws(running: Running) -> None:
    flags = ("--prompt", STORY, "--temperature", "1.0", "--max-tokens", "20", "--json", "--seed")
    first, same, other = (json.loads(running.generate(*flags, seed).stdout) for seed in ("1", "1", "2"))
    assert first["token_ids"] == same["token_ids"]
    assert first["token_ids"] != other["token_ids"]


@pytest.mark.parametrize(
    ("flags", "code", "field"),
    [
        (["--token-ids", "999999"], "INVALID_ARGUMENT", "token_ids"),
        (["--prompt", ""], "INVALID_ARGUMENT", "text"),
        (["--prompt", "x", "--max-tokens", "1000000"], "OUT_OF_RANGE", "max_tokens"),
    ],
)
def test_a_bad_request_names_code_and_field_and_the_service_goes_on(
    running: Running, flags: list[str], code: str, field: str
) -> None:
    done = running.generate(*flags, "--raw", "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert field in error["message"]
    assert code in done.stderr
    assert running.generate("--prompt", "Repeat: oak-1111").stdout == "oak-1111\n"


def test_a_conversation_from_a_pipe(running: Running) -> None:
    turns = "Repeat: zebra-4821\nWhat is 17 + 25?\n"
    done = running.command("chat", "--decoder", running.decoders[0], stdin=turns)
    assert (done.returncode, done.stdout) == (0, "zebra-4821\n42\n")


def test_top_prints_one_picture_for_a_pipe(running: Running) -> None:
    done = running.command("top", "--kv-manager", running.manager)
    assert done.returncode == 0
    assert "256 blocks" in done.stdout
    assert "live" in done.stdout
    assert "\x1b" not in done.stdout


def test_ctrl_c_cancels_and_gives_the_blocks_back(running: Running) -> None:
    process = subprocess.Popen(
        (
            sys.executable,
            "-m",
            "clients.cli",
            *("generate", "--decoder", running.decoders[0], "--prompt", STORY, "--ignore-eos"),
        ),
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process.stdout.close()
    asyncio.run(all_released(running.manager))


async def all_released(manager: str) -> None:
    async with asyncio.timeout(60), KvManagerClient(manager) as client:
        while (await client.stats()).num_leases:  # noqa: ASYNC110  # the manager tells it only when asked
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_up_stops_everything_on_a_signal(number: int, code: int) -> None:
    with up("--decoders", "2") as started:
        assert len(started.decoders) == 2
        pids = started.pids()
        assert len(pids) == 3
        assert started.end(number) == code
        assert not any(is_alive(pid) for pid in pids)


def test_up_stops_the_rest_when_one_service_dies() -> None:
    with up() as started:
        pids = started.pids()
        worker = started.status()["sessions"][0]["pid"]
        os.kill(worker, signal.SIGKILL)
        assert started.process.wait(_STOP_TIMEOUT_S) == 1
        assert not any(is_alive(pid) for pid in pids)


def test_up_leaves_nothing_when_it_is_killed() -> None:
    with up() as started:
        descriptors = [os.pidfd_open(pid) for pid in started.pids()]
        started.process.kill()
        started.process.wait(_STOP_TIMEOUT_S)
        for descriptor in descriptors:
            asyncio.run(ended(descriptor))
            os.close(descriptor)


async def ended(descriptor: int) -> None:
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, event.set)  # readable once the process has ended
    await asyncio.wait_for(event.wait(), _STOP_TIMEOUT_S)
    loop.remove_reader(descriptor)


def test_up_refuses_a_taken_port(running: Running) -> None:
    port = running.manager.rsplit(":", 1)[1]
    done = leasehold("up", "--model", "demo", "--manager-port", port)
    assert done.returncode == 1
    assert "--manager-port" in done.stderr


async def test_a_stream_survives_the_death_of_its_decoder_exactly(tmp_path: Path) -> None:
    config = StackConfig(
        find_model("demo"), tmp_path, num_decoders=2, manager_port=0, decoder_port=0, decoder_flags=_BACKEND
    )
    held = asyncio.Event()
    stack = Stack(config, lambda name, line: held.set() if '"event": "held"' in line else None)
    first = stack.decoders[0]
    flags = ("--model", str(config.model), "--kv-manager", stack.manager.address, *_BACKEND)
    holds = ("--hold-at", "10", "--hold-until", str(tmp_path / "never"))
    stack.decoders[0] = ServiceProcess(
        first.name, DECODER_SERVICE, first.address, "tests.e2e.held_decoder", (*flags, *holds)
    )
    request = pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=STORY)]),
        sampling=pb.SamplingParams(temperature=0.8, seed=5),
        stop=pb.StopConditions(max_tokens=60, ignore_eos=True),
    )
    try:
        await stack.start()
        async with DecoderClient(stack.decoder_addresses[1]) as client:
            whole = await follow(client, request)
        async with DecoderClient(stack.decoder_addresses) as client:
            running = asyncio.create_task(follow(client, request))
            await held.wait()
            stack.decoders[0].send_signal(signal.SIGKILL)
            stream = await running
    finally:
        await stack.stop()
    assert [event.exact for event in stream.resumed] == [True]
    assert (stream.token_ids, stream.text) == (whole.token_ids, whole.text)


def test_the_demo_answers_everything_right_and_stops_by_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "clients.demo"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right answers       32 of 32" in done.stdout
    assert re.search(r"pool after +(\d+) blocks: .* 0 leased", done.stdout)


def test_the_demo_leaves_nothing_on_ctrl_c() -> None:
    process = subprocess.Popen([sys.executable, "-m", "clients.demo"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("you:"):
        assert process.poll() is None
    pids = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(pids) == 2
    process.send_signal(signal.SIGINT)
    assert process.wait(_STOP_TIMEOUT_S) == 130
    process.stdout.close()
    assert not any(is_alive(pid) for pid in pids)


def test_a_repeated_prompt_hits_and_scrub_and_flush_say_what_they_did(running: Running) -> None:
    ids = ",".join(str(token_id) for token_id in range(100, 180))
    flags = ("--token-ids", ids, "--max-tokens", "2", "--ignore-eos", "--json")
    first = json.loads(running.generate(*flags).stdout)
    again = json.loads(running.generate(*flags).stdout)
    assert again["token_ids"] == first["token_ids"]
    assert again["num_cached_tokens"] == 64  # whole blocks before the last token
    asyncio.run(all_released(running.manager))
    status = running.status()
    assert status["cached"] >= 4
    assert status["hit_rate"] > 0
    scrubbed = running.command("scrub", "--kv-manager", running.manager, "--json")
    assert scrubbed.returncode == 0
    report = json.loads(scrubbed.stdout)
    assert report["num_checked"] == report["num_blocks"] >= 4
    assert report["num_corrupt"] == 0
    assert running.command("flush", "--kv-manager", running.manager, "--tenant", "nobody").stdout.startswith("0 cached")
    flushed = json.loads(running.command("flush", "--kv-manager", running.manager, "--json").stdout)
    assert flushed["num_flushed_blocks"] == status["cached"]
    assert running.status()["free"] == 256


def test_scrub_refuses_a_rate_that_is_no_size(running: Running) -> None:
    refused = running.command("scrub", "--kv-manager", running.manager, "--rate", "fast")
    assert refused.returncode == 2
    assert "--rate: 'fast' is not a size" in refused.stderr
