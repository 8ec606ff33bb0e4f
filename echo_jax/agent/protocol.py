"""The agent's conversation (docs/protocol.md): prompt, turns, observations, and every token's role.

A conversation only grows: ids that are in it never change, and nothing is decoded and tokenized
again. This module runs no command and asks no policy (episode.py does). How calls are written is in
dialects/, the tokenizer's side in encoding.py, the words of the prompt in prompts.py.
"""

import hashlib

import ml_collections
import numpy as np
import transformers

from echo_jax.agent import prompts
from echo_jax.agent.dialects import find_dialect, qwen3_xml
from echo_jax.agent.dialects.dialect import Command, Dialect, ParsedResponse
from echo_jax.agent.encoding import SENTINEL, TURN_END, Encoder, Span
from echo_jax.agent.observations import imagines
from echo_jax.policy import Generation
from echo_jax.types import Role

# Outside tools import the released dialect's parser from here (docs/protocol.md#parser).
format_warnings = qwen3_xml.format_warnings
parse_response = qwen3_xml.parse_response

CHOICES = {
    'system_prompt': ('full', 'brief'),
    'truncation': ('start', 'end', 'start_end'),
    'thinking': ('keep_all', 'strip_rollout', 'strip_all'),
    'command_selection': ('first', 'last', 'all'),
}


def turn_seed(run_seed: int, group_id: int, sample_id: int, turn: int) -> int:
    """The seed of one turn's sampling, 63 bits; the same numbers give it in every process."""
    name = f'{run_seed}/{group_id}/{sample_id}/{turn}'.encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1


def warning_prefix(warnings: list[str]) -> list[Span]:
    """What an observation begins with if there are warnings (docs/protocol.md#warnings)."""
    lines = ''.join(f'- {warning}\n' for warning in warnings)
    return [Span(Role.WARNING, f'WARNINGS:\n{lines}\n')] if warnings else []


def format_reply(
    thought: str, command: str | None = None, done: bool = False, dialect: Dialect = qwen3_xml
) -> str:
    """The canonical text of a turn, as it would be sampled, without the turn's end.

    Raises ValueError if the parts cannot be written so that they are read back unchanged and
    without a warning: an empty thought, no call at all, tags in the wrong place, a padded command.
    """
    reply = dialect.write_response(thought, command, done)
    parsed = dialect.parse_response(dialect.strip_thinking(dialect.THINK_OPEN + reply))
    commands = [c.arguments for c in parsed.commands if (c.name, c.error) == ('bash', '')]
    expected = [] if command is None else [{'command': command}]
    problems = dialect.format_warnings(reply) + ([parsed.error] if parsed.error else [])
    if problems or commands != expected or parsed.is_done != done:
        raise ValueError(
            f'thought {thought!r} and command {command!r} (done={done}) cannot be written as one '
            f'clean turn: {problems or "they are read back differently"}; change their text'
        )
    return reply


