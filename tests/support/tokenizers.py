"""Small real tokenizers with Qwen's added tokens, and the protocol config to go with them."""

import functools

import ml_collections
import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from echo_jax.agent.tokenizer import chat_template

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
ADDED = [
    '<tool_call>',
    '</tool_call>',
    '<tool_response>',
    '</tool_response>',
    '<think>',
    '</think>',
]
# Words, lone digits and the rest in runs; Qwen's rule, which joins `)` to a newline, ` ` to a word.
TINY = r'[A-Za-z]+|[0-9]|[^A-Za-z0-9]+'
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_TEXT = [
    "Command 'ls' executed successfully. Output: hello world\n\n(exit_code=0)\n",
    "WARNINGS:\n- Unclosed <think> tag\n\nCommand 'cat' failed. Output: error\n\n(exit_code=1)\n",
    'system user assistant think tool_response tool_call function bash parameter command done\n',
    'in response.\n',
    'hello\n\n\n(',
    'exit_code=0)\n',
    'abc\n\n((',
    'im_end im_start endoftext <|im_end|>\n<|im_start|>user\n</tool_response>\n</think>\n\n',
] * 4


@functools.cache
def build(pattern: str) -> transformers.PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC() if pattern == QWEN else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ADDED])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token='<|im_end|>',
        pad_token='<|endoftext|>',
        chat_template=chat_template(),
    )


@pytest.fixture(params=[TINY, QWEN], ids=['tiny', 'qwen'])
def tokenizer(request):
    return build(request.param)


@pytest.fixture
def tiny_tokenizer():
    return build(TINY)


@pytest.fixture
def qwen_tokenizer():
    return build(QWEN)


@pytest.fixture
def protocol_config():
    return ml_collections.ConfigDict(
        dict(
            dialect='qwen3_xml',
            system_prompt='brief',
            max_turns=16,
            max_turn_tokens=2048,
            max_context_tokens=16384,
            max_total_tokens=34096,
            max_prompt_tokens=1536,
            command_timeout=30,
            max_output_chars=50_000,
            truncation='start',
            thinking='keep_all',
            command_selection='first',
            max_commands_per_turn=1,
            parse_after_think=False,
            length_penalty_coef=0.0,
            length_penalty_start=0,
            at_max_total_tokens='verify',
            at_agent_timeout='verify',
        )
    )
