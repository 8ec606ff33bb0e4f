"""collect with real sandboxes and a real store, and replies that need no model."""

import asyncio

import pytest

from configs.tiny import get_config
from echo_jax.agent.collect import collect as draw_missing
from echo_jax.agent.protocol import Protocol
from echo_jax.agent.tokenizer import build_tokenizer, chat_template, training_texts
from echo_jax.run.sources import waves
from echo_jax.run.warm_start import demonstrator
from echo_jax.sandbox import SandboxError, local
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.rollouts import RolloutStore
from echo_jax.tasks.generate import generate_tasks
from echo_jax.tasks.sources import load_tasks, with_limits
from echo_jax.types import Status


@pytest.fixture(scope='module', autouse=True)
def sandboxes_work():
    try:
        local.check()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    return load_tasks(
        generate_tasks(tmp_path_factory.mktemp('tasks') / 'train', split='train', count=20)
    )


@pytest.fixture(scope='module')
def collect(tasks):
    config = get_config()
    config.protocol.max_total_tokens = config.protocol.max_context_tokens = 1024
    tokenizer = build_tokenizer(training_texts(tasks), 400, chat_template())
    protocol = Protocol(tokenizer, config.protocol)

    def run(assignments, store, group_size=1, at_once=4, **options):
        config.sandbox.at_once = at_once
        asyncio.run(
            draw_missing(
                assignments,
                store,
                config=config,
                make_sandbox=sandbox_maker(config),
                protocol=protocol,
                policy_for=demonstrator(tokenizer, ['solve'], protocol.dialect),
                group_size=group_size,
                temperature=1.0,
                **options,
            )
        )

    return run


def test_groups_that_are_there_are_not_drawn_again(collect, tasks, tmp_path):
    store, seen = RolloutStore(tmp_path), []
    collect([(0, tasks[0]), (2, tasks[2])], store)
    first = store.read_groups([0, 2])
    on_group = lambda group: seen.append(group[0].group_id)  # noqa: E731
    collect(list(enumerate(tasks[:4])), store, group_size=2, on_group=on_group)
    assert sorted(seen) == [1, 3]
    sizes = [len(group) for group in store.read_groups(range(4))]
    assert sizes == [1, 2, 1, 2]  # the old groups are as they were
    for old, now in zip(first, store.read_groups([0, 2])):
        assert old[0].metrics == now[0].metrics  # seconds included
    assert all(r.reward == 1 for group in store.read_groups(range(4)) for r in group)


def test_a_task_that_cannot_start_is_nobodys_reward_and_the_others_go_on(collect, tasks, tmp_path):
    store = RolloutStore(tmp_path)
    collect([(0, tasks[0])], store)
    bad = tasks[5].path / 'environment' / 'Dockerfile'
    bad.write_text('FROM x\nCOPY none /app\n')
    try:
        collect([(0, tasks[0]), (1, tasks[5]), (2, tasks[2])], store)
    finally:
        bad.write_text((tasks[4].path / 'environment' / 'Dockerfile').read_text())
    good, [failed], other = store.read_groups([0, 1, 2])
    assert (
        failed.status == Status.INFRA_ERROR
        and 'no such file in environment/: none' in failed.reason
    )
    assert {r.status for r in (*good, *other)} == {Status.OK}


def test_no_more_sandboxes_than_allowed(collect, tasks, tmp_path, monkeypatch):
    alive, most = set(), 0

    class Counting(local.LocalSandbox):
        async def start(self):
            nonlocal most
            alive.add(self)
            most = max(most, len(alive))
            await super().start()

        async def stop(self):
            await super().stop()
            alive.discard(self)

    monkeypatch.setattr(local, 'LocalSandbox', Counting)
    store = RolloutStore(tmp_path)
    collect(list(enumerate(tasks[:6])), store, group_size=2, at_once=3)
    assert most == 3 and not alive
    groups = store.read_groups(range(6))
    assert {r.status for group in groups for r in group} == {Status.OK}


def test_a_wave_has_no_more_episodes_than_slots():
    def sizes(groups, group_size, slots):
        return [len(wave) for wave in waves(zip(range(groups), 'abcdefgh'), group_size, slots)]

    assert list(waves(zip([4, 7, 9], 'abc'), 2, 5)) == [[(4, 'a'), (7, 'b')], [(9, 'c')]]
    assert sizes(8, 8, 64) == [8]
    assert sizes(8, 1, 3) == [3, 3, 2]
    assert sizes(2, 5, 4) == [1, 1]
    assert sizes(0, 1, 3) == []


def test_unknown_backend():
    config = get_config()
    config.sandbox.backend = 'chroot'
    with pytest.raises(ValueError, match=r"sandbox.backend is 'chroot'; expected 'local'"):
        sandbox_maker(config)


def test_limits_of_the_config_reach_the_sandbox(tasks):
    config = get_config()
    config.sandbox.disk_mb, config.sandbox.processes = 8, 16
    make = sandbox_maker(config)
    limits = {key: config.sandbox[key] for key in ('memory_mb', 'disk_mb')}
    task = with_limits(tasks[0], **limits)

    async def session():
        sandbox = make(task)
        await sandbox.start()
        try:
            too_much = await sandbox.run('head -c 20M /dev/zero > big; stat -c %s big', 20)
            limits = await sandbox.run('ulimit -u; ulimit -v', 20)
        finally:
            await sandbox.stop()
        return too_much, limits

    too_much, limits = asyncio.run(session())
    assert int(too_much.stdout) <= 8 << 20
    assert limits.stdout.split() == ['16', str(512 * 1024)]
