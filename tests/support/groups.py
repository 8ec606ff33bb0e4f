"""Rollout groups, of random numbers or very small, and what it means that two are equal."""

import dataclasses
import struct

import numpy as np

from echo_jax.types import Role, Rollout, Status


def make_group(group_id, seed=0, lengths=(300, 0, 1200), version=5):
    rng = np.random.default_rng([group_id, seed])
    group = []
    for sample_id, length in enumerate(lengths):
        roles = rng.integers(0, 7, length).astype(np.uint8)
        action = roles == 1
        group.append(
            Rollout(
                tokens=rng.integers(0, 151_000, length).astype(np.int32),
                roles=roles,
                rollout_logprobs=np.where(action, -rng.exponential(size=length), 0).astype('f4'),
                policy_versions=np.where(action, version + sample_id, -1).astype(np.int32),
                turn_starts=np.flatnonzero(action)[:7].astype(np.int32),
                reward=float(rng.normal()),
                status=list(Status)[sample_id % len(Status)],
                task_id=f'task-{group_id % 7}',
                group_id=group_id,
                sample_id=sample_id,
                environment_only=group_id % 2 == 1,
                metrics={'turns': float(seed), 'seconds/sampling': float(rng.random())},
            )
        )
    return group


def small_group(group_id: int, task_id: str, version: int, size: int = 2) -> list[Rollout]:
    """Rollouts of three tokens, each the number of the group; weights of `version` wrote one."""
    roles = np.array([Role.PROMPT, Role.ACTION, Role.OUTPUT], np.uint8)
    return [
        Rollout(
            tokens=np.full(3, group_id, np.int32),
            roles=roles,
            rollout_logprobs=np.zeros(3, np.float32),
            policy_versions=np.where(roles == Role.ACTION, version, -1).astype(np.int32),
            turn_starts=np.array([1], np.int32),
            reward=0.0,
            status=Status.OK,
            task_id=task_id,
            group_id=group_id,
            sample_id=sample,
            environment_only=False,
        )
        for sample in range(size)
    ]


def assert_equal(actual, expected):
    """Bit for bit, dtypes, metric order and NaN payloads included."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        for field in dataclasses.fields(Rollout):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(y, np.ndarray):
                assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), (
                    field.name
                )
            elif field.name == 'reward':
                assert struct.pack('d', x) == struct.pack('d', y)
            elif field.name == 'metrics':
                assert list(x) == list(y)
                assert struct.pack(f'{len(x)}d', *x.values()) == struct.pack(
                    f'{len(y)}d', *y.values()
                )
            else:
                assert x == y and type(x) is type(y), field.name
