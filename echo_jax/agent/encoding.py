"""Text to token ids and roles, with untrusted text kept apart from the chat template.

A frame is the template's text on both sides of one content, found by rendering a sentinel in its
place. Content is encoded by a copy of the tokenizer that has no added tokens, so no content can
hold one (docs/protocol.md#untrusted-text). This module knows no budgets and no commands.
"""

import json
import re
from typing import NamedTuple

import jinja2
import numpy as np
import tokenizers
import transformers

from echo_jax.agent.dialects.dialect import Dialect
from echo_jax.types import Role

SENTINEL = 'SENTINEL'
TURN_END = '<|im_end|>'
# If a token overlaps several spans, its role is the one that comes last here, so content wins over
# the template, the terminal's words win over the harness's, and no part of a warning is ever
# trained on (docs/design.md#token-roles).
_PRECEDENCE = (Role.PROMPT, Role.SCAFFOLD, Role.WRAPPER, Role.FEEDBACK, Role.OUTPUT, Role.WARNING)
_RANK = {role: rank for rank, role in enumerate(_PRECEDENCE)}


class Span(NamedTuple):
    """A piece of an observation that has one role."""

    role: Role
    text: str


class Frame(NamedTuple):
    """The template's text around a content."""

    head_ids: list[int]
    before: str  # touches the content and holds no added token
    after: str  # likewise
    tail_ids: list[int]


class Encoded(NamedTuple):
    """A framed content as tokens."""

    ids: list[int]
    roles: list[Role]
    # For each token of before + content + after: the character of the content at which it ends.
    ends: list[int]


def cut(spans: list[Span], start: int, end: int) -> list[Span]:
    """Characters `start` to `end` of the spans' joined text, without spans that become empty."""
    kept, at = [], 0
    for role, text in spans:
        part = text[max(start - at, 0) : max(end - at, 0)]
        if part:
            kept.append(Span(role, part))
        at += len(text)
    return kept


def trim(spans: list[Span]) -> list[Span]:
    """Takes white space off both ends, as the template does with a tool's content."""
    text = ''.join(span.text for span in spans)
    return cut(spans, len(text) - len(text.lstrip()), len(text.rstrip()))


