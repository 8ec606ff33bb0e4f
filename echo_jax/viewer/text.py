"""Text of strangers as a page may show it, and tokens as text.

Terminals write control codes, and agents write whatever they like. What would move the cursor,
turn the direction of the text or cannot be seen at all becomes a visible sign here. That nothing
becomes markup is for the page: it sets text and never HTML.
"""

import codecs
import math
from collections.abc import Sequence

# Characters that show nothing although Python calls them printable: the default ignorables of
# Unicode that are no format characters (Hangul fillers, variation selectors, joiners), and the
# blank Braille cell.
_INVISIBLE = frozenset(
    [
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
        *(*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)),
    ]
)


class _Signs(dict):
    """For str.translate: what each character is shown as, decided when it is first met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character in '\n\t' or (character.isprintable() and code not in _INVISIBLE):
            sign = character
        elif code < 0x20:
            sign = chr(0x2400 + code)  # the picture of a control character, such as ␛
        else:
            sign = '␡' if code == 0x7F else f'<U+{code:04X}>'
        self[code] = sign
        return sign


_SIGNS = _Signs()


def visible(text: str) -> str:
    """`text` with every control, format and invisible character as a sign; newlines and tabs stay.

    ESC becomes ␛ and U+202E becomes <U+202E>. So do spaces other than the ordinary one, since they
    look like it, and halves of surrogate pairs, which UTF-8 cannot carry.
    """
    return text.translate(_SIGNS)


def token_texts(tokens: Sequence[int], table: Sequence[bytes]) -> list[str]:
    """What each token adds to the text, visible; `table` has the bytes of each id.

    A character that is cut over several tokens belongs to the last of them, and the others are
    empty. Bytes that are no UTF-8 are U+FFFD, and an id outside the table is shown as its number.
    """
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    texts = []
    for token in tokens:
        known = 0 <= token < len(table)
        piece = decoder.decode(table[token]) if known else f'<token {token}>'
        texts.append(visible(piece))
    if texts:
        texts[-1] += visible(decoder.decode(b'', final=True))
    return texts


def number(value: float | None, digits: int = 6) -> float | None:
    """A number for JSON with so many significant digits; None for None and what JSON cannot say."""
    return None if value is None or not math.isfinite(value) else float(f'{value:.{digits}g}')
