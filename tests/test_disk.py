"""Runs whose disk is full, or whose user may write there no longer: they end and go on."""

import pytest

from tests.support.small_disk import small_disk
from tests.support.small_run import NO_WARM_START, metrics, summary, wait_for


@pytest.fixture(scope='module')
def undisturbed(programs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed') / 'run'
    programs.train(workdir, *NO_WARM_START, without=['warm_start'])
    return workdir


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / 'disk') as disk:
        yield disk


# By what appears when the disk is filled.
MOMENTS = [
    'tasks/train/*',
    'weights/data',
    'rollouts/train/groups/*',
    'metrics.jsonl',
    'checkpoints/train/*',
]


def the_line(stderr: str, moment: str) -> str:
    """The last line on stderr. It is the only one, unless threads of Orbax fail as well."""
    *others, line = stderr.splitlines()
    assert not others or moment.startswith('checkpoints'), stderr
    return line


def broken_off(programs, workdir, moment, fault) -> str:
    """The line with which a run ends if `fault()` strikes at the moment."""
    flags = programs.train_flags(workdir, *NO_WARM_START, without=['warm_start'])
    process = programs.start('train', *flags)
    wait_for(lambda: any(workdir.glob(moment)) or process.poll() is not None, poll=0.001)
    fault()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    wait_for(lambda: not programs.alive())
    return the_line(stderr, moment)


@pytest.mark.parametrize('moment', MOMENTS)
def test_a_full_disk(programs, disk, undisturbed, moment):
    workdir = disk.path / 'run'
    line = broken_off(programs, workdir, moment, disk.fill)
    assert line.startswith('error: No space left on device') and 'make room' in line
    disk.make_room()
    programs.train(workdir, *NO_WARM_START, without=['warm_start'])
    assert metrics(workdir) == metrics(undisturbed)
    assert summary(workdir) == summary(undisturbed)


@pytest.mark.parametrize('moment', ['rollouts/train/groups/*', 'checkpoints/train/*'])
def test_rights_that_are_lost(programs, disk, undisturbed, moment):
    workdir = disk.path / 'run'
    line = broken_off(programs, workdir, moment, disk.take_rights)
    assert line.startswith('error: Read-only file system') and 'let this user' in line
    disk.give_rights()
    programs.train(workdir, *NO_WARM_START, without=['warm_start'])
    assert metrics(workdir) == metrics(undisturbed)
