"""From GenerateRequest to DecodeRequest: everything is resolved and checked here, and every error names the field and the fix."""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from protos import decoder_pb2
from services.decoder.chat_template import ChatTemplate
from services.decoder.errors import InvalidRequestError, NeverFitsError, NotServedError
from services.decoder.request import DecodeRequest, SamplingParams, sample_id
from services.decoder.tokenizer import Tokenizer

MAX_LOGPROBS = 20
MAX_SAMPLES = 16  # of one request
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_NAME_CHARS = 128  # of request ids and tenants
# Logits are divided by it; below, float32 overflows and what is meant is greedy.
MIN_TEMPERATURE = 1e-4

TENANT_METADATA_KEY = "leasehold-tenant"


@dataclass(frozen=True)
class Limits:
    """What the checks compare with."""

    vocab_size: int  # of config.json, not of the tokenizer
    kv_capacity: int  # tokens of one request; the setting itself, never rounded up to whole blocks
    numerics_id: str
    model_stop_token_ids: frozenset[int]
    max_seqs: int = MAX_SAMPLES  # sequences in a batch


@dataclass(frozen=True)
class ParsedRequest:
    """A checked request, and what the engine does not need of it."""

    samples: tuple[DecodeRequest, ...]  # in the order of their indices
    stop_strings: tuple[str, ...]
    delivered_texts: tuple[str, ...]  # of each sample, before a resumption
    exact_resume: bool

    @property
    def first(self) -> DecodeRequest:
        """Sample 0, whose engine's id is the request's own."""
        return self.samples[0]


