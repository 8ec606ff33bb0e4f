"""Variables, quotes and escapes in a Dockerfile's words, as BuildKit's shell lexer has them.

That is no shell: no globs, no splitting into words, no commands. The forms are $NAME, ${NAME}, and
${NAME:-word} with -, +, ? and without the colon. ${NAME#...}, ${NAME%...} and ${NAME/...} are
refused. By hand, because no Python package has them (see parser.py).
Source: github.com/moby/buildkit, frontend/dockerfile/shell/lex.go.
"""

from collections.abc import Mapping

_SPECIAL = '@*#?-$!0'  # the names of one character that a shell knows; no Dockerfile sets them


def expand(text: str, env: Mapping[str, str], escape: str = '\\', quotes: bool = True) -> str:
    """`text` with variables put in, and without its quotes and escapes.

    `quotes` of False leaves quotes as they are, as in the text of a heredoc. Raises ValueError for
    what BuildKit refuses, or what is not known here.
    """
    return _Reader(text, env, escape, quotes).until('')


def split_words(text: str, escape: str = '\\') -> list[str]:
    """The words of `text`, their quotes and escapes kept."""
    words, word, quote, position = [], '', '', 0
    while position < len(text):
        char = text[position]
        position += 1
        if char == escape and quote != "'":
            word += char + text[position : position + 1]
            position += 1
        elif char.isspace() and not quote:
            words += [word] if word else []
            word = ''
        else:
            if quote == char:
                quote = ''
            elif not quote and char in '\'"':
                quote = char
            word += char
    return words + ([word] if word else [])


class _Reader:
    """Reads a text once, from its start to its end."""

    def __init__(self, text: str, env: Mapping[str, str], escape: str, quotes: bool):
        self._text, self._env, self._escape, self._quotes = text, env, escape, quotes
        self._position = 0

    def _peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def _next(self) -> str:
        char = self._peek()
        self._position += 1
        return char

    def until(self, stop: str) -> str:
        """What stands before `stop`, which is used up; '' is the end of the text."""
        result = ''
        while (char := self._next()) != stop:
            if char == '':
                raise ValueError(f'{self._text!r} lacks a {stop}')
            if char == "'" and self._quotes:
                result += self._single()
            elif char == '"' and self._quotes:
                result += self._double()
            elif char == '$':
                result += self._variable()
            elif char == self._escape:
                result += self._next()
            else:
                result += char
        return result

    def _single(self) -> str:
        end = self._text.find("'", self._position)
        if end < 0:
            raise ValueError(f"{self._text!r} lacks a '")
        inside, self._position = self._text[self._position : end], end + 1
        return inside

    def _double(self) -> str:
        result = ''
        while (char := self._next()) != '"':
            if char == '':
                raise ValueError(f'{self._text!r} lacks a "')
            if char == '$':
                result += self._variable()
            elif char == self._escape and self._peek() in ('"', '$', self._escape):
                result += self._next()
            elif char != self._escape or self._peek():
                result += char
        return result

    def _variable(self) -> str:
        """What stands for the variable whose `$` has just been read."""
        if self._peek() != '{':
            name = self._name()
            return self._env.get(name, '') if name else '$'
        self._next()
        name = self._name()
        form = self._next()
        is_null_unset = form == ':'
        if is_null_unset:
            form = self._next()
        if not name or form not in ('}', '-', '+', '?') or (is_null_unset and form == '}'):
            raise ValueError(
                f'{self._text!r} has a form of ${{NAME}} other than ${{NAME}}, ${{NAME:-word}}, '
                '${NAME:+word} and ${NAME:?word}'
            )
        value = self._env.get(name)
        if form == '}':
            return value or ''
        word = self.until('}')
        is_set = value is not None and not (is_null_unset and value == '')
        if form == '+':
            return word if is_set else ''
        if form == '?' and not is_set:
            raise ValueError(f'{self._text!r}: {name} is not set; {word}'.rstrip('; '))
        return (value or '') if is_set else word

    def _name(self) -> str:
        first = self._peek()
        if first and first in _SPECIAL:
            return self._next()
        name = ''
        while (char := self._peek()) and (char.isalnum() or char == '_'):
            if first.isdigit() and not char.isdigit():
                break
            name += self._next()
        return name