class Protocol:
    """One tokenizer with one `protocol` config: what every episode of a run shares.

    Raises ValueError for an unknown choice in the config, and for a tokenizer that lacks a token
    that the config needs or that Encoder refuses.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerFast, config: ml_collections.ConfigDict
    ):
        for key, choices in CHOICES.items():
            if config[key] not in choices:
                raise ValueError(f'protocol.{key} is {config[key]!r}; choose one of {choices}')
        if config.max_commands_per_turn < 1:
            raise ValueError(
                f'protocol.max_commands_per_turn is {config.max_commands_per_turn}; at least 1'
            )
        self.config = config
        self.dialect = find_dialect(config.dialect)
        self.encoder = Encoder(tokenizer, self.dialect)
        vocabulary = tokenizer.get_vocab()
        self.turn_end_ids = [*self.encoder.encode(TURN_END), *self.encoder.encode('\n')]
        self.stop_token_ids = tuple(
            vocabulary[token] for token in (TURN_END, '<|endoftext|>') if token in vocabulary
        )
        if self.turn_end_ids[0] != vocabulary.get(TURN_END):
            raise ValueError(
                f'tokenizer {tokenizer.name_or_path!r} has no token {TURN_END}; add it'
            )
        opening, closing = self.dialect.THINK_TAGS
        self.think_ids = (vocabulary.get(opening), vocabulary.get(closing))
        if config.thinking != 'keep_all' and None in self.think_ids:
            raise ValueError(
                f'protocol.thinking={config.thinking!r} needs the tokens {opening} and {closing} '
                f'in tokenizer {tokenizer.name_or_path!r}; add them or use keep_all'
            )
        self._prompt_frame = self.encoder.frame(
            prompts.messages(SENTINEL, config.system_prompt, config.command_timeout, self.dialect)
        )

    def prompt_ids(self, instruction: str) -> list[int]:
        """The prompt of a task, generation prompt included; special tokens in it are plain text."""
        content = [Span(Role.PROMPT, instruction)]
        return self.encoder.encode_framed(self._prompt_frame, content).ids

    def count_prompt_tokens(self, instruction: str) -> int:
        """The length of the prompt of a task, template included."""
        return len(self.prompt_ids(instruction))

    def start(self, instruction: str) -> 'Conversation':
        return Conversation(self, self.prompt_ids(instruction))

    def read_turn(self, token_ids: np.ndarray) -> tuple[ParsedResponse, list[str], bool]:
        """What a turn asks for, its format warnings, and whether it holds an observation that the
        agent made up (docs/protocol.md#a-turn).
        """
        text = self.encoder.decode(token_ids)
        if self.config.parse_after_think:
            answer = self.dialect.text_after_thinking(text)
        else:
            answer = self.dialect.strip_thinking(text)
        response = self.dialect.parse_response(answer)
        return response, self.dialect.format_warnings(text), imagines(text)

    def select(self, commands: list[Command]) -> list[Command]:
        """The commands of a turn that are run (docs/protocol.md#a-turn)."""
        limit = self.config.max_commands_per_turn
        chosen = {'first': commands[:limit], 'last': commands[-limit:], 'all': commands}
        return chosen[self.config.command_selection]

    def without_thinking(self, token_ids: np.ndarray) -> np.ndarray:
        """Positions of a sampled turn that stay when its thinking is stripped; int [kept].

        The opening `<think>` is in the generation prompt, already appended, so its `</think>`
        stays and closes an empty block. Later blocks go with their tags. A block that is never
        closed stays: its text was parsed, and a call in it was run (docs/protocol.md#a-turn).
        """
        opening, closing = self.think_ids
        keep = np.ones(len(token_ids), bool)
        start, dropped_tags = 0, 0  # the first block is open already, and keeps its closing tag
        for position, token in enumerate(token_ids):
            if token == opening and start is None:
                start = position
            elif token == closing and start is not None:
                keep[start : position + dropped_tags] = False
                start, dropped_tags = None, 1
        return np.flatnonzero(keep)


class Conversation:
    """One rollout's tokens so far. All lists are aligned, and only ever grow.

    What becomes of thinking is docs/protocol.md#thinking. With `keep_all` and `strip_rollout` every
    sampled token is in `tokens`; with the latter, the next turn is sampled from `context`, which
    lacks the earlier turns' thinking. With `strip_all` thinking is never appended, so nothing is
    rewritten either; but what follows it was sampled with the thinking in view, so the learner,
    which does not see the thinking, computes other log-probabilities.
    """

    def __init__(self, protocol: Protocol, prompt_ids: list[int]):
        self.protocol = protocol
        self.tokens: list[int] = []
        self.roles: list[Role] = []
        self.logprobs: list[float] = []  # nats; 0 unless ACTION
        self.versions: list[int] = []  # -1 unless ACTION
        self.turn_starts: list[int] = []  # index of each turn's first ACTION token
        # What the next turn is sampled from: the very list `tokens`, unless thinking is stripped.
        self.context = self.tokens
        if protocol.config.thinking == 'strip_rollout':
            self.context = []
        self._missing_end: list[int] = []  # ids that the last turn lacks of <|im_end|> and newline
        self._append(prompt_ids, [Role.PROMPT] * len(prompt_ids))

    def append_turn(self, generation: Generation) -> None:
        """Appends what was sampled, as it was sampled (role ACTION).

        Raises ValueError if the generation has not one log-probability and version for each token.
        """
        ids, logprobs, versions = map(np.asarray, generation[:3])
        if not ids.shape == logprobs.shape == versions.shape:
            raise ValueError(
                f'a generation of {ids.shape} ids has {logprobs.shape} logprobs and '
                f'{versions.shape} versions; the policy must give one of each a token'
            )
        end = self.protocol.turn_end_ids
        # A policy may stop after both tokens of the end, after the first, or before either.
        have = next((n for n in (2, 1) if ids[-n:].tolist() == end[:n]), 0)
        self._missing_end = end[have:]
        kept = np.arange(len(ids))
        match self.protocol.config.thinking:
            case 'strip_all':
                kept = self.protocol.without_thinking(ids)
            case 'strip_rollout':
                self.context.extend(ids[self.protocol.without_thinking(ids)].tolist())
        if len(kept):
            self.turn_starts.append(len(self.tokens))
        self.tokens.extend(ids[kept].tolist())
        self.roles.extend([Role.ACTION] * len(kept))
        self.logprobs.extend(logprobs[kept].tolist())
        self.versions.extend(versions[kept].tolist())

    def append_observation(self, spans: list[Span]) -> bool:
        """Closes the turn, then appends the observation and the next generation prompt.

        See docs/protocol.md#appending-an-observation. The observation is cut to what
        `max_total_tokens` leaves. Returns False, and appends nothing, if nothing fits.
        """
        encoder, missing = self.protocol.encoder, self._missing_end
        room = self.protocol.config.max_total_tokens - len(self.tokens) - len(missing)
        encoded = encoder.fit(encoder.observation_frame, spans, room)
        if encoded is None:
            return False
        self._append(missing, [Role.SCAFFOLD] * len(missing))
        self._append(encoded.ids, encoded.roles)
        self._missing_end = []
        return True

    def _append(self, ids: list[int], roles: list[Role]) -> None:
        """Appends tokens that nobody sampled."""
        self.tokens.extend(ids)
        self.roles.extend(roles)
        self.logprobs.extend([0.0] * len(ids))
        self.versions.extend([-1] * len(ids))
        if self.context is not self.tokens:
            self.context.extend(ids)
