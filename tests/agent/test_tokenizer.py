"""The small tokenizer: any bytes survive, words are cut alike everywhere, reloads are equal."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from echo_jax.agent.tokenizer import ADDED_TOKENS, SPECIAL_TOKENS, build_tokenizer, training_texts
from echo_jax.tasks.generate import SYLLABLES, WORDS, demonstration, generate_tasks
from echo_jax.tasks.sources import load_tasks

TEMPLATE = (
    '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
)
VOCAB_SIZE = 512


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tasks') / 'train'
    return load_tasks(generate_tasks(folder, split='train', count=100))


@pytest.fixture(scope='module')
def tokenizer(tasks):
    return build_tokenizer(training_texts(tasks), VOCAB_SIZE, TEMPLATE)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=60))
def test_any_bytes_survive_as_the_sandbox_decodes_them(tokenizer, raw):
    text = raw.decode('utf-8', errors='replace')
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_all_256_bytes_have_a_token(tokenizer):
    single = [t for t in tokenizer.get_vocab() if len(t) == 1]
    assert len(single) == 256


def test_every_word_is_its_two_syllables_in_training_and_held_out(tokenizer):
    vocab = tokenizer.get_vocab()
    assert set(SYLLABLES) <= set(vocab)
    for split in WORDS:
        cut = [tokenizer.tokenize(word) == [word[:2], word[2:]] for word in WORDS[split]]
        assert all(cut), [word for word, good in zip(WORDS[split], cut) if not good]


@settings(max_examples=100, deadline=None)
@given(
    word=st.sampled_from(WORDS['heldout']),
    before=st.sampled_from(['', ' ', '\n', '/', "'", '. ', '=', '7', '</tool_call>', '> ', 'é']),
    after=st.sampled_from(['', ' ', '\n', '.txt', "'", ', ', '=', '7', '<think>', ';']),
)
def test_a_word_is_cut_alike_wherever_it_stands(tokenizer, word, before, after):
    left, middle, right = map(tokenizer.encode, (before, word, after))
    assert tokenizer.encode(before + word + after) == [*left, *middle, *right]


def test_added_tokens_are_qwens(tokenizer):
    added = tokenizer.added_tokens_decoder
    assert [added[i].content for i in sorted(added)] == [*SPECIAL_TOKENS, *ADDED_TOKENS]
    assert [added[i].special for i in sorted(added)] == [True] * 3 + [False] * 6
    assert set(tokenizer.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ('<|endoftext|>', '<|im_end|>')
    assert len(tokenizer) == VOCAB_SIZE
    text = '<|im_start|>a\n<tool_call><|im_end|>'
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == 'a\n<tool_call>'


@pytest.mark.parametrize('config', [None, {'model_type': 'qwen3'}])
def test_a_reloaded_tokenizer_is_the_same(tokenizer, tasks, tmp_path, config):
    """Beside a Qwen3 config too, where transformers could put Qwen's own way of cutting."""
    tokenizer.save_pretrained(tmp_path)
    if config:
        (tmp_path / 'config.json').write_text(json.dumps(config))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == TEMPLATE
    assert (again.pad_token_id, again.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    for task in tasks[:20]:
        text = f'<|im_start|>user\n{task.instruction} 12é<|im_end|>\n<think>'
        assert again.encode(text) == tokenizer.encode(text)
    messages = [{'role': 'user', 'content': tasks[0].instruction}]
    assert again.apply_chat_template(messages, tokenize=False) == (
        f'<|im_start|>user\n{tasks[0].instruction}<|im_end|>\n'
    )


@pytest.mark.slow
def test_another_process_builds_the_same_bytes(tokenizer, tasks, tmp_path):
    tokenizer.save_pretrained(tmp_path / 'here')
    code = f"""
from echo_jax.tasks.sources import load_tasks
from echo_jax.agent.tokenizer import build_tokenizer, training_texts
tasks = load_tasks({str(tasks[0].path.parent)!r})
tokenizer = build_tokenizer(training_texts(tasks), {VOCAB_SIZE}, 'x')
tokenizer.save_pretrained({str(tmp_path / 'there')!r})
"""
    subprocess.run([sys.executable, '-c', code], check=True)
    here, there = (tmp_path / name / 'tokenizer.json' for name in ('here', 'there'))
    assert here.read_bytes() == there.read_bytes()


def test_conversations_are_short(tokenizer, tasks):
    def tokens(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    assert np.mean([tokens(task.instruction) for task in tasks]) < 40
    # A call: 2 tags, 11 tokens to the command, 2 of the command, 5 from there.
    frame = '<tool_call>\n<function=bash>\n<parameter=command>\n{}\n</parameter>\n</function>\n'
    assert tokens(frame.format('bako') + '</tool_call>') <= 22
    assert tokens("Command '' executed successfully. Output: \n\n(exit_code=0)") <= 18
    commands = [command for task in tasks for _, command, _ in demonstration(task) if command]
    assert np.mean([tokens(command) for command in commands]) < 14


def test_bad_sizes_are_refused(tasks):
    with pytest.raises(ValueError, match='the bytes and added tokens need 265'):
        build_tokenizer(['text'], 264, TEMPLATE)
    with pytest.raises(ValueError, match=r'the texts fill \d+ of vocab_size=512 tokens'):
        build_tokenizer(['a small text'], 512, TEMPLATE)
