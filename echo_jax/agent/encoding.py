"""Text to token ids and roles, untrusted text kept apart from the template (PROTOCOL 4, 5, 12).

A frame is the template's text on both sides of one content, found by rendering a sentinel. Content
is encoded by a copy of the tokenizer that has no added tokens, so no content can hold one. Knows no
budgets and no commands.
"""

import json
import re
from typing import NamedTuple

import jinja2
import numpy as np
import tokenizers
import transformers

from echo_jax.agent.dialects import qwen3_xml
from echo_jax.types import Role

SENTINEL = 'SENTINEL'
TURN_END = '<|im_end|>'
# Where a token overlaps several spans, the later of these is its role (DESIGN 3.1): content wins
# over template, the terminal's words over the harness's, and a warning is never trained on.
_PRECEDENCE = (Role.PROMPT, Role.SCAFFOLD, Role.WRAPPER, Role.FEEDBACK, Role.OUTPUT, Role.WARNING)
_RANK = {role: rank for rank, role in enumerate(_PRECEDENCE)}
_PROBE = (
    {'role': 'system', 'content': 'You run commands.'},
    {'role': 'user', 'content': 'List /tmp.'},
    {
        'role': 'assistant',
        'content': '<think>\nI look.\n</think>\n\n<tool_call>\n<function=bash>\n<parameter=command>'
        '\nls /tmp\n</parameter>\n</function>\n</tool_call>',
    },
)


class Span(NamedTuple):
    """A piece of an observation that has one role."""

    role: Role
    text: str


class Frame(NamedTuple):
    """Template text around a content; `before` and `after` touch it and hold no added token."""

    head_ids: list[int]
    before: str
    after: str
    tail_ids: list[int]


class Encoded(NamedTuple):
    """A framed content as tokens."""

    ids: list[int]
    roles: list[Role]
    ends: list[int]  # where in the content each token of before + content + after ends


def trim(spans: list[Span]) -> list[Span]:
    """Takes white space off both ends, as the template does with a tool's content."""
    spans = [span for span in spans if span.text]
    while spans and not (first := spans[0].text.lstrip()):
        spans = spans[1:]
    if spans:
        spans = [Span(spans[0].role, first), *spans[1:]]
    while spans and not (last := spans[-1].text.rstrip()):
        spans = spans[:-1]
    return [*spans[:-1], Span(spans[-1].role, last)] if spans else []


def cut(spans: list[Span], length: int) -> list[Span]:
    """The first `length` characters."""
    kept = []
    for role, text in spans:
        kept.append(Span(role, text[: max(length, 0)]))
        length -= len(text)
    return [span for span in kept if span.text]


