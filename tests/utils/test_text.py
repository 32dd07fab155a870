"""Text that is safe to print."""

import io
import pickle

import pytest
import torch

from sam_gym.utils.text import counted, listed, printable, reason_of, safe_name


def test_only_what_cannot_be_shown_is_escaped() -> None:
    for text in ("a b/c.png", "日本 é", "100 % \\"):
        assert printable(text) == text
    assert printable("a\x1b[2J\n\udcff\u202e") == r"a\x1b[2J\n\udcff\u202e"


def test_numbers_have_their_nouns() -> None:
    expected = ["0 runs", "1 run", "2 runs", "1,000 runs"]
    assert [counted(number, "run") for number in (0, 1, 2, 1000)] == expected


def test_lists_read_as_a_sentence_does() -> None:
    assert [listed("abc"[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_reasons_are_one_line_without_advice_to_load_unsafely() -> None:
    assert reason_of(RuntimeError("size mismatch:\n\ta is 1,\n\tb is 2")) == (
        "RuntimeError: size mismatch: a is 1, b is 2"
    )
    assert reason_of(EOFError()) == "EOFError"
    with pytest.raises(pickle.UnpicklingError, match="weights_only` set to `False`") as caught:
        torch.load(io.BytesIO(b"garbage"), weights_only=True)
    assert reason_of(caught.value) == "UnpicklingError"


def test_file_names_are_safe_everywhere() -> None:
    assert safe_name("scans/day 1.png") == "scans__day 1.png"
    assert safe_name('a\n\udcff<"b">') == "a____b__"
    assert len(safe_name("é" * 300).encode()) == 200
