"""A small byte-level BPE tokenizer, for tiny models that start from nothing.

It is a Hugging Face tokenizer directory with Qwen's added tokens, so that every other part treats
it as it treats Qwen's. A word is cut the same way wherever it stands: copying it from the terminal
is copying its tokens. Tokenizers of released models are not made here.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from echo_jax.agent.prompts import messages
from echo_jax.agent.protocol import format_reply
from echo_jax.tasks.generate import SYLLABLES, WORDS, demonstration
from echo_jax.types import Task

# As in Qwen3, in Qwen3's order: the first three are special, the others only never cut.
SPECIAL_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
ADDED_TOKENS = (
    *('<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>'),
    *('<think>', '</think>'),
)
_ADDED = re.compile('|'.join(map(re.escape, SPECIAL_TOKENS + ADDED_TOKENS)))
# Letters stand alone, without the space before them, and digits one by one.
_PIECES = r'[A-Za-z]+|[0-9]|[^A-Za-z0-9]+'


def build_tokenizer(
    texts: Iterable[str], vocab_size: int, chat_template: str
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of exactly `vocab_size` tokens; `save_pretrained` writes its directory.

    All 256 bytes are in the vocabulary, so any text survives the way there and back. The same
    texts give the same tokenizer. Padding is `<|endoftext|>`, the end of a turn `<|im_end|>`.
    Raises ValueError where the texts hold too few pairs to fill the vocabulary.
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
    # Cut where encoding will cut: no merge crosses an added token.
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
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


# What stands around a command's output (PROTOCOL 10).
_OBSERVATION = "Command '{}' executed successfully. Output: {}\n\n(exit_code=0)"
_FAILURE = "Command '{}' failed. Output: {}\n\n(exit_code=1)"


def training_texts(tasks: Sequence[Task], system_prompt: str = 'brief') -> Iterator[str]:
    """What a tokenizer for generated tasks is trained on; give it training tasks only.

    Every syllable outweighs any English word, so the syllables are merged first. Names are taken
    out: none becomes a token of its own, training's no more than held-out ones. `system_prompt` is
    the style of the run's prompts, 'brief' or 'full'.
    """
    yield from [' '.join(SYLLABLES)] * (20 * max(len(tasks), 50))  # a word occurs less often
    for task in tasks:
        for message in messages(task.instruction, system_prompt, 30):
            yield _nameless(f'{message["role"]}\n{message["content"]}')
        for thought, command, done in demonstration(task):
            yield _nameless(f'assistant\n{format_reply(thought, command, done)}')
            if command is not None:
                # What is printed are names, nearly always; what counts here is its frame.
                yield _nameless(_OBSERVATION.format(command, '0\n'))
    yield _nameless(_FAILURE.format('cat 0.txt', 'cat: 0.txt: No such file or directory\n'))


_NAMES = frozenset(WORDS['train'] + WORDS['heldout'])


def _nameless(text: str) -> str:
    """Names become a digit: a piece that merges with nothing, so what stands around them stays."""
    return re.sub('[A-Za-z]+', lambda word: '0' if word[0] in _NAMES else word[0], text)
