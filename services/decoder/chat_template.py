"""A checkpoint's own chat template, rendered in a sandbox as transformers renders it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import structlog

from services.decoder.errors import CheckpointError, InvalidRequestError
from services.decoder.tokenizer import read_json_object

_log = structlog.get_logger(__name__)

DEFAULT_TEMPLATE = "default"  # of a list of named ones


class ChatTemplate:
    """Turns messages into the text that the model was trained on. Safe to use from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._template: jinja2.Template | None = None
        self._error = ""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            # The decoder still serves text and token ids, so this is an error of each request that needs the template.
            self._error = f"line {getattr(error, 'lineno', 0)}: {error}"
            _log.warning("the chat template does not compile; chats are refused", error=self._error)

    def render(self, messages: Sequence[Mapping[str, str]], field: str) -> str:
        """The prompt, up to where the assistant's answer begins; `field` is the path of the messages, for errors."""
        if self._template is None:
            raise InvalidRequestError(
                field, f"the model's chat template does not compile ({self._error}); send text or token_ids"
            )
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # a template may fail in any way, and the request is what made it
            raise InvalidRequestError(
                field, f"the model's chat template refuses these messages: {error or type(error).__name__}"
            ) from error


def load_chat_template(model_dir: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """The template of a checkpoint folder, None when it has none; raises CheckpointError when its file cannot be read.

    chat_template.jinja goes before chat_template.json, and that before tokenizer_config.json, as in transformers.
    """
    jinja_file = model_dir / "chat_template.jinja"
    source: object = None
    if jinja_file.is_file():
        try:
            source = jinja_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{jinja_file}: not readable as UTF-8 text ({error}); fetch the file again"
            ) from error
    for file_name in ("chat_template.json", "tokenizer_config.json"):
        if source is None:
            source = read_json_object(model_dir / file_name).get("chat_template")
    if source is None:
        return None
    return ChatTemplate(_pick(source, model_dir), special_tokens)


def _pick(source: object, model_dir: Path) -> str:
    """The template itself, or the default one (else the first) of a list of {"name", "template"}."""
    if isinstance(source, str):
        return source
    if isinstance(source, list):
        named = {
            item.get("name"): item.get("template")
            for item in source
            if isinstance(item, dict) and isinstance(item.get("template"), str)
        }
        if named:
            return str(named.get(DEFAULT_TEMPLATE) or next(iter(named.values())))
    raise CheckpointError(
        f"{model_dir}: chat_template is neither a string nor a list of named templates; correct or remove it"
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; here its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, and models were not trained on that.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.datetime.now().strftime(format_string)
