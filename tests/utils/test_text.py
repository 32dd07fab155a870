"""Text that is safe to print."""

from sam_gym.utils.text import printable


def test_only_what_cannot_be_shown_is_escaped() -> None:
    for text in ("a b/c.png", "日本 é", "100 % \\"):
        assert printable(text) == text
    assert printable("a\x1b[2J\n\udcff\u202e") == r"a\x1b[2J\n\udcff\u202e"
