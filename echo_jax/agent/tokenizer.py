"""A small byte-level BPE tokenizer, for tiny models that start from nothing.

It is a Hugging Face tokenizer with Qwen's added tokens, so that every other part treats it as it
treats Qwen's. A word is cut the same way wherever it stands, so that copying it from the terminal
means copying its tokens. Tokenizers of released models are not made here.
"""

import importlib.resources
import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from echo_jax.agent.dialects import qwen3_xml
from echo_jax.agent.dialects.dialect import Dialect
from echo_jax.agent.observations import describe
from echo_jax.agent.prompts import messages
from echo_jax.agent.protocol import format_reply
from echo_jax.sandbox import CommandResult
from echo_jax.tasks.generate import SYLLABLES, WORDS, demonstration, usage
from echo_jax.types import Task

# Qwen3's tokens in Qwen3's order. The added ones are never cut but are ordinary text otherwise.
SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
ADDED_TOKENS = (
    '<tool_call>',
    '</tool_call>',
    '<tool_response>',
    '</tool_response>',
    '<think>',
    '</think>',
)
_ADDED = re.compile('|'.join(map(re.escape, SPECIAL_TOKENS + ADDED_TOKENS)))
# Letters stand alone, without the space before them, and digits one by one.
_PIECES = r'[A-Za-z]+|[0-9]|[^A-Za-z0-9]+'
_NAMES = frozenset(WORDS['train'] + WORDS['heldout'])


def chat_template() -> str:
    """The Jinja source of our own chat template (docs/protocol.md#template)."""
    return (importlib.resources.files('echo_jax.agent') / 'chat_template.jinja').read_text()


def build_tokenizer(
    texts: Iterable[str], vocab_size: int, template: str
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of exactly `vocab_size` tokens with the chat template `template`.

    All 256 bytes are in the vocabulary, so any text can be encoded and decoded unchanged. The same
    texts give the same tokenizer. Padding is `<|endoftext|>`, the end of a turn `<|im_end|>`.
    Raises ValueError if `vocab_size` is too small for the bytes and added tokens, or if the texts
    hold too few pairs to fill it.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    added = len(SPECIAL_TOKENS) + len(ADDED_TOKENS)
    if vocab_size < len(alphabet) + added:
        raise ValueError(
            f'vocab_size is {vocab_size}; the bytes and added tokens need {len(alphabet) + added}'
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior='isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - added, initial_alphabet=sorted(alphabet), show_progress=False
    )
    # Training cuts the texts where encoding will cut them, so no merge crosses an added token.
    pieces = (piece for text in texts for piece in _ADDED.split(text))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ADDED_TOKENS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f'the texts fill {tokenizer.get_vocab_size()} of vocab_size={vocab_size} tokens; '
            'give more texts or ask for fewer tokens'
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token='<|endoftext|>',
        eos_token='<|im_end|>',
        additional_special_tokens=['<|im_start|>', '<|im_end|>'],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def training_texts(
    tasks: Sequence[Task], system_prompt: str = 'brief', dialect: Dialect = qwen3_xml
) -> Iterator[str]:
    """What a tokenizer for generated tasks is trained on; give it training tasks only.

    The syllables outnumber every English word, so they are merged first. Names are taken out, so
    that none becomes a token of its own, neither of training nor of held-out tasks. `system_prompt`
    is the style of the run's prompts, 'brief' or 'full'.
    """
    # 20 times the number of tasks: no word stands in a task's texts as often as that.
    yield from [' '.join(SYLLABLES)] * (20 * max(len(tasks), 50))
    for task in tasks:
        for message in messages(task.instruction, system_prompt, 30, dialect):
            yield _nameless(f'{message["role"]}\n{message["content"]}')
        for thought, command, done in demonstration(task):
            yield _nameless(f'assistant\n{format_reply(thought, command, done, dialect)}')
            if command is not None:
                # Commands print names, nearly always; what counts here is the text around them.
                yield _observation(command, '0\n', exit_code=0)
        if (misuse := usage(task)) is not None:
            yield _observation(*misuse, exit_code=2)
    yield _observation('cat 0.txt', 'cat: 0.txt: No such file or directory\n', exit_code=1)


def _observation(command: str, output: str, exit_code: int) -> str:
    spans = describe(command, CommandResult(output, '', exit_code, False), 0, 'start')
    return _nameless(''.join(span.text for span in spans))


def _nameless(text: str) -> str:
    """Replaces names by a digit, which merges with nothing: the text around them is not changed."""
    return re.sub('[A-Za-z]+', lambda word: '0' if word[0] in _NAMES else word[0], text)
