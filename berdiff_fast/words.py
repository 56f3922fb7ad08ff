# SPDX-License-Identifier: Apache-2.0
"""Words for a terminal: names of files may hold anything, and what a terminal would obey is shown, not sent."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

#: A message of more characters than this is cut: some hold what a file said, which has no end.
LONGEST = 2000

# Control characters; those that turn the direction of text or take no space; halves of pairs (names not in UTF-8).
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def shown(text: str, *, lines: bool = False) -> str:
    """Text as a terminal may have it: escape sequences, overprinting and bytes that are no text are written out.

    Args:
        text: of any origin.
        lines: leave the ends of lines, of a text that has several.
    """

    def written_out(found: re.Match[str]) -> str:
        code = ord(found[0])
        if lines and code == 0x0A:
            return "\n"
        if 0xDC80 <= code <= 0xDCFF:  # a byte of a name, as Python has it (PEP 383)
            code -= 0xDC00
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _OBEYED.sub(written_out, text)


def line(error: BaseException | str) -> str:
    """What an error says, in one line that a terminal may have; the middle of a very long one is left out."""
    text = str(error)
    if len(text) > 8 * LONGEST:  # before work that grows with it
        text = text[: 4 * LONGEST] + " ... " + text[-4 * LONGEST :]
    text = shown(" ".join(text.split())) or (type(error).__name__ if isinstance(error, BaseException) else "")
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return text


@contextlib.contextmanager
def muted(name: str, silent: bool = True) -> Iterator[None]:
    """Drop the messages of a logger within a ``with`` block."""
    logger = logging.getLogger(name)

    def drop(record: logging.LogRecord) -> bool:
        return False

    if silent:
        logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


class _Shown(logging.Filter):
    """Messages of our logger name files too."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if _OBEYED.search(text):
            record.msg, record.args = shown(text, lines=True), ()
        return True


logging.getLogger("berdiff_fast").addFilter(_Shown())
