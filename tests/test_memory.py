"""Devices that cannot hold what a recipe wants: one line, whichever program asks them."""

import pytest

from tests.support.small_run import NO_WARM_START

# Caches of 1,000 TB, more than a process can name addresses.
CACHES = [
    '--config.policy.slots=1000000',
    '--config.protocol.max_total_tokens=10000000',
    '--config.batch.seq_len=10000000',
]


@pytest.mark.parametrize('program', ['train', 'evaluate'])
def test_too_little_memory(programs, finished, tmp_path, program):
    if program == 'train':
        flags = programs.train_flags(tmp_path / 'run', *NO_WARM_START, without=['warm_start'])
    else:
        flags = ['--config=configs/tiny.py', f'--model={finished}', '--samples=1']
    line = programs.fails(program, *flags, *CACHES)
    assert line.startswith('error: the devices have too little memory (RESOURCE_EXHAUSTED: ')
    assert 'lower policy.slots' in line and line.endswith('then give the same command again')
