"""Requests checked at the edge: each error names the field and the fix, and nothing is silently ignored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protos import decoder_pb2 as pb
from services.decoder.chat_template import ChatTemplate
from services.decoder.errors import InvalidRequestError, NeverFitsError, NotServedError
from services.decoder.request import request_id_of
from services.decoder.request_parser import Limits, ParsedRequest, RequestParser
from services.decoder.tokenizer import Tokenizer
from tests.decoder.tokenizers_for_tests import VOCAB_SIZE, byte_level

CAPACITY = 50  # no multiple of any block size
NUMERICS = "mlx-f32-test"
TOKENIZER = Tokenizer(byte_level(), VOCAB_SIZE, {})
TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}", {})
LIMITS = Limits(VOCAB_SIZE, CAPACITY, NUMERICS, frozenset({7}))
PARSER = RequestParser(TOKENIZER, TEMPLATE, LIMITS)
BARE = RequestParser(Tokenizer(None, VOCAB_SIZE, {}), None, LIMITS)


def _request(**fields: Any) -> pb.GenerateRequest:
    if not {"text", "token_ids", "chat", "resume"} & set(fields):
        fields["token_ids"] = pb.TokenIds(ids=[1, 2, 3])
    return pb.GenerateRequest(**fields)


def _parse(**fields: Any) -> ParsedRequest:
    return PARSER.parse(_request(**fields), "")


def _resume(**fields: Any) -> pb.Resume:
    fields.setdefault("prompt_token_ids", [1, 2])
    fields.setdefault("samples", [pb.SampleProgress(output_token_ids=[104], delivered_text="h")])
    return pb.Resume(**fields)


def test_defaults_are_resolved() -> None:
    parsed = _parse()
    decode = parsed.first
    assert decode.request_id.startswith("req-")
    assert decode.prompt_token_ids == (1, 2, 3)
    assert decode.max_tokens == CAPACITY - 3
    assert (decode.sampling.temperature, decode.sampling.top_p, decode.sampling.repetition_penalty) == (0.0, 1.0, 1.0)
    assert decode.stop_token_ids == {7}
    assert (decode.num_logprobs, decode.priority, decode.age_ticket, decode.min_tokens) == (None, 0, None, 0)
    assert _parse().first.sampling.seed != decode.sampling.seed, "drawn for each request"


def test_everything_given_is_taken() -> None:
    sampling = pb.SamplingParams(
        temperature=0.5, top_k=9, top_p=0.25, min_p=0.125, seed=0, presence_penalty=-2, frequency_penalty=1.5,
        repetition_penalty=1.25, logit_bias={5: -100.0},
    )  # fmt: skip
    stop = pb.StopConditions(max_tokens=8, strings=["x", "yz"], token_ids=[9], ignore_eos=True, min_tokens=8)
    request = _request(request_id="r1", sampling=sampling, stop=stop, logprobs=0, priority=-3, n=1)
    parsed = PARSER.parse(request, "acme")
    decode = parsed.first
    assert (decode.request_id, decode.tenant, decode.priority, decode.num_logprobs) == ("r1", "acme", -3, 0)
    assert (decode.max_tokens, decode.min_tokens, decode.stop_token_ids) == (8, 8, {9})
    assert parsed.stop_strings == ("x", "yz")
    got = decode.sampling
    assert (got.temperature, got.top_k, got.top_p, got.min_p, got.seed) == (0.5, 9, 0.25, 0.125, 0)
    assert (got.presence_penalty, got.frequency_penalty, got.repetition_penalty) == (-2, 1.5, 1.25)
    assert got.logit_bias == {5: -100.0}


def test_a_top_k_of_the_whole_vocabulary_is_none() -> None:
    assert _parse(sampling=pb.SamplingParams(top_k=VOCAB_SIZE)).first.sampling.top_k == 0


def test_prompts_of_each_kind() -> None:
    assert list(_parse(text="he").first.prompt_token_ids) == TOKENIZER.encode("he", "", add_special_tokens=True)
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role="assistant")])
    expected = TOKENIZER.encode("user:hi;assistant:;", "", add_special_tokens=False)
    assert list(_parse(chat=chat).first.prompt_token_ids) == expected
    assert PARSER.tokenize(pb.TokenizeRequest(chat=chat)) == expected


def test_a_resumed_request_takes_the_place_of_the_prompt() -> None:
    resume = _resume(seed=11, numerics_id=NUMERICS, age_ticket=4, max_tokens=20)
    parsed = _parse(
        text="ignored", resume=resume, sampling=pb.SamplingParams(seed=5), stop=pb.StopConditions(max_tokens=3)
    )
    decode = parsed.first
    assert (decode.prompt_token_ids, decode.output_token_ids) == ((1, 2), (104,))
    assert (decode.sampling.seed, decode.max_tokens, decode.age_ticket) == (11, 20, 4)
    assert (parsed.delivered_texts, parsed.exact_resume) == (("h",), True)


def test_samples_differ_in_their_index_and_id_alone() -> None:
    samples = _parse(request_id="r1", n=3).samples
    assert [sample.sample_index for sample in samples] == [0, 1, 2]
    assert samples[0].request_id == "r1"
    assert len({sample.request_id for sample in samples}) == 3
    assert {request_id_of(sample.request_id) for sample in samples} == {"r1"}
    assert not any(sample.request_id.isprintable() for sample in samples[1:]), "so that no client's id is one"
    assert all(replace(sample, request_id="r1", sample_index=0) == samples[0] for sample in samples)


def test_no_more_samples_than_the_batch_has_seats() -> None:
    few = RequestParser(TOKENIZER, TEMPLATE, replace(LIMITS, max_seqs=3))
    assert len(few.parse(_request(n=3), "").samples) == 3
    with pytest.raises(InvalidRequestError, match=r"^n: is 4; send 1 to 3 samples .* --max-seqs 3"):
        few.parse(_request(n=4), "")


def test_each_sample_resumes_from_its_own_progress() -> None:
    progress = [pb.SampleProgress(output_token_ids=[104], delivered_text="h"), pb.SampleProgress()]
    parsed = _parse(n=2, resume=_resume(samples=progress, age_ticket=4))
    assert [sample.output_token_ids for sample in parsed.samples] == [(104,), ()]
    assert parsed.delivered_texts == ("h", "")
    assert {sample.age_ticket for sample in parsed.samples} == {4}


def test_exact_resumption_is_only_told_of_the_same_numerics() -> None:
    assert not _parse(resume=_resume(numerics_id="other")).exact_resume
    assert not _parse(resume=_resume()).exact_resume
    without = _parse(resume=_resume(age_ticket=0), stop=pb.StopConditions(max_tokens=6)).first
    assert (without.age_ticket, without.max_tokens) == (None, 6)


def test_row_s19_limits_use_the_capacity_itself_never_whole_blocks() -> None:
    fits = pb.TokenIds(ids=[1] * (CAPACITY - 1))
    assert _parse(token_ids=fits).first.max_tokens == 1
    assert _parse(stop=pb.StopConditions(max_tokens=CAPACITY - 3)).first.max_tokens == CAPACITY - 3
    with pytest.raises(
        NeverFitsError, match=rf"stop.max_tokens: 3 prompt tokens and {CAPACITY - 2} more .* at most {CAPACITY - 3}"
    ):
        _parse(stop=pb.StopConditions(max_tokens=CAPACITY - 2))
    with pytest.raises(NeverFitsError, match=rf"prompt: {CAPACITY} tokens leave no room .*larger --kv-capacity"):
        _parse(token_ids=pb.TokenIds(ids=[1] * CAPACITY))
    with pytest.raises(NeverFitsError):
        _parse(resume=_resume(max_tokens=CAPACITY - 1))


NAN, INF = float("nan"), float("inf")
SamplingRow = tuple[dict[str, Any], str]
BAD_SAMPLING: list[SamplingRow] = [
    ({"temperature": -0.5}, r"sampling.temperature: -0.5 is neither 0 \(greedy\)"),
    ({"temperature": NAN}, r"sampling.temperature: nan"),
    ({"temperature": INF}, r"sampling.temperature: inf"),
    ({"temperature": 1e-30}, r"sampling.temperature: 1e-30 is neither"),
    ({"top_p": 0.0}, r"sampling.top_p: 0 is not in \(0, 1\]; send 1"),
    ({"top_p": 1.5}, r"sampling.top_p: 1.5"),
    ({"top_p": NAN}, r"sampling.top_p: nan"),
    ({"min_p": -0.5}, r"sampling.min_p: -0.5 is not in \[0, 1\]"),
    ({"min_p": 2.0}, r"sampling.min_p: 2"),
    ({"min_p": NAN}, r"sampling.min_p: nan"),
    ({"presence_penalty": 3.0}, r"sampling.presence_penalty: 3 is not in \[-2, 2\]"),
    ({"frequency_penalty": NAN}, r"sampling.frequency_penalty: nan"),
    ({"repetition_penalty": 0.0}, r"sampling.repetition_penalty: 0 is not a finite number above 0; send 1"),
    ({"repetition_penalty": INF}, r"sampling.repetition_penalty: inf"),
    ({"logit_bias": {VOCAB_SIZE: 1.0}}, rf"sampling.logit_bias\[{VOCAB_SIZE}\]: .* vocab_size of {VOCAB_SIZE}"),
    ({"logit_bias": {3: INF}}, r"sampling.logit_bias\[3\]: inf is not finite; send -100"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_SAMPLING)
def test_bad_sampling_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        _parse(sampling=pb.SamplingParams(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": ""}, "text: is empty; send at least one"),
        ({"token_ids": pb.TokenIds()}, "token_ids: is an empty prompt; send at least one token"),
        (
            {"token_ids": pb.TokenIds(ids=[1, VOCAB_SIZE])},
            rf"token_ids.ids\[1\]: {VOCAB_SIZE} is not below .*send ids of this",
        ),
        ({"token_ids": pb.TokenIds(ids=[2**32 - 1])}, r"token_ids.ids\[0\]: 4294967295 is not below"),
        ({"chat": pb.Chat()}, "chat.messages: is empty; send"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(content="x")])}, r"chat.messages\[0\].role: is empty; send"),
        ({"request_id": "x" * 129}, "request_id: is not at most 128 printable characters; send"),
        ({"request_id": "a\nb"}, "request_id: is not at most"),
        ({"n": 0}, "n: is 0; send 1 to 16 samples"),
        ({"n": 17}, "n: is 17; send 1 to 16 samples"),
        ({"logprobs": 21}, "logprobs: 21 alternatives are too many; send at most 20"),
        ({"stop": pb.StopConditions(max_tokens=0)}, "stop.max_tokens: is 0; send at least 1"),
        (
            {"stop": pb.StopConditions(max_tokens=4, min_tokens=5)},
            "stop.min_tokens: 5 is more than max_tokens 4; lower",
        ),
        ({"stop": pb.StopConditions(strings=["a", ""])}, r"stop.strings\[1\]: has 0 characters; send 1 to"),
        ({"stop": pb.StopConditions(strings=["a" * 1025])}, r"stop.strings\[0\]: has 1025 characters; send 1 to 1024"),
        ({"stop": pb.StopConditions(strings=["a"] * 17)}, "stop.strings: has 17 entries; send at most 16"),
        ({"stop": pb.StopConditions(token_ids=[VOCAB_SIZE])}, r"stop.token_ids\[0\]: "),
        ({"resume": _resume(prompt_token_ids=[])}, "resume.prompt_token_ids: is empty; send the ids"),
        ({"resume": _resume(prompt_token_ids=[600])}, r"resume.prompt_token_ids\[0\]: 600 is not below"),
        ({"resume": _resume(samples=[])}, "resume.samples: has 0 entries; send exactly 1, as n is 1"),
        (
            {"resume": _resume(samples=[pb.SampleProgress()] * 2)},
            "resume.samples: has 2 entries; send exactly 1, as n is 1",
        ),
        ({"n": 3, "resume": _resume()}, "resume.samples: has 1 entries; send exactly 3, as n is 3"),
        (
            {"n": 2, "resume": _resume(samples=[pb.SampleProgress(), pb.SampleProgress(output_token_ids=[900])])},
            r"resume.samples\[1\].output_token_ids\[0\]: 900 is not below",
        ),
        (
            {"resume": _resume(samples=[pb.SampleProgress(output_token_ids=[1, 900])])},
            r"resume.samples\[0\].output_token_ids\[1\]: 900 is not below",
        ),
        (
            {"resume": _resume(samples=[pb.SampleProgress(output_token_ids=[1, 2, 3])], max_tokens=2)},
            r"resume.samples\[0\].output_token_ids: 3 tokens are more than max_tokens 2; send",
        ),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}") as caught:
        _parse(**fields)
    assert str(caught.value).startswith(caught.value.field)


def test_a_missing_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt: is missing; send text, token_ids or chat"):
        PARSER.parse(pb.GenerateRequest(), "")
    with pytest.raises(InvalidRequestError, match=r"^prompt: is missing"):
        PARSER.tokenize(pb.TokenizeRequest())


def test_a_bad_tenant_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"^metadata leasehold-tenant: "):
        PARSER.parse(_request(), "t" * 129)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured_output": pb.StructuredOutput(regex="a+")}, "structured_output: is not served yet; leave it out"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(NotServedError, match=f"^{message}"):
        _parse(**fields)


def test_fields_of_a_newer_client_are_refused_not_ignored() -> None:
    newer = pb.GenerateRequest.FromString(_request().SerializeToString() + b"\xd0\x0f\x01")  # field 250, varint 1
    with pytest.raises(NotServedError, match=r"^250: .*leave it out"):
        PARSER.parse(newer, "")
    sampling = pb.SamplingParams.FromString(b"\xd0\x0f\x01")
    with pytest.raises(NotServedError, match=r"^sampling.250: "):
        _parse(sampling=sampling)


def test_a_bare_checkpoint_serves_token_ids_and_refuses_text_by_name() -> None:
    assert BARE.parse(_request(), "").first.prompt_token_ids == (1, 2, 3)
    rows: list[tuple[dict[str, Any], str]] = [
        ({"text": "hello"}, "^text: .*send token_ids"),
        (
            {"chat": pb.Chat(messages=[pb.ChatMessage(role="user")])},
            "^chat: .*no chat template; send text or token_ids",
        ),
        ({"stop": pb.StopConditions(strings=["x"])}, "^stop.strings: .*send stop.token_ids"),
    ]
    for fields, message in rows:
        with pytest.raises(NotServedError, match=message):
            BARE.parse(_request(**fields), "")