class Encoder:
    """A tokenizer, its chat template, and what was proved of the two."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self._added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._added_pattern = re.compile('|'.join(map(re.escape, self._added)) or '(?!)')
        tags = {f'<{slash}{tag}>' for tag in qwen3_xml.TAGS for slash in ('', '/')}
        self._control_ids = {
            i
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content not in tags
        }
        self._plain = _without_added_tokens(tokenizer)
        self._check_plain()
        self.observation_role, self.observation_frame = self._observation_frame()

    def encode(self, text: str) -> list[int]:
        """Trusted text; special and added tokens in it are recognised."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def frame(self, messages: list[dict[str, str]], base: str = '') -> Frame:
        """The frame around the last message's SENTINEL, without the rendered history `base`."""
        text = self._render_prompt(messages)
        if not text.startswith(base):
            raise ValueError('the earlier messages are rendered differently once it is appended')
        before, found, after = text[len(base) :].rpartition(SENTINEL)
        if not found:
            raise ValueError('its content does not appear in the rendering')
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
        """Content within its frame: the ids that the template would give, were all of it plain.

        The template's characters that touch the content are tokenized together with it, since a
        pre-tokenizer may join them (Qwen's makes one token of `)` and a newline).
        """
        content = ''.join(span.text for span in spans)
        joined = self._plain.encode(frame.before + content + frame.after, add_special_tokens=False)
        pieces = [Span(Role.SCAFFOLD, frame.before), *spans, Span(Role.SCAFFOLD, frame.after)]
        ranks = b''.join(bytes([_RANK[role]]) * len(text) for role, text in pieces)
        # A token of no width (a normalizer may leave one) belongs to the character it stands at.
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
        """The longest beginning of the content that takes at most `room` tokens, or None."""
        spans = trim(spans)
        while spans:
            encoded = self.encode_framed(frame, spans)
            excess = len(encoded.ids) - room
            if excess <= 0:
                return encoded
            kept = len(encoded.ends) - excess
            length = sum(len(span.text) for span in spans)
            limit = encoded.ends[kept - 1] if kept > 0 else 0
            # Each round is shorter than the last, so this ends; two rounds are the usual number.
            spans = trim(cut(spans, min(limit, length - 1)))
        return None

    def decode(self, ids: np.ndarray) -> str:
        """A turn's text: the dialect's tags stay, the chat's control tokens are left out."""
        return self.tokenizer.decode(
            [int(i) for i in ids if int(i) not in self._control_ids],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _render_prompt(self, messages: list[dict[str, str]]) -> str:
        """With the generation prompt of PROTOCOL 4, which opens the thinking.

        Some templates (Qwen3-8B's) leave the opening to the model; there it is added.
        """
        text = self._render(messages, add_generation_prompt=True)
        return text if text.endswith(qwen3_xml.THINK_OPEN) else text + qwen3_xml.THINK_OPEN

    def _check_plain(self) -> None:
        """Proves that no added token comes out of content, for all of them at once."""
        ids = self._plain.encode(' '.join(self._added), add_special_tokens=False).ids
        leaked = set(ids) & set(self.tokenizer.get_added_vocab().values())
        if leaked:
            names = self.tokenizer.convert_ids_to_tokens(sorted(leaked))
            raise ValueError(
                f'tokenizer {self.tokenizer.name_or_path!r} makes the added tokens {names} of '
                'ordinary text, so terminal output could end a turn; use another tokenizer'
            )

    def _observation_frame(self) -> tuple[str, Frame]:
        """`tool` if it survives the prefix check of PROTOCOL 5, else `user`; and its frame."""
        failures = []
        for role in ('tool', 'user'):
            try:
                return role, self._checked_frame(role)
            except (ValueError, jinja2.exceptions.TemplateError) as error:
                failures.append(f'{role!r}: {error}')
        template = ' '.join(self.tokenizer.chat_template.split())[:80]
        raise ValueError(
            f'tokenizer {self.tokenizer.name_or_path!r} with the chat template {template!r}... '
            f'cannot append an observation and keep the earlier ids ({"; ".join(failures)}); '
            'set tokenizer.chat_template to echo_jax/agent/chat_template.jinja'
        )

    def _checked_frame(self, role: str) -> Frame:
        """The frame of an observation after one turn, equal to that after two, ids and all."""
        history, frames = list(_PROBE), []
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
            history = [*longer, _PROBE[-1]]
        if frames[0] != frames[1]:
            raise ValueError('the second observation is rendered differently from the first')
        return frames[0]


def _without_added_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> tokenizers.Tokenizer:
    """The tokenizer's own pipeline with nothing but its model's vocabulary.

    `split_special_tokens` and `encode_special_tokens` do not do: they still split off the added
    tokens that are not marked special, as Qwen's `<think>` and `<tool_response>`.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token['content'] for token in state['added_tokens']}
    state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    model = state['model']
    if isinstance(model['vocab'], dict):
        keep = model.get('unk_token')
        model['vocab'] = {t: i for t, i in model['vocab'].items() if t not in added or t == keep}
    return tokenizers.Tokenizer.from_str(json.dumps(state))