class Encoder:
    """A tokenizer with its chat template, checked to be safe with untrusted text and append-only.

    Raises ValueError if the tokenizer makes an added token of ordinary text, or if its template
    fails the prefix check of docs/protocol.md#appending-an-observation.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, dialect: Dialect):
        self.tokenizer = tokenizer
        self._dialect = dialect
        self._added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._added_pattern = re.compile('|'.join(map(re.escape, self._added)) or '(?!)')
        self._control_ids = {
            i
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in dialect.TAGS
        }
        self._plain = _without_added_tokens(tokenizer)
        self._check_plain()
        self.observation_role, self.observation_frame = self._observation_frame()

    def encode(self, text: str) -> list[int]:
        """The ids of trusted text; special and added tokens in it are recognised."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def frame(self, messages: list[dict[str, str]], base: str = '') -> Frame:
        """The frame around SENTINEL in the last message, without the rendered history `base`.

        Raises ValueError if the template changes the history or leaves the content out.
        """
        text = self._render_prompt(messages)
        if not text.startswith(base):
            raise ValueError('the earlier messages are rendered differently once it is appended')
        before, found, after = text[len(base) :].rpartition(SENTINEL)
        if not found:
            raise ValueError('its content does not appear in the rendering')
        # The frame's fixed ids reach up to the nearest added token on either side: no pre-tokenizer
        # joins anything across an added token, so their ids do not depend on the content.
        head_end = max((m.end() for m in self._added_pattern.finditer(before)), default=0)
        first = self._added_pattern.search(after)
        tail_start = first.start() if first else len(after)
        return Frame(
            self.encode(before[:head_end]),
            before[head_end:],
            after[:tail_start],
            self.encode(after[tail_start:]),
        )

    def encode_framed(self, frame: Frame, spans: list[Span]) -> Encoded:
        """Content in its frame: the ids that the template gives if none of it is an added token.

        The template's characters that touch the content are tokenized together with it, since a
        pre-tokenizer may join them (Qwen's makes one token of `)` and a newline).
        """
        content = ''.join(span.text for span in spans)
        joined = self._plain.encode(frame.before + content + frame.after, add_special_tokens=False)
        pieces = [Span(Role.SCAFFOLD, frame.before), *spans, Span(Role.SCAFFOLD, frame.after)]
        # One byte a character, the rank of its role, so that max() over a token's characters is the
        # rank of the token. A token of no width (a normalizer may leave one) takes the character it
        # stands at, or the last one at the end of the text.
        ranks = b''.join(bytes([_RANK[role]]) * len(text) for role, text in pieces)
        roles = [
            _PRECEDENCE[max(ranks[start : max(end, start + 1)] or ranks[-1:])]
            for start, end in joined.offsets
        ]
        head, tail = frame.head_ids, frame.tail_ids
        return Encoded(
            ids=[*head, *joined.ids, *tail],
            roles=[Role.SCAFFOLD] * len(head) + roles + [Role.SCAFFOLD] * len(tail),
            ends=[end - len(frame.before) for _, end in joined.offsets],
        )

    def fit(self, frame: Frame, spans: list[Span], room: int) -> Encoded | None:
        """The longest beginning of the content that takes at most `room` tokens, None if none does.

        Template tokens count. Cutting characters can change how the rest is tokenized, so the
        result of every cut is encoded and counted anew.
        """
        spans = trim(spans)
        while spans:
            encoded = self.encode_framed(frame, spans)
            excess = len(encoded.ids) - room
            if excess <= 0:
                return encoded
            kept = len(encoded.ends) - excess
            length = sum(len(span.text) for span in spans)
            limit = encoded.ends[kept - 1] if kept > 0 else 0
            # Every pass shortens the text, so the loop ends; two passes are the usual number.
            spans = trim(cut(spans, 0, min(limit, length - 1)))
        return None

    def decode(self, ids: np.ndarray) -> str:
        """A turn's text: the dialect's tags stay in, the chat's control tokens are left out."""
        kept = [int(i) for i in ids if int(i) not in self._control_ids]
        return str(
            self.tokenizer.decode(
                kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _render_prompt(self, messages: list[dict[str, str]]) -> str:
        """The rendering with the generation prompt, which opens the thinking.

        Some templates (Qwen3-8B's) leave that opening to the model; it is added then, so that
        every template gives the generation prompt of docs/protocol.md#template.
        """
        text = self._render(messages, add_generation_prompt=True)
        opening = self._dialect.THINK_OPEN
        return text if text.endswith(opening) else text + opening

    def _check_plain(self) -> None:
        """Proves that content gives no added token, by encoding all added tokens as content."""
        ids = self._plain.encode(' '.join(self._added), add_special_tokens=False).ids
        leaked = set(ids) & set(self.tokenizer.get_added_vocab().values())
        if leaked:
            names = self.tokenizer.convert_ids_to_tokens(sorted(leaked))
            raise ValueError(
                f'tokenizer {self.tokenizer.name_or_path!r} makes the added tokens {names} of '
                'ordinary text, so terminal output could end a turn; use another tokenizer'
            )

    def _observation_frame(self) -> tuple[str, Frame]:
        """The role of an observation and its frame: `tool` if its check passes, else `user`."""
        failures = []
        for role in ('tool', 'user'):
            try:
                return role, self._checked_frame(role)
            except (ValueError, jinja2.exceptions.TemplateError) as error:
                failures.append(f'{role!r}: {error}')
        template = ' '.join(str(self.tokenizer.chat_template).split())[:80]
        raise ValueError(
            f'tokenizer {self.tokenizer.name_or_path!r} with the chat template {template!r}... '
            f'cannot append an observation and keep the earlier ids ({"; ".join(failures)}); '
            'set tokenizer.chat_template to echo_jax/agent/chat_template.jinja'
        )

    def _checked_frame(self, role: str) -> Frame:
        """The frame of an observation, proved by a probe conversation of two turns.

        The ids of the earlier messages must be a prefix of the longer rendering's ids, and the
        second observation must have the same frame as the first. Raises ValueError otherwise.
        """
        response = self._dialect.write_response('I look.', 'ls /tmp', done=False)
        turn = {'role': 'assistant', 'content': self._dialect.THINK_OPEN + response}
        history = [
            {'role': 'system', 'content': 'You run commands.'},
            {'role': 'user', 'content': 'List /tmp.'},
            turn,
        ]
        frames = []
        for _ in range(2):
            base = self._render(history)
            if not base.endswith(TURN_END + '\n'):
                raise ValueError(f'an assistant turn does not end with {TURN_END} and a newline')
            base_ids = self.encode(base)
            prompt_ids = self.encode(self._render_prompt(history[:-1]))
            if base_ids[: len(prompt_ids)] != prompt_ids:
                raise ValueError('the generation prompt is no prefix of the turn that follows it')
            longer = [*history, {'role': role, 'content': SENTINEL}]
            frame = self.frame(longer, base)
            ids = self.encode_framed(frame, [Span(Role.OUTPUT, SENTINEL)]).ids
            if self.encode(self._render_prompt(longer)) != base_ids + ids:
                raise ValueError('the earlier ids are no prefix of the longer rendering')
            frames.append(frame)
            history = [*longer, turn]
        if frames[0] != frames[1]:
            raise ValueError('the second observation is rendered differently from the first')
        return frames[0]


def _without_added_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> tokenizers.Tokenizer:
    """The tokenizer's own pipeline with nothing but its model's vocabulary.

    The options `split_special_tokens` and `encode_special_tokens` are not enough: with them, added
    tokens that are not marked special (Qwen's `<think>`, `<tool_response>`) are still recognised.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token['content'] for token in state['added_tokens']}
    state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    model = state['model']
    if isinstance(model['vocab'], dict):
        keep = model.get('unk_token')
        model['vocab'] = {t: i for t, i in model['vocab'].items() if t not in added or t == keep}
    return tokenizers.Tokenizer.from_str(json.dumps(state))
