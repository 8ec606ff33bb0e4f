"""What a dialect is: how a policy's turn is written down, and how its calls are read.

The rest of agent/ asks the dialect that `protocol.dialect` names and knows no call format itself. A
dialect is a module of this package with the members of `Dialect`; adding one takes one new file and
one line in `__init__.py`. It runs nothing and knows no tokenizer.
"""

import dataclasses
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Command:
    """One call that is not `done`. A call with an error still counts as a command."""

    name: str  # the function's name, '' if the call names none
    arguments: dict[str, str]  # stripped values by parameter name
    error: str = ''  # why the call cannot be run, '' if it can
    raw: str = ''  # the call's own text, stripped


@dataclasses.dataclass(frozen=True)
class ParsedResponse:
    """What one response asks for."""

    commands: list[Command]
    is_done: bool = False
    error: str = ''  # why the whole response is refused; `commands` is empty then


class Dialect(Protocol):
    """The members of a dialect's module. A response is what the policy sampled in one turn."""

    THINK_TAGS: tuple[str, str]  # opening and closing tag of the thinking
    THINK_OPEN: str  # ends the generation prompt, so the policy never samples it
    TAGS: tuple[str, ...]  # tags that stay in a decoded response even if they are special tokens

    def parse_response(self, text: str) -> ParsedResponse:
        """Reads the calls of a response whose thinking has been stripped."""
        ...

    def format_warnings(self, text: str) -> list[str]:
        """What is wrong with the form of a response, thinking included, in a fixed order."""
        ...

    def strip_thinking(self, text: str) -> str:
        """The response without its thinking blocks."""
        ...

    def text_after_thinking(self, text: str) -> str:
        """What follows the end of the thinking, '' if it never ends."""
        ...

    def write_response(self, thought: str, command: str | None, done: bool) -> str:
        """The response that thinks `thought`, runs `command` if there is one, and may be done."""
        ...

    def tools_prompt(self, tools: list[dict[str, Any]]) -> str:
        """The part of the system message that gives the tools' JSON schemas and the call format."""
        ...
