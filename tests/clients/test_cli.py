"""The command as a process: exit codes, the JSON object, usage errors, what it says on stderr."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from clients.cli import main
from tests.clients.conftest import DEADLINES_S, Serve
from tests.clients.fake_decoder import PROMPT_IDS, Answer, FakeDecoder
from tests.clients.test_decoder_client import free_port

ANSWER = Answer(["Hello", ", ", "wörld", "!"], lag=1)
KEYS = {"token_ids", "text", "finish_reason", "num_prompt_tokens", "num_cached_tokens", "seed", "ttft_s", "e2e_s"}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        lines = self.out.splitlines()
        assert len(lines) == 1, self
        result: dict[str, Any] = json.loads(lines[0])
        return result


@asynccontextmanager
async def started(*argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "clients.cli", *argv, stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def finish(process: asyncio.subprocess.Process, stdin: str = "") -> Ended:
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    assert "Traceback" not in err.decode()
    return Ended(process.returncode, out.decode(), err.decode())


async def leasehold(*argv: str, stdin: str = "") -> Ended:
    async with started(*argv) as process:
        return await finish(process, stdin)


async def out_of_time(num_tokens: int, *argv: str) -> Ended:
    """What becomes of a request whose deadline passes when so many tokens have come and its decoder is silent."""
    for timeout_s in DEADLINES_S[1:]:
        ended = await leasehold(*argv, "--json", "--timeout", str(timeout_s))
        samples = ended.json.get("samples", [ended.json])
        if sum(len(sample["token_ids"]) for sample in samples) == num_tokens:
            return ended
    raise AssertionError(f"within {DEADLINES_S[-1]} s not so many tokens came: {ended}")


async def test_generate_streams_the_text(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    ended = await leasehold("generate", "--decoder", await serve_decoder(decoder), "--prompt", "hi")
    assert (ended.code, ended.out) == (0, "Hello, wörld!\n")
    assert "stop, 4 tokens" in ended.err
    (request,) = decoder.requests
    assert [(m.role, m.content) for m in request.chat.messages] == [("user", "hi")]
    assert request.sampling.temperature == 0
    assert request.sampling.HasField("seed")


async def test_json_is_one_object_with_every_key(serve_decoder: Serve) -> None:
    target = await serve_decoder(FakeDecoder(ANSWER))
    ended = await leasehold("generate", "--decoder", target, "--prompt", "hi", "--json", "--seed", "7")
    assert ended.code == 0
    result = ended.json
    assert set(result) == KEYS
    assert result["token_ids"] == ANSWER.token_ids
    assert result["text"] == ANSWER.text
    assert result["finish_reason"] == "stop"
    assert result["num_prompt_tokens"] == len(PROMPT_IDS)
    assert result["num_cached_tokens"] == 2
    assert result["seed"] == 7
    assert 0 < result["ttft_s"] <= result["e2e_s"]


async def test_samples_are_printed_one_after_another(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER, cuts=[7])  # in the midst of the second
    target = await serve_decoder(decoder)
    ended = await leasehold("generate", "--decoder", target, "--prompt", "hi", "--n", "3")
    assert ended.code == 0
    assert ended.out == "".join(f"--- sample {index}: stop, 4 tokens\nHello, wörld!\n" for index in range(3))
    assert "3 samples, 12 tokens" in ended.err
    assert [request.n for request in decoder.requests] == [3, 3]


async def test_samples_in_json(serve_decoder: Serve) -> None:
    target = await serve_decoder(FakeDecoder(ANSWER))
    ended = await leasehold("generate", "--decoder", target, "--prompt", "hi", "--json", "--n", "2", "--logprobs")
    result = ended.json
    assert set(result) == {*KEYS, "logprobs", "samples"}
    assert [sample["sample_index"] for sample in result["samples"]] == [0, 1]
    for sample in result["samples"]:
        assert set(sample) == {"sample_index", "token_ids", "text", "finish_reason", "logprobs"}
        assert (sample["token_ids"], sample["text"]) == (ANSWER.token_ids, ANSWER.text)
        assert sample["finish_reason"] == "stop"
    assert result["token_ids"] == ANSWER.token_ids


async def test_a_deadline_between_two_samples_is_told_of_the_one_that_met_it(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.hangs_after = 8  # the first token of the second
    target = await serve_decoder(decoder)
    ended = await out_of_time(5, "generate", "--decoder", target, "--prompt", "hi", "--n", "2")
    assert ended.code == 1
    assert [sample["finish_reason"] for sample in ended.json["samples"]] == ["stop", "deadline"]


async def test_every_flag_reaches_the_request(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    flags = "--token-ids 1,2,3 --max-tokens 4 --temperature 0.5 --top-k 6 --top-p 0.9 --min-p 0.1 --seed 8 --stop a --stop b"
    target = await serve_decoder(decoder)
    ended = await leasehold(
        "generate", "--decoder", target, *flags.split(), "--ignore-eos", "--logprobs", "2", "--json"
    )
    assert ended.code == 0
    (request,) = decoder.requests
    assert list(request.token_ids.ids) == [1, 2, 3]
    assert request.stop.max_tokens == 4
    assert list(request.stop.strings) == ["a", "b"]
    assert request.stop.ignore_eos
    sampling = request.sampling
    assert (sampling.top_k, sampling.seed, sampling.temperature) == (6, 8, 0.5)
    assert sampling.top_p == pytest.approx(0.9)
    assert sampling.min_p == pytest.approx(0.1)
    assert request.logprobs == 2
    logprobs = ended.json["logprobs"]
    assert [entry["token_id"] for entry in logprobs] == ANSWER.token_ids
    assert logprobs[0]["top"] == [{"token_id": 100, "logprob": -0.5}]


@pytest.mark.parametrize(("template", "raw"), [(True, True), (False, False)])
async def test_a_prompt_is_text_when_raw_or_without_a_template(serve_decoder: Serve, template: bool, raw: bool) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.has_chat_template = template
    flags = ["--raw"] if raw else []
    ended = await leasehold("generate", "--decoder", await serve_decoder(decoder), "--prompt", "hi", *flags)
    assert ended.code == 0
    assert decoder.requests[0].text == "hi"


async def test_a_broken_stream_goes_on_and_says_so(serve_decoder: Serve) -> None:
    target = await serve_decoder(FakeDecoder(ANSWER, cuts=[3, 2]))
    ended = await leasehold("generate", "--decoder", target, "--prompt", "hi", "--json")
    assert ended.code == 0
    assert ended.json["token_ids"] == ANSWER.token_ids
    assert ended.json["text"] == ANSWER.text
    assert ended.json["num_resumptions"] == 2
    assert ended.json["exact_resume"] is True
    assert "going on at" in ended.err


async def test_an_inexact_resumption_is_a_warning(serve_decoder: Serve) -> None:
    targets = [
        await serve_decoder(FakeDecoder(ANSWER, cuts=[3])),
        await serve_decoder(FakeDecoder(ANSWER, numerics_id="other")),
    ]
    ended = await leasehold(
        "generate", "--decoder", targets[0], "--decoder", targets[1], "--prompt", "hi", "--raw", "--json"
    )
    assert ended.code == 0
    assert ended.json["exact_resume"] is False
    assert "warning" in ended.err


async def test_a_refusal_says_code_field_and_fix(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.refusal = (grpc.StatusCode.OUT_OF_RANGE, "NEVER_FITS", "stop.max_tokens")
    ended = await leasehold("generate", "--decoder", await serve_decoder(decoder), "--prompt", "hi", "--json")
    assert ended.code == 1
    result = ended.json
    assert set(result) == KEYS | {"error"}
    assert result["finish_reason"] == "error"
    assert result["error"]["code"] == "OUT_OF_RANGE"
    assert result["error"]["reason"] == "NEVER_FITS"
    assert result["error"]["field"] == "stop.max_tokens"
    assert result["token_ids"] == []
    assert result["num_prompt_tokens"] is None
    assert "OUT_OF_RANGE [NEVER_FITS]: stop.max_tokens: refused by the script (limit=7)" in ended.err


async def test_an_unreachable_decoder_is_one_line_with_the_fix() -> None:
    target = f"127.0.0.1:{free_port()}"
    ended = await leasehold("generate", "--decoder", target, "--prompt", "hi", "--json", "--retry-for", "0")
    assert ended.code == 1
    assert ended.json["finish_reason"] == "error"
    assert ended.json["error"]["code"] == "UNAVAILABLE"
    assert len(ended.err.splitlines()) == 1
    assert f"cannot reach {target} (Connection refused)" in ended.err
    assert "leasehold up --model DIR" in ended.err


async def test_the_deadline_keeps_what_came(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.hangs_after = 3
    ended = await out_of_time(2, "generate", "--decoder", await serve_decoder(decoder), "--prompt", "hi")
    assert ended.code == 1
    assert ended.json["finish_reason"] == "deadline"
    assert ended.json["token_ids"] == ANSWER.token_ids[:2]
    assert ended.json["text"] == "Hello"
    assert set(ended.json) == KEYS
    assert "DEADLINE_EXCEEDED" in ended.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_cancels_the_request_and_prints_what_came(serve_decoder: Serve, number: int, code: int) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.hangs_after = 3
    async with started("generate", "--decoder", await serve_decoder(decoder), "--prompt", "hi", "--json") as process:
        await decoder.hanging.wait()
        process.send_signal(number)
        ended = await finish(process)
    assert ended.code == code
    assert ended.json["finish_reason"] == "cancelled"
    assert set(ended.json) == KEYS
    await asyncio.wait_for(decoder.cancelled.wait(), 30)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", "x", "--token-ids", "1"], "not allowed"),
        (["generate", "--token-ids", "1,x"], "1,2,3"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "--prompt", "x", "--temperature", "nan"], "--temperature"),
        (["generate", "--prompt", "x", "--top-p", "0"], "above 0"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "--prompt", "x", "--seed", "-1"], "--seed"),
        (["generate", "--prompt", "x", "--logprobs", "21"], "20"),
        (["generate", "--prompt", "x", "--decoder", "here"], "HOST:PORT"),
        (["status", "--kv-manager", "127.0.0.1:0"], "HOST:PORT"),
        (["up"], "--model"),
        (["top", "--interval", "0"], "--interval"),
        (["loadtest", "--users", "2", "--rate", "2"], "not allowed"),
        (["loadtest", "--rate", "1", "--arrivals", "ramp"], "two rates"),
        (["loadtest", "--think", "3-1"], "--think"),
        (["loadtest", "--chaos", "1:kill:decoder"], "--up"),
        (["loadtest", "sweep", "--slo", "fast"], "service level"),
    ],
)
def test_wrong_usage_is_2_and_names_the_flag(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert out == ""


@pytest.mark.parametrize("command", [[], ["up"], ["generate"], ["chat"], ["status"], ["top"], ["loadtest"]])
def test_help_teaches_with_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "  leasehold" in out
    assert "exit codes" in out


async def test_chat_works_with_piped_input(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    target = await serve_decoder(decoder)
    lines = "one\n/help\ntwo\n/nonsense\n/reset\nthree\n/quit\nnever said\n"
    ended = await leasehold("chat", "--decoder", target, "--system", "be brief", stdin=lines)
    assert ended.code == 0
    assert ended.out.count(ANSWER.text + "\n") == 3
    assert "/nonsense is no command" in ended.err
    contents = [[message.content for message in request.chat.messages] for request in decoder.requests]
    assert contents == [
        ["be brief", "one"],
        ["be brief", "one", ANSWER.text, "two"],
        ["be brief", "three"],
    ]


async def test_chat_goes_on_after_a_refused_turn_and_ends_with_1(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.refusal, decoder.num_refusals = (grpc.StatusCode.RESOURCE_EXHAUSTED, "POOL_EXHAUSTED", ""), 1
    ended = await leasehold("chat", "--decoder", await serve_decoder(decoder), stdin="one\ntwo\n")
    assert ended.code == 1
    assert ended.out == ANSWER.text + "\n"
    assert "POOL_EXHAUSTED" in ended.err
    assert [m.content for m in decoder.requests[1].chat.messages] == ["two"]


async def test_chat_needs_a_template(serve_decoder: Serve) -> None:
    decoder = FakeDecoder(ANSWER)
    decoder.has_chat_template = False
    ended = await leasehold("chat", "--decoder", await serve_decoder(decoder), stdin="one\n")
    assert ended.code == 1
    assert "--raw" in ended.err


async def test_ctrl_c_ends_a_load_test_with_the_figures_so_far(serve_decoder: Serve, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "hi"}\n')
    decoder = FakeDecoder(ANSWER)
    decoder.hangs_after = 3
    target = await serve_decoder(decoder)
    flags = ("--decoder", target, "--prompts", "file", "--requests-file", str(requests), "--users", "1", "--json")
    async with started("loadtest", *flags) as process:
        await decoder.hanging.wait()
        process.send_signal(signal.SIGINT)
        ended = await finish(process)
    assert ended.code == 130
    assert ended.json["statuses"] == {"unfinished at the end": 1}
    await asyncio.wait_for(decoder.cancelled.wait(), 30)


async def test_status_of_an_absent_manager_is_one_line() -> None:
    ended = await leasehold("status", "--kv-manager", f"127.0.0.1:{free_port()}")
    assert ended.code == 1
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    assert "is a KV manager running there?" in ended.err


async def test_up_refuses_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    ended = await leasehold("up", "--model", str(tmp_path))
    assert ended.code == 1
    assert "config.json" in ended.err
