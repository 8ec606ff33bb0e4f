"""What nobody can predict, by a table; and which tokens it is, through real tokenizers."""

import dataclasses

import numpy as np
import pytest
import tokenizers
import transformers

from echo_jax.learner.targets import choose_targets
from echo_jax.learner.unpredictable import Unpredictable, token_bytes, unpredictable_spans
from echo_jax.types import Role
from tests.support.random_rollouts import make_rollout, small_config
from tests.support.tokenizers import tokenizer  # noqa: F401, a fixture


@pytest.mark.parametrize(
    ('text', 'dropped'),
    [
        # date, ls -l, stat, log lines
        ('Sat Nov 28 17:05:28 UTC 2026', ['Sat Nov 28', '17:05:28 UTC 2026']),
        ('-rw-r--r-- 1 root root 12 Nov 28 17:04 a.txt', ['Nov 28', '17:04']),
        ('-rw-r--r-- 1 root root 12 Nov  5  2025 a.txt', ['Nov  5  2025']),
        ('Modify: 2026-11-28 17:05:28.123456789 +0000', ['2026-11-28', '17:05:28.123456789']),
        ('at 2026-11-28T17:05:28Z ok', ['2026-11-28T17:05:28Z']),
        ('Sat, 28 Nov 2026 7:05:28 GMT', ['Sat, 28 Nov 2026', '7:05:28 GMT']),
        (' 17:05:28 up 54 min', ['17:05:28']),
        (
            '1764349528 1764349528.25 1764349528123',
            ['1764349528', '1764349528.25', '1764349528123'],
        ),
        ('real\t0m0.012s', ['0m0.012s']),
        ('3 passed in 0.53s', ['0.53']),
        # process ids
        ('[1] 12345', ['12345']),
        ('[1]+ 12345 Done  sleep 9', ['12345']),
        ('pid=4242, PID 17', ['4242', '17']),
        ('bash: line 3: 12345 Killed   sleep', ['12345']),
        ('kill: (12345) - No such process', ['12345']),
        ('   1234 pts/0    00:00:01 bash', ['1234', '00:00:01']),
        ('root      17    1  0 17:05 ?        00:00:00 sh', ['17    1', '17:05', '00:00:00']),
        ('root   17  0.0  0.1  4628  3328 ?  S  17:05  0:00 sh', ['17', '17:05']),
        # hashes, UUIDs, temporary names, addresses
        ('d41d8cd98f00b204e9800998ecf8427e  a', ['d41d8cd98f00b204e9800998ecf8427e']),
        ('commit 1a2b3c4d', ['1a2b3c4d']),
        ('[main (root-commit) 1a2b3c4] first', ['1a2b3c4']),
        ('index 83db48f..bf269f4 100644', ['83db48f..bf269f4']),
        ('123e4567-e89b-12d3-a456-426614174000', ['123e4567-e89b-12d3-a456-426614174000']),
        ('/tmp/tmp.Xa8Bq2LmNo', ['Xa8Bq2LmNo']),
        ("'/tmp/tmpab12_xyz'", ['ab12_xyz']),
        ('<object at 0x7f3a2c1d>', ['0x7f3a2c1d']),
        # what can be predicted, or what looks alike
        ('hello world 12 1.5 100%', []),
        ('a.py:12: error', []),
        ('ratio 3:14, chapter 12:7', []),
        ('version 2026.11.28', []),
        ('total 8', []),
        ('00000000000000000000000000000000', []),
        ('acceded decade', []),
        ('192.168.0.1 port 8080', []),
        ('20261128', []),
        ('exit_code=0', []),
        ('', []),
    ],
)
def test_what_is_found(text, dropped):
    marked = np.zeros(len(text), bool)
    for start, end in unpredictable_spans(text.encode()):
        marked[start:end] = True
    expected, at = np.zeros(len(text), bool), 0
    for piece in dropped:
        at = text.index(piece, at)
        expected[at : at + len(piece)] = True
        at += len(piece)
    assert [c for c, m in zip(text, marked) if m] == [c for c, m in zip(text, expected) if m]
    np.testing.assert_array_equal(marked, expected)


