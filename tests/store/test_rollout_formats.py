"""The bytes of a rollout group: damage and forgeries are never data, and old formats are read."""

import dataclasses
import json
import pathlib
import shutil
import struct
import zlib

import numpy as np
import pytest

from echo_jax.learner.batching import make_batch, rollout_metrics
from echo_jax.store.kvstore import CorruptError, open_array, open_kvstore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Role, Status
from tests.support.groups import assert_equal, make_group
from tests.support.random_rollouts import make_rollout, small_config

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'store'


def damaged(data):
    """Truncations and bit flips all over the file, every byte of the prefix included."""
    cuts = {0, 1, 7, 8, *range(46, 58), *range(0, len(data), max(1, len(data) // 60))}
    for cut in {*cuts, len(data) - 1}:
        yield f'cut to {cut}', data[:cut]
    for place in {*range(64), *range(64, len(data), max(1, len(data) // 200)), len(data) - 1}:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        yield f'bit of byte {place}', bytes(flipped)
    yield 'the other format', data[:7] + (b'1' if data[7:8] != b'1' else b'3') + data[8:]
    yield 'zeros', bytes(len(data))


@pytest.mark.parametrize('form', ['echogrp1', 'echogrp2', 'echogrp3'])
def test_damage_is_never_data(tmp_path, form):
    file = tmp_path / 'groups' / f'{12:012d}'
    store = RolloutStore(tmp_path)
    if form != 'echogrp3':
        shutil.copytree(GOLDEN / form, tmp_path, dirs_exist_ok=True)
    else:
        store.write_group(make_group(12))
    whole, [group] = file.read_bytes(), store.read_groups([12])
    assert whole.startswith(form.encode())
    for what, data in damaged(whole):
        file.write_bytes(data)
        advice = r'group 12 in .* remove groups/000000000012 .*draws the group anew'
        with pytest.raises(CorruptError, match=advice) as caught:
            store.read_groups([12])
        assert '\n' not in str(caught.value), what
    file.write_bytes(whole)
    assert_equal(store.read_groups([12])[0], group)
    file.rename(file.with_name(f'{7:012d}'))  # a whole group under another one's name
    with pytest.raises(CorruptError, match='holds group 12'):
        store.read_groups([7])


def test_what_the_advice_says_helps(tmp_path):
    store = RolloutStore(tmp_path)
    store.write_group(make_group(12))
    file = tmp_path / 'groups' / f'{12:012d}'
    file.write_bytes(b'?')
    assert store.missing([12]) == []
    file.unlink()
    assert store.missing([12]) == [12]  # so it is due again
    assert store.write_group(make_group(12))


def forge(folder, payload, header_bytes, payload_bytes):
    """Group 6 with checksums that are right, whatever the payload says."""
    zstd = {'name': 'zstd', 'configuration': {'level': 1}}
    size = [len(payload)]
    array = open_array(open_kvstore('memory://'), size, 'uint8', size, [zstd])
    array.write(np.frombuffer(payload, np.uint8)).result()
    chunk = array.kvstore['c.0']
    fields = (b'echogrp3', 6, payload_bytes, header_bytes, len(chunk), zlib.crc32(chunk))
    prefix = struct.pack('<8sqQQQI', *fields)
    data = prefix + struct.pack('<I', zlib.crc32(prefix)) + chunk
    (folder / 'groups').mkdir(exist_ok=True)
    (folder / 'groups' / f'{6:012d}').write_bytes(data)
    return data


GOOD = {
    'task_id': 't',
    'sample_id': [0],
    'environment_only': [False],
    'status': ['ok'],
    'reason': [''],
    'tests_output': [''],
    'tokens': [0],
    'turns': [0],
    'metrics': [[]],
}
CHANGES = [
    {'tokens': [-8]},
    {'tokens': [1 << 62]},
    {'tokens': ['0']},
    {'tokens': 5},
    {'turns': [-1]},
    {'tokens': []},
    {'status': ['gone']},
    {'status': []},
    {'sample_id': []},
    {'sample_id': [0, 0]},
    {'environment_only': []},
    {'environment_only': [False, True]},
    {'environment_only': [1]},
    {'metrics': [['a']]},
    {'metrics': None},
    {'reason': []},
    {'reason': [3]},
    {'tests_output': [None]},
    {'task_id': 3},
]


@pytest.mark.parametrize(
    'header',
    [
        b'cos\nsystem\n(S"false"\ntR.',  # a pickle
        b'[' * 200_000,
        b'[]',
        *(json.dumps(GOOD | change).encode() for change in CHANGES),
        json.dumps({key: GOOD[key] for key in GOOD if key != 'environment_only'}).encode(),
    ],
)
def test_hostile_header_with_right_checksums(tmp_path, header):
    store = RolloutStore(tmp_path)
    reward = bytes(8)
    good = json.dumps(GOOD).encode()
    forge(tmp_path, good + reward, len(good), len(good) + 8)
    assert store.read_groups([6])[0][0].task_id == 't'  # the forgery itself works
    forge(tmp_path, header + reward, len(header), len(header) + 8)
    with pytest.raises(CorruptError):
        store.read_groups([6])


@pytest.mark.parametrize('payload_bytes', [8, 1 << 26, 1 << 62])
def test_compressed_bomb_is_refused(tmp_path, payload_bytes):
    bomb = forge(tmp_path, bytes(1 << 27), 8, payload_bytes)
    assert len(bomb) < 1 << 14
    with pytest.raises(CorruptError):
        RolloutStore(tmp_path).read_groups([6])


def test_a_format_of_the_future_is_refused(tmp_path):
    store = RolloutStore(tmp_path)
    store.write_group(make_group(6))
    file = tmp_path / 'groups' / f'{6:012d}'
    file.write_bytes(b'echogrp4' + file.read_bytes()[8:])
    with pytest.raises(ValueError, match=r'echogrp4; expected echogrp1 or .*: upd') as caught:
        store.read_groups([6])
    assert not isinstance(caught.value, CorruptError)  # nobody is told to remove it
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('form', ['echogrp1', 'echogrp2'])
def test_groups_of_older_formats_are_read(form):
    """Format 1 kept `environment_only` as a metric; neither has reasons (golden/store)."""
    store = RolloutStore(GOLDEN / form)
    assert store.groups() == [12, 13, 14]
    kept = {12: {'environment_only': 1.0}, 13: {'environment_only': 0.0}, 14: {}}
    for group_id, group in zip(store.groups(), store.read_groups(store.groups())):
        is_metric = form == 'echogrp1'
        assert [r.environment_only for r in group] == [is_metric and group_id == 12] * 2
        for sample_id, rollout in enumerate(group):
            place = 100 * group_id + 10 * sample_id
            np.testing.assert_array_equal(rollout.tokens, np.arange(place, place + 6))
            assert rollout.roles.tolist() == [0, 0, 1, 1, 4, 6]
            second = -0.25 * (1 + sample_id)
            assert rollout.rollout_logprobs.tolist() == [0, 0, -0.5, second, 0, 0]
            assert rollout.policy_versions.tolist() == [-1, -1, 7, 8, -1, -1]
            assert rollout.turn_starts.tolist() == [2]
            assert rollout.reward == sample_id / 2
            assert rollout.status is [Status.OK, Status.INFRA_ERROR][sample_id]
            assert (rollout.task_id, rollout.group_id) == (f'task-{group_id}', group_id)
            assert rollout.sample_id == sample_id
            assert (rollout.reason, rollout.tests_output) == ('', '')
            # In format 1 the metric has become the field; the others stay, in their order.
            metrics = {'turns': 1.0} | ({} if is_metric else kept[group_id])
            metrics['seconds_sampling'] = 0.1 * group_id
            assert list(rollout.metrics.items()) == list(metrics.items())
    rewritten = RolloutStore('memory://')
    rewritten.write_group(group)
    assert_equal(rewritten.read_groups([14])[0], group)


def test_an_environment_only_group_through_the_store_trains_the_environment_alone():
    store = RolloutStore('memory://')
    marked = [
        dataclasses.replace(
            make_rollout('PAOA', reward=1.0 - sample, sample=sample, first_token=1 + 10 * sample),
            environment_only=True,
        )
        for sample in (0, 1)
    ]
    store.write_group(marked)
    [read] = store.read_groups([0])
    assert_equal(read, marked)
    other = [
        make_rollout('PAO', reward=sample, group=1, sample=sample, first_token=21 + 10 * sample)
        for sample in (0, 1)
    ]
    batch = make_batch([*read, *other], small_config())
    # N = 4. Group 0 has no actions to train on; its two outputs weigh 1/(4*1) as those of group 1.
    ours = batch.tokens > 20
    acting = ours & (batch.roles == Role.ACTION)
    np.testing.assert_array_equal(batch.policy_weight, np.where(acting, np.float32(1 / 4), 0))
    np.testing.assert_array_equal(batch.advantages != 0, acting)
    outputs = batch.roles == Role.OUTPUT
    np.testing.assert_array_equal(batch.env_weight, np.where(outputs, np.float32(1 / 4), 0))
    assert rollout_metrics([*read, *other], version=3)['rollout/environment_only'] == 0.5
    assert rollout_metrics(other, version=3)['rollout/environment_only'] == 0