class RequestParser:
    """Checks requests against one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._limits = limits

    def parse(self, request: decoder_pb2.GenerateRequest, tenant: str) -> ParsedRequest:
        """Raises InvalidRequestError, NotServedError or NeverFitsError."""
        _refuse_what_is_not_served(request)
        num_samples = self._num_samples(request)
        request_id = _name("request_id", request.request_id) or f"req-{uuid.uuid4().hex}"
        _name(f"metadata {TENANT_METADATA_KEY}", tenant)
        resumed = request.HasField("resume")
        progress = [decoder_pb2.SampleProgress()] * num_samples
        if resumed:
            progress = self._progress(request.resume, num_samples)
        prompt = self._resumed_prompt(request.resume) if resumed else self._prompt(request)
        max_tokens = self._max_tokens(request, len(prompt))
        for index, sample in enumerate(progress):
            if len(sample.output_token_ids) > max_tokens:
                raise InvalidRequestError(
                    f"resume.samples[{index}].output_token_ids",
                    f"{len(sample.output_token_ids)} tokens are more than max_tokens {max_tokens}; send max_tokens as "
                    "`started` told it",
                )
        first = DecodeRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=self._sampling(request),
            max_tokens=max_tokens,
            stop_token_ids=self._stop_token_ids(request.stop),
            min_tokens=_min_tokens(request.stop, max_tokens),
            num_logprobs=_num_logprobs(request),
            priority=request.priority,
            tenant=tenant,
            # 0 is what `started` tells when there is no manager.
            age_ticket=(request.resume.age_ticket or None) if resumed else None,
            is_resumed=resumed,
        )
        return ParsedRequest(
            tuple(
                replace(
                    first,
                    request_id=sample_id(request_id, index),
                    sample_index=index,
                    output_token_ids=tuple(sample.output_token_ids),
                )
                for index, sample in enumerate(progress)
            ),
            self._stop_strings(request.stop),
            tuple(sample.delivered_text for sample in progress),
            resumed and request.resume.numerics_id == self._limits.numerics_id,
        )

    def tokenize(self, request: decoder_pb2.TokenizeRequest) -> list[int]:
        """The prompt's token ids, as Generate would take them."""
        return self._prompt(request)

    def _prompt(self, request: decoder_pb2.GenerateRequest | decoder_pb2.TokenizeRequest) -> list[int]:
        kind = request.WhichOneof("prompt")
        if kind == "text":
            if not request.text:
                raise InvalidRequestError("text", "is empty; send at least one character")
            ids = self._tokenizer.encode(request.text, "text", add_special_tokens=True)
        elif kind == "chat":
            ids = self._tokenizer.encode(self._render(request.chat), "chat", add_special_tokens=False)
        elif kind == "token_ids" and isinstance(request, decoder_pb2.GenerateRequest):
            ids = self._checked_ids("token_ids.ids", request.token_ids.ids)
        else:
            raise InvalidRequestError("prompt", "is missing; send text, token_ids or chat")
        if not ids:
            raise InvalidRequestError(f"{kind}", "is an empty prompt; send at least one token")
        return ids

    def _render(self, chat: decoder_pb2.Chat) -> str:
        if self._template is None:
            raise NotServedError("chat", "this model's checkpoint has no chat template; send text or token_ids")
        if not chat.messages:
            raise InvalidRequestError("chat.messages", "is empty; send at least one message")
        for index, message in enumerate(chat.messages):
            if not message.role:
                raise InvalidRequestError(
                    f"chat.messages[{index}].role", 'is empty; send "system", "user" or "assistant"'
                )
        return self._template.render([{"role": m.role, "content": m.content} for m in chat.messages], "chat")

    def _num_samples(self, request: decoder_pb2.GenerateRequest) -> int:
        if not request.HasField("n"):
            return 1
        most = min(MAX_SAMPLES, self._limits.max_seqs)
        if not 1 <= request.n <= most:
            raise InvalidRequestError(
                "n",
                f"is {request.n}; send 1 to {most} samples (at most {MAX_SAMPLES}, and this decoder's --max-seqs "
                f"{self._limits.max_seqs})",
            )
        return request.n

    def _progress(self, resume: decoder_pb2.Resume, num_samples: int) -> list[decoder_pb2.SampleProgress]:
        if len(resume.samples) != num_samples:
            raise InvalidRequestError(
                "resume.samples",
                f"has {len(resume.samples)} entries; send exactly {num_samples}, as n is {num_samples}",
            )
        for index, progress in enumerate(resume.samples):
            self._checked_ids(f"resume.samples[{index}].output_token_ids", progress.output_token_ids)
        return list(resume.samples)

    def _resumed_prompt(self, resume: decoder_pb2.Resume) -> list[int]:
        ids = self._checked_ids("resume.prompt_token_ids", resume.prompt_token_ids)
        if not ids:
            raise InvalidRequestError("resume.prompt_token_ids", "is empty; send the ids that `started` told")
        return ids

    def _checked_ids(self, field: str, ids: Sequence[int]) -> list[int]:
        values = np.asarray(ids, dtype=np.int64)
        beyond = np.flatnonzero(values >= self._limits.vocab_size)
        if len(beyond):
            index = int(beyond[0])
            raise InvalidRequestError(
                f"{field}[{index}]",
                f"{values[index]} is not below the model's vocab_size of {self._limits.vocab_size}; send ids of this model",
            )
        checked: list[int] = values.tolist()
        return checked

    def _max_tokens(self, request: decoder_pb2.GenerateRequest, num_prompt_tokens: int) -> int:
        capacity = self._limits.kv_capacity
        asked = request.resume.max_tokens or None
        if asked is None and request.stop.HasField("max_tokens"):
            asked = request.stop.max_tokens
            if asked == 0:
                raise InvalidRequestError(
                    "stop.max_tokens", "is 0; send at least 1, or leave it out to use what is left"
                )
        remaining = capacity - num_prompt_tokens
        if remaining < 1:
            raise NeverFitsError(
                f"prompt: {num_prompt_tokens} tokens leave no room for output in this decoder's capacity of {capacity} tokens; "
                "shorten the prompt, or start the decoder with a larger --kv-capacity"
            )
        if asked is not None and asked > remaining:
            raise NeverFitsError(
                f"stop.max_tokens: {num_prompt_tokens} prompt tokens and {asked} more are beyond this decoder's capacity of "
                f"{capacity} tokens; ask for at most {remaining}, or start the decoder with a larger --kv-capacity"
            )
        return remaining if asked is None else asked

    def _sampling(self, request: decoder_pb2.GenerateRequest) -> SamplingParams:
        given = request.sampling
        seed = given.seed if given.HasField("seed") else secrets.randbits(64)
        return SamplingParams(
            temperature=_temperature(given.temperature),
            # A list of all tokens is no filter, and spares the sampler a sort.
            top_k=given.top_k if given.top_k < self._limits.vocab_size else 0,
            top_p=_top_p(given.top_p) if given.HasField("top_p") else 1.0,
            min_p=_within("sampling.min_p", given.min_p, 0.0, 1.0),
            seed=request.resume.seed if request.HasField("resume") else seed,
            presence_penalty=_within("sampling.presence_penalty", given.presence_penalty, -2.0, 2.0),
            frequency_penalty=_within("sampling.frequency_penalty", given.frequency_penalty, -2.0, 2.0),
            repetition_penalty=(
                _repetition_penalty(given.repetition_penalty) if given.HasField("repetition_penalty") else 1.0
            ),
            logit_bias=self._logit_bias(given),
        )

    def _logit_bias(self, given: decoder_pb2.SamplingParams) -> dict[int, float]:
        for token_id, bias in given.logit_bias.items():
            field = f"sampling.logit_bias[{token_id}]"
            if token_id >= self._limits.vocab_size:
                raise InvalidRequestError(
                    field, f"is not below the model's vocab_size of {self._limits.vocab_size}; send ids of this model"
                )
            if not math.isfinite(bias):
                raise InvalidRequestError(field, f"{bias} is not finite; send -100 to ban a token, 100 to force it")
        return dict(given.logit_bias)

    def _stop_token_ids(self, stop: decoder_pb2.StopConditions) -> frozenset[int]:
        own = frozenset[int]() if stop.ignore_eos else self._limits.model_stop_token_ids
        return own | frozenset(self._checked_ids("stop.token_ids", stop.token_ids))

    def _stop_strings(self, stop: decoder_pb2.StopConditions) -> tuple[str, ...]:
        if stop.strings and not self._tokenizer.has_text:
            raise NotServedError(
                "stop.strings",
                "this model's checkpoint has no tokenizer.json, so there is no text; send stop.token_ids",
            )
        if len(stop.strings) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                "stop.strings", f"has {len(stop.strings)} entries; send at most {MAX_STOP_STRINGS}"
            )
        for index, string in enumerate(stop.strings):
            if not 1 <= len(string) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    f"stop.strings[{index}]",
                    f"has {len(string)} characters; send 1 to {MAX_STOP_STRING_CHARS}",
                )
        return tuple(stop.strings)