def spelled(tokenizer, *pieces):  # noqa: F811
    """A rollout of (role, text) pieces."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for _, text in pieces]
    roles = np.repeat([role for role, _ in pieces], [len(i) for i in ids]).astype(np.uint8)
    tokens = np.concatenate(ids).astype(np.int32)
    return dataclasses.replace(make_rollout('P'), tokens=tokens, roles=roles)


def test_tokens_that_touch_a_match_are_dropped(tokenizer):  # noqa: F811
    text = 'é☃ 17:05:28 \U0001f600 ok d41d8cd98f00b204e9800998ecf8427e é\n'
    rollout = spelled(
        tokenizer,
        (Role.PROMPT, 'look'),
        (Role.ACTION, 'date'),
        (Role.WRAPPER, 'Output at 12:30: '),
        (Role.OUTPUT, text),
        (Role.ACTION, '23:59'),
    )
    dropped = Unpredictable(tokenizer)(rollout)
    # Only OUTPUT, and nothing but tokens that hold a part of the time or of the hash.
    assert set(rollout.roles[dropped]) == {Role.OUTPUT}
    left = tokenizer.decode(rollout.tokens[(rollout.roles == Role.OUTPUT) & ~dropped])
    out = tokenizer.decode(rollout.tokens[dropped])
    assert '17:05:28' in out.replace(' ', '') and 'd41d8cd98f00b204e9800998ecf8427e' in out
    assert 'é☃' in left and '\U0001f600' in left and 'ok' in left
    assert not any(digit in left for digit in '0123456789')


def test_what_was_seen_before_can_be_copied(tokenizer):  # noqa: F811
    def rollout_of(command):
        return spelled(
            tokenizer,
            (Role.PROMPT, 'p'),
            (Role.ACTION, command),
            (Role.OUTPUT, 'made /tmp/tmp.Xa8Bq2LmNo;'),
            (Role.SCAFFOLD, 's'),
            (Role.ACTION, 'ls'),
            (Role.OUTPUT, 'see /tmp/tmp.Xa8Bq2LmNo;'),
        )

    rule = Unpredictable(tokenizer)
    rollout = rollout_of('mktemp')
    dropped, turn = rule(rollout), np.flatnonzero(rollout.roles == Role.SCAFFOLD)[0]
    assert dropped[:turn].any() and not dropped[turn:].any()
    assert not rule(rollout_of('touch Xa8Bq2LmNo')).any()


def test_the_rule_of_a_step(tokenizer):  # noqa: F811
    rollout = spelled(
        tokenizer, (Role.PROMPT, 'p'), (Role.ACTION, 'a'), (Role.OUTPUT, 'now 17:05:28 is')
    )
    config = small_config(drop_unpredictable=True)
    [targets], counts = choose_targets([rollout], config, Unpredictable(tokenizer))
    outputs = rollout.roles == Role.OUTPUT
    assert targets.dropped.any() and not (targets.dropped & targets.chosen).any()
    np.testing.assert_array_equal(targets.dropped | targets.chosen, outputs)
    assert counts == {'env_dropped/unpredictable': targets.dropped.sum()}


def test_every_id_is_its_bytes(tokenizer):  # noqa: F811
    table = token_bytes(tokenizer)
    assert len(table) == len(tokenizer)
    for text in ('<|im_end|>\n<think>x', 'tab\t ☃ \x00 \x7f'):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b''.join(table[i] for i in ids) == text.encode()


def test_another_kind_of_tokenizer_is_refused():
    model = tokenizers.models.WordLevel({'[UNK]': 0, 'a': 1}, unk_token='[UNK]')
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token='[UNK]'
    )
    with pytest.raises(ValueError, match=r'not byte-level.*set loss\.drop_unpredictable=False'):
        Unpredictable(words)


def test_an_empty_rollout_has_nothing(tokenizer):  # noqa: F811
    assert Unpredictable(tokenizer)(make_rollout('')).shape == (0,)
