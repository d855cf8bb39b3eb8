"""What comes out of a run: the table, JSON lines, the HTML report, comparisons and sweeps; and troubles."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from clients.cli.arguments import build_parser, normalize
from clients.loadtest.chaos import Trouble, check_names, parse_troubles
from clients.loadtest.command import find_knee, make_plan, make_workload, read_summary, with_load
from clients.loadtest.figures import ServiceLevel, parse_service_level, summarize
from clients.loadtest.html_report import render
from clients.loadtest.lengths import SpecError
from clients.loadtest.records import OK, WRONG, Mark, PoolSample, RequestRecord, RunRecord, StepSample, to_lines
from clients.loadtest.tables import compare_text, run_text, sweep_text
from clients.loadtest.workload import FileWorkload, read_requests
from protos import decoder_pb2 as pb


def a_run(label: str = "<b>run</b>", slower: float = 1.0) -> RunRecord:
    run = RunRecord(label, {"rate": "[4.0]", "chaos": "None"}, duration_s=10.0, ended_s=11.0)
    for number in range(40):
        due = number / 4
        arrivals = [due + 0.1 * slower + 0.02 * slower * i for i in range(5)]
        record = RequestRecord(number, 0, due, due, due + 0.05, arrivals, [1] * 5, arrivals[-1], OK, target="d:1")
        record.num_prompt_tokens, record.num_cached_tokens, record.right = 10, 5, True
        run.requests.append(record)
    run.requests[3].status, run.requests[3].right, run.requests[3].message = WRONG, False, "got <script>"
    run.requests.append(RequestRecord(41, 0, 9.9, 9.9, ended_s=10.0, status="UNAVAILABLE"))
    run.pool = [PoolSample(t / 4, 100, 90, 6, 3, 1, 0, 2, 1) for t in range(44)]
    run.steps = [StepSample(float(t), "d:1", {"forward": 0.5, "sample": 0.1}) for t in range(11)]
    run.marks = [Mark(5.0, "kill decoder-1 & co")]
    run.lags = [(t / 100, 0.001) for t in range(1100)]
    return run


def arguments(*argv: str) -> Any:
    return build_parser().parse_args(normalize(["loadtest", *argv]))


def test_the_figures_of_a_run() -> None:
    summary = summarize(a_run(), ServiceLevel(ttft_s=0.2))
    assert summary["requests"] == {
        "due": 41,
        "ok": 39,
        "checked": 40,
        "wrong": 1,
        "failed": 2,
        "resumed": 0,
        "resumed_inexactly": 0,
    }
    assert summary["latency_s"]["queue"]["p50"] == pytest.approx(0.05)
    assert summary["latency_s"]["ttft"]["p99.9"] == pytest.approx(0.1)
    assert summary["cached_token_share"] == 0.5
    assert summary["good_share"] == pytest.approx(39 / 41)
    assert summary["pool"]["peak_in_use"] == 9
    assert not summary["client"]["was_the_limit"]
    json.dumps(summary)


def test_the_warm_up_is_left_out() -> None:
    summary = summarize(a_run(), ServiceLevel(), warmup_s=5.0)
    assert summary["requests"]["due"] == 21
    assert summary["requests"]["wrong"] == 0


def test_the_table_says_what_failed_and_who_was_the_limit() -> None:
    run = a_run()
    text = run_text(summarize(run, parse_service_level("ttft=0.2,tpot=0.1")))
    assert "FAILED         1 requests: wrong answer" in text
    assert "FAILED         1 requests: UNAVAILABLE" in text
    assert "TTFT ≤ 0.200 s, TPOT ≤ 0.100 s" in text
    assert "the client was the limit" not in text
    run.lags = [(t / 100, 0.05) for t in range(1100)]
    assert "the client was the limit" in run_text(summarize(run, ServiceLevel()))


def test_an_empty_run_has_a_table_and_a_report() -> None:
    run = RunRecord("", {})
    summary = summarize(run, ServiceLevel())
    assert "0 due" in run_text(summary)
    assert "</html>" in render(run, summary)


class _Checker(HTMLParser):
    """Every tag is closed, and nothing is fetched from anywhere."""

    void = frozenset({"meta", "circle", "line", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "b1"), tag
        assert not {name for name, _ in attrs} & {"src", "href", "onload"}
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_sound_page_that_needs_no_network() -> None:
    run = a_run()
    page = render(run, summarize(run, ServiceLevel(ttft_s=0.2)))
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.counts["svg"] == 7
    assert "http" not in page
    assert "url(" not in page
    assert "&lt;b&gt;run&lt;/b&gt;" in page
    assert "kill decoder-1 &amp; co" in page
    assert "got &lt;script&gt;" in page
    assert not re.search(r"\bnan\b", page)


def test_json_lines_hold_every_record_and_the_summary(tmp_path: Path) -> None:
    run = a_run("first")
    lines = to_lines(run, summarize(run, ServiceLevel()))
    kinds = [line["type"] for line in lines]
    assert kinds[0] == "run"
    assert kinds.count("request") == 41
    assert kinds.count("pool") == 44
    assert kinds.count("mark") == 1
    assert kinds[-1] == "summary"
    path = tmp_path / "run.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_summary(str(path))["label"] == "first"
    path.write_text("{}\n")
    with pytest.raises(SpecError, match="holds no run"):
        read_summary(str(path))


def test_a_comparison_says_which_way_it_went() -> None:
    fast, slow = (summarize(a_run(name, by), ServiceLevel()) for name, by in (("fast", 1.0), ("slow", 1.5)))
    rows = {line.split("  ")[0]: line for line in compare_text(fast, slow).splitlines()}
    assert rows["ttft p99, s"].endswith("+50.0%  worse")
    assert compare_text(slow, fast).count("better") > 5
    assert "worse" not in compare_text(fast, fast)


async def test_a_sweep_finds_the_knee() -> None:
    tried: list[float] = []

    async def keeps(load: float) -> bool:
        tried.append(load)
        return load <= 21

    assert await find_knee(keeps, None, 1.0, 4, whole=True) == 21
    assert tried == [1, 2, 4, 8, 16, 32, 24, 20, 22, 21]
    assert await find_knee(keeps, [5.0, 10.0, 40.0], 1.0, 0, whole=False) == 10
    assert await find_knee(keeps, [50.0], 1.0, 3, whole=False) is None
    assert await find_knee(keeps, [5.0, 10.0], 1.0, 3, whole=False) == 10
    summary = summarize(a_run(), ServiceLevel())
    assert "knee: 10 users" in sweep_text([(10, summary), (20, summary)], 10, "users")
    assert "broke at every load" in sweep_text([(10, summary)], None, "users")


def test_flags_become_a_plan() -> None:
    plan = make_plan(arguments("--rate", "1,5", "--arrivals", "ramp", "--duration", "7", "--think", "1-2"))
    assert plan.arrivals is not None
    assert (plan.arrivals.pattern, list(plan.arrivals.rates), plan.duration_s) == ("ramp", [1, 5], 7)
    assert (plan.think_s.low, plan.think_s.high) == (1, 2)
    doubled = with_load(plan, 2.0)
    assert doubled.arrivals is not None
    assert list(doubled.arrivals.rates) == [2, 10]
    closed = make_plan(arguments("sweep", "--users", "3"))
    assert closed.arrivals is None
    assert with_load(closed, 6.0).users == 6
    with pytest.raises(SpecError, match="two rates"):
        make_plan(arguments("--rate", "1", "--arrivals", "ramp"))


def test_workloads_refuse_what_cannot_be_asked(tmp_path: Path) -> None:
    info = pb.GetModelInfoResponse(name="bare", vocab_size=10)
    with pytest.raises(SpecError, match="no chat template"):
        make_workload(arguments(), info, calm=False)
    info.has_chat_template = True
    with pytest.raises(SpecError, match="--tasks"):
        make_workload(arguments("--tasks", "recall,nonsense"), info, calm=False)
    with pytest.raises(SpecError, match="--requests-file"):
        make_workload(arguments("--prompts", "file"), info, calm=False)
    with pytest.raises(SpecError, match="--priority"):
        make_workload(arguments("--priority", "high=0.5"), info, calm=False)
    path = tmp_path / "requests.jsonl"
    for text, says in (("{", "no JSON"), ('{"x": 1}', "none of"), ("", "no requests")):
        path.write_text(text)
        with pytest.raises(SpecError, match=says):
            read_requests(str(path))


def test_requests_come_from_a_file_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"prompt": "a", "answer": "b", "max_tokens": 3}\n'
        '{"token_ids": [1, 2]}\n'
        '{"messages": [{"role": "user", "content": "c"}]}\n'
    )
    info = pb.GetModelInfoResponse()
    workload = make_workload(arguments("--prompts", "file", "--requests-file", str(path)), info, calm=True)
    assert isinstance(workload, FileWorkload)
    asks = [workload.conversation(index).next() for index in range(4)]
    assert (asks[0].request.text, asks[0].request.stop.max_tokens) == ("a", 3)
    assert asks[0].check(" b ") is True
    assert asks[0].check("c") is False
    assert list(asks[1].request.token_ids.ids) == [1, 2]
    assert asks[1].check("anything") is None
    assert asks[2].request.chat.messages[0].content == "c"
    assert asks[3].request.text == "a"


def test_troubles_are_parsed_and_named() -> None:
    troubles = parse_troubles("9:start:decoder-1, 4.5:kill:decoder-1")
    assert troubles == [Trouble(4.5, "kill", "decoder-1"), Trouble(9.0, "start", "decoder-1")]
    for text in ("x", "1:explode:decoder", "-1:kill:decoder", "1:kill:"):
        with pytest.raises(SpecError, match="AT:ACTION:NAME"):
            parse_troubles(text)
    with pytest.raises(SpecError, match="there is no decoder-1"):
        check_names(troubles, [])


@pytest.mark.parametrize("text", ["", "ttft", "ttft=x", "ttft=0", "itl=1"])
def test_a_bad_service_level_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="service level"):
        parse_service_level(text)