def _refuse_what_is_not_served(request: decoder_pb2.GenerateRequest) -> None:
    if request.HasField("structured_output"):
        raise NotServedError("structured_output", "is not served yet; leave it out and check the text yourself")
    parts: tuple[tuple[str, Message], ...] = (
        ("", request),
        ("sampling.", request.sampling),
        ("stop.", request.stop),
        ("resume.", request.resume),
    )
    for prefix, message in parts:
        unknown = UnknownFieldSet(message)
        if len(unknown):
            raise NotServedError(
                f"{prefix}{unknown[0].field_number}",
                "a field of this number is not known to this decoder, which is older than the client; leave it out",
            )


def _name(field: str, value: str) -> str:
    if len(value) > MAX_NAME_CHARS or not value.isprintable():
        raise InvalidRequestError(
            field, f"is not at most {MAX_NAME_CHARS} printable characters; send a shorter, plainer one"
        )
    return value


def _temperature(value: float) -> float:
    if not (math.isfinite(value) and (value == 0.0 or value >= MIN_TEMPERATURE)):
        raise InvalidRequestError(
            "sampling.temperature",
            f"{value:g} is neither 0 (greedy) nor a finite number of at least {MIN_TEMPERATURE:g}",
        )
    return value


def _top_p(value: float) -> float:
    if not 0.0 < value <= 1.0:
        raise InvalidRequestError(
            "sampling.top_p", f"{value:g} is not in (0, 1]; send 1, or leave it out, to keep all tokens"
        )
    return value


def _repetition_penalty(value: float) -> float:
    if not (math.isfinite(value) and value > 0.0):
        raise InvalidRequestError(
            "sampling.repetition_penalty",
            f"{value:g} is not a finite number above 0; send 1, or leave it out, for none",
        )
    return value


def _within(field: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise InvalidRequestError(field, f"{value:g} is not in [{low:g}, {high:g}]; send 0, or leave it out, for none")
    return value


def _min_tokens(stop: decoder_pb2.StopConditions, max_tokens: int) -> int:
    if stop.min_tokens > max_tokens:
        raise InvalidRequestError(
            "stop.min_tokens",
            f"{stop.min_tokens} is more than max_tokens {max_tokens}; lower it or raise stop.max_tokens",
        )
    return stop.min_tokens


def _num_logprobs(request: decoder_pb2.GenerateRequest) -> int | None:
    if not request.HasField("logprobs"):
        return None
    if request.logprobs > MAX_LOGPROBS:
        raise InvalidRequestError(
            "logprobs", f"{request.logprobs} alternatives are too many; send at most {MAX_LOGPROBS}"
        )
    return request.logprobs
