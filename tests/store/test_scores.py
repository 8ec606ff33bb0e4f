"""Scores of tokens: exact round trips, what is refused, that old ones go."""

import numpy as np
import pytest

from echo_jax.store.kvstore import CorruptError, open_kvstore, seal, unseal_first
from echo_jax.store.scores import ScoreStore
from echo_jax.types import TokenScores

KEY = f'groups/{12:012d}'


def make_scores(length: int, seed: int = 0) -> TokenScores:
    rng = np.random.default_rng(seed)
    return TokenScores(*(rng.normal(-1, 2, (3, length)).astype(np.float16)))


@pytest.mark.parametrize('lengths', [(300, 0, 1200), (0,), ()])
def test_a_round_trip_is_exact(tmp_path, lengths):
    scores = {7 * i: make_scores(length, i) for i, length in enumerate(lengths)}
    ScoreStore(tmp_path).write_group(12, scores)
    read = ScoreStore(tmp_path).read_group(12)
    assert list(read) == list(scores)
    for sample_id, each in scores.items():
        for array, expected in zip(read[sample_id], each, strict=True):
            assert array.dtype == np.float16 and array.tobytes() == expected.tobytes()


def test_a_group_without_scores_has_none(tmp_path):
    store = ScoreStore(tmp_path)
    store.write_group(12, {})
    assert store.read_group(11) is None and store.read_group(12) == {}


def test_the_last_write_wins_whole_even_if_it_is_shorter(tmp_path):
    store = ScoreStore(tmp_path)
    store.write_group(12, {0: make_scores(500)})
    # What a writer killed between writing and renaming leaves: the next value keeps its tail.
    (tmp_path / 'groups' / f'{12:012d}.__lock').write_bytes(b'x' * 20_000)
    store.write_group(12, {1: make_scores(5)})
    assert list(store.read_group(12)) == [1]


def test_old_groups_are_removed_and_others_stay():
    store = ScoreStore('memory://')
    for group_id in (0, 7, 8, 1000):
        store.write_group(group_id, {0: make_scores(3)})
    store.keep(8)
    assert store.groups() == [8, 1000]
    assert store.read_group(7) is None


@pytest.mark.parametrize(
    'wrong, reason',
    [
        (make_scores(4)._replace(entropy=np.zeros(3, np.float16)), r'entropy is float16 \[3\]'),
        (make_scores(4)._replace(logprobs_t1=np.zeros(4, np.float32)), 'logprobs_t1 is float32'),
        (make_scores(4)._replace(logprobs=np.full(4, -np.inf, np.float16)), 'not finite'),
    ],
)
def test_what_breaks_the_contract_is_refused_by_name(wrong, reason):
    store = ScoreStore('memory://')
    with pytest.raises(ValueError, match=f'sample 3 of group 12: .*{reason}'):
        store.write_group(12, {0: make_scores(4), 3: wrong})
    assert store.groups() == []


def test_any_damage_is_named(tmp_path):
    ScoreStore(tmp_path).write_group(12, {0: make_scores(40), 1: make_scores(20)})
    file = tmp_path / KEY
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        file.write_bytes(bytes(damaged))
        with pytest.raises(CorruptError, match=r'scores of group 12 .*remove groups/000000000012'):
            ScoreStore(tmp_path).read_group(12)
    for length in (0, 10, 40, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptError):
            ScoreStore(tmp_path).read_group(12)


def test_a_header_that_lies_is_damage(tmp_path):
    store = ScoreStore(tmp_path)
    store.write_group(12, {0: make_scores(8)})
    kvstore = open_kvstore(tmp_path)
    header, chunk = unseal_first(kvstore[KEY])
    for change in ({'group_id': 13}, {'samples': [[0, 1 << 40]]}, {'samples': [[0, -8]]}):
        kvstore[KEY] = seal(header | change) + chunk
        with pytest.raises(CorruptError):
            store.read_group(12)
    kvstore[KEY] = seal(header | {'format': 2}) + chunk
    with pytest.raises(ValueError, match='format 2; expected 1: update echo_jax'):
        store.read_group(12)
