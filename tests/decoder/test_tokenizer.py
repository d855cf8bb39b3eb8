"""Tokenizers and chat templates, from checkpoint files whole, bare, missing and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import processors

from services.decoder.chat_template import load_chat_template
from services.decoder.errors import CheckpointError, InvalidRequestError, NotServedError
from services.decoder.tokenizer import load_tokenizer
from tests.decoder.tokenizers_for_tests import EOS, VOCAB_SIZE, byte_fallback, byte_level, save

USER = [{"role": "user", "content": "hi <b>"}]


def test_text_goes_there_and_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(byte_level(), tmp_path), VOCAB_SIZE)
    for text in ["he said STOP", "你好 😀", "tabs\tand\nlines", " leading", "é"]:
        ids = tokenizer.encode(text, "text", add_special_tokens=True)
        assert tokenizer.decode(ids) == text


def test_special_and_unknown_tokens_decode_to_nothing(tmp_path: Path) -> None:
    inner = byte_level()
    tokenizer = load_tokenizer(save(inner, tmp_path), VOCAB_SIZE)
    assert tokenizer.encode(EOS, "text", add_special_tokens=False) == [inner.token_to_id(EOS)]
    ids = [inner.token_to_id(EOS), inner.token_to_id("<think>"), 500, inner.token_to_id("h"), 10_000]
    assert tokenizer.decode(ids) == "<think>h"
    assert tokenizer.byte_pieces is not None
    assert b"".join(tokenizer.byte_pieces[i] for i in ids) == b"<think>h"


def test_only_byte_level_tokenizers_have_byte_pieces(tmp_path: Path) -> None:
    assert load_tokenizer(save(byte_fallback(), tmp_path), VOCAB_SIZE).byte_pieces is None


def test_a_bos_token_is_added_once(tmp_path: Path) -> None:
    inner = byte_level()
    bos_id = inner.token_to_id("<|im_start|>")
    inner.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos_id)]
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|im_start|>"}}))
    tokenizer = load_tokenizer(save(inner, tmp_path), VOCAB_SIZE)
    h = inner.token_to_id("h")
    assert tokenizer.encode("h", "text", add_special_tokens=True) == [bos_id, h]
    assert tokenizer.encode("<|im_start|>h", "text", add_special_tokens=True) == [bos_id, h]
    assert tokenizer.encode("h", "text", add_special_tokens=False) == [h]


def test_saved_truncation_and_padding_do_not_cut_prompts(tmp_path: Path) -> None:
    inner = byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=16)
    tokenizer = load_tokenizer(save(inner, tmp_path), VOCAB_SIZE)
    assert tokenizer.decode(tokenizer.encode("abcdefgh", "text", add_special_tokens=True)) == "abcdefgh"


def test_tokens_beyond_the_models_vocabulary_are_refused_by_name(tmp_path: Path) -> None:
    inner = byte_level()
    eos_id = inner.token_to_id(EOS)
    tokenizer = load_tokenizer(save(inner, tmp_path), eos_id)
    with pytest.raises(InvalidRequestError, match=rf"^chat: holds '<|im_end|>'.* id {eos_id}.*leave it out"):
        tokenizer.encode(f"hello {EOS}", "chat", add_special_tokens=False)


def test_without_a_tokenizer_text_is_refused_by_name_and_ids_decode_to_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path, VOCAB_SIZE)
    assert not tokenizer.has_text
    assert tokenizer.decode([1, 2, 3]) == ""
    with pytest.raises(NotServedError, match=r"^text: .*no tokenizer.json; send token_ids"):
        tokenizer.encode("hello", "text", add_special_tokens=True)


@pytest.mark.parametrize(
    ("file_name", "content"),
    [
        ("tokenizer.json", "{ not json"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_broken_files_end_the_start_up_with_their_name(tmp_path: Path, file_name: str, content: str) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / file_name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{file_name}: .*fetch the file again"):
        load_tokenizer(tmp_path, VOCAB_SIZE)


def _template(tmp_path: Path, source: str) -> str:
    (tmp_path / "chat_template.jinja").write_text(source)
    template = load_chat_template(tmp_path, {"eos_token": EOS})
    assert template is not None
    return template.render(USER, "chat")


def test_templates_render_as_in_transformers(tmp_path: Path) -> None:
    source = """\
{% for m in messages %}
    {%- if loop.index > 9 %}{% break %}{% endif %}
<|im_start|>{{ m.role }}
{{ m['content'] }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
{% generation %}{{ messages | tojson }}{% endgeneration %}
"""
    expected = f"<|im_start|>user\nhi <b>{EOS}\n<|im_start|>assistant\n" + json.dumps(USER)
    assert _template(tmp_path, source) == expected
    assert _template(tmp_path, "{{ strftime_now('%Y') | length }}{{ undefined_name }}") == "4"


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}) is None
    sources: list[tuple[str, object]] = [
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]},
        ),
        ("tokenizer_config.json", {"chat_template": "config"}),
        ("chat_template.json", {"chat_template": "json"}),
    ]
    for (file_name, content), expected in zip(sources, ["D", "config", "json"], strict=True):
        (tmp_path / file_name).write_text(json.dumps(content))
        template = load_chat_template(tmp_path, {})
        assert template is not None
        assert template.render(USER, "chat") == expected
    (tmp_path / "chat_template.jinja").write_text("jinja")
    template = load_chat_template(tmp_path, {})
    assert template is not None
    assert template.render(USER, "chat") == "jinja"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"^chat: .*refuses these messages: roles must alternate"),
        ("{% for m in messages %}", r"^chat: .*does not compile \(line 1: "),
        ("{{ messages[3].content.upper() }}", r"^chat: .*refuses these messages: "),
        ("{{ ''.__class__.__mro__ }}", r"^chat: .*refuses these messages: .*unsafe"),
        ("{{ messages.append(1) }}", r"^chat: .*refuses these messages: "),
        ("{{ 1 // 0 }}", r"^chat: .*refuses these messages: "),
    ],
)
def test_bad_templates_are_errors_of_the_request(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        _template(tmp_path, source)


def test_a_template_of_another_type_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(CheckpointError, match="chat_template is neither"):
        load_chat_template(tmp_path, {})
