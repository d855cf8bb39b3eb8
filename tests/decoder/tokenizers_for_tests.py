"""Small tokenizers of each kind, made on the spot."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

VOCAB_SIZE = 512  # of the model; the tokenizers have fewer tokens
EOS = "<|im_end|>"


def byte_level() -> tokenizers.Tokenizer:
    """One token for each byte, a few merges, two special tokens and two that are not; ids beyond them are unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    # "Ġ" is the space; "ä½ł" are the three bytes of U+4F60, "ðŁ" the first two of an emoji.
    merges = [("h", "e"), ("Ġ", "he"), ("ä", "½"), ("ð", "Ł"), ("S", "T"), ("ST", "O")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", EOS])
    tokenizer.add_tokens(["<think>", "two words"])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """SentencePiece's way: a word's space is "▁", and what is not in the vocabulary is spelt in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "n", "t", "e", "▁a", "▁b", "▁ten"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, model_dir: Path) -> Path:
    """Writes tokenizer.json into a checkpoint folder."""
    model_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    return model_dir
