"""What strangers' text looks like on a page, and how tokens become text."""

import unicodedata

import pytest

from echo_jax.learner.unpredictable import token_bytes
from echo_jax.viewer.text import number, token_texts, visible
from tests.support.tokenizers import QWEN, build


@pytest.mark.parametrize(
    'text, shown',
    [
        ('\x1b[31mred\x1b[0m', '␛[31mred␛[0m'),
        ('a\x00b\x07\r\n\tc\x7f', 'a␀b␇␍\n\tc␡'),
        ('\x9b1m', '<U+009B>1m'),  # CSI as one C1 character
        ('abc\u202etxt.exe\u2066x\u2069', 'abc<U+202E>txt.exe<U+2066>x<U+2069>'),
        ('a\u200bb\ufeffc\u00add', 'a<U+200B>b<U+FEFF>c<U+00AD>d'),
        ('a\u2028b\u2029c\u00a0d', 'a<U+2028>b<U+2029>c<U+00A0>d'),
        ('\ufe0f\u3164\u115f\u2800', '<U+FE0F><U+3164><U+115F><U+2800>'),
        ('\U000e0041\U000e0101', '<U+E0041><U+E0101>'),  # a tag, a variation selector
        ('\ud800', '<U+D800>'),
        ('<script>alert(1)</script> http://a.b', '<script>alert(1)</script> http://a.b'),
        ('grüße שלום 你好 😀 e\u0301', 'grüße שלום 你好 😀 e\u0301'),
    ],
)
def test_what_cannot_be_seen_is_shown_and_the_rest_stays(text, shown):
    assert visible(text) == shown


@pytest.mark.slow
def test_no_control_or_format_character_is_left():
    left = visible(''.join(map(chr, range(0x110000))))
    kinds = {unicodedata.category(character) for character in left} - {'Cc'}
    assert not kinds & {'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp'}
    assert {c for c in left if unicodedata.category(c) == 'Cc'} == {'\n', '\t'}


def test_a_character_that_tokens_cut_belongs_to_the_last_of_them():
    table = [b'a', b'\xf0\x9f', b'\x98', b'\x80', b'\xc3', b'\xa9b']
    assert token_texts([0, 1, 2, 3, 0, 4, 5], table) == ['a', '', '', '😀', 'a', '', 'éb']


def test_what_is_no_text_is_shown():
    table = [b'a', b'\xff', b'\xf0\x9f', b'\x1b', b'']
    # \xff is never UTF-8; the two bytes of a cut emoji are one fault, found when 'a' follows.
    assert token_texts([1, 0, 2, 0, 3, 4, 99, -1], table) == [
        *('\ufffd', 'a', '', '\ufffda', '␛', '', '<token 99>', '<token -1>')
    ]
    assert token_texts([0, 2], table) == ['a', '\ufffd']
    assert token_texts([], table) == []


def test_the_texts_of_tokens_are_the_tokenizers():
    tokenizer = build(QWEN)
    text = 'Grüße, 你好 😀!\n\tdef f(x):\r\n  return "א" <tool_call>\n'
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 20
    assert ''.join(token_texts(ids, token_bytes(tokenizer))) == text.replace('\r', '␍')


def test_numbers_are_what_json_can_say():
    assert number(1 / 3) == 0.333333 and number(1 / 3, 2) == 0.33 and number(5.0) == 5.0
    assert [number(x) for x in (None, float('nan'), float('inf'), -float('inf'))] == [None] * 4
