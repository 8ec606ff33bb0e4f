"""The nouns: Task, Role, Status, Rollout, Batch. NumPy only; any module may import this one.

Shapes here use T for the tokens of one rollout, R and T for the rows and columns of a batch.
"""

import dataclasses
import enum
import pathlib
from typing import Any, NamedTuple

import numpy as np


class Role(enum.IntEnum):
    """What a token is, decided once, when it is appended; stored as uint8.

    The part of each role in the losses: docs/design.md#token-roles
    """

    PROMPT = 0  # up to and including the first generation prompt
    ACTION = 1  # sampled by the policy
    SCAFFOLD = 2  # chat template, and a turn end that the harness had to add
    WARNING = 3  # the format-warning prefix
    FEEDBACK = 4  # parser errors, "no commands"
    WRAPPER = 5  # what the harness says around the output
    OUTPUT = 6  # what the terminal wrote


# Roles that the environment loss may train on, by `loss.targets`: docs/design.md#targets. Of the
# SCAFFOLD tokens of 'observation', only those of the observation's message.
ENV_TARGETS = {
    'released': (Role.FEEDBACK, Role.WRAPPER, Role.OUTPUT),
    'output': (Role.OUTPUT,),
    'warning': (Role.WARNING,),
    'warning_and_released': (Role.WARNING, Role.FEEDBACK, Role.WRAPPER, Role.OUTPUT),
    'observation': (Role.SCAFFOLD, Role.WARNING, Role.FEEDBACK, Role.WRAPPER, Role.OUTPUT),
}
# Roles counted as the observation: the denominator O_i of `full_observation`.
OBSERVATION_ROLES = (Role.WARNING, Role.FEEDBACK, Role.WRAPPER, Role.OUTPUT)
# A rollout with this reward or more is correct, its task solved: docs/protocol.md#reward
SOLVED_REWARD = 0.5


class Status(enum.StrEnum):
    """How an episode ended."""

    OK = 'ok'
    TRUNCATED = 'truncated'  # a turn, context or token budget ran out
    AGENT_TIMEOUT = 'agent_timeout'
    VERIFIER_ERROR = 'verifier_error'  # no finite reward in time; reward 0
    INFRA_ERROR = 'infra_error'  # nobody's reward: no weight in any mean or loss


class Healthcheck(NamedTuple):
    """A command that must succeed before the agent begins, as Harbor's [environment.healthcheck].

    Failures within `start_period_sec` of the start do not count; after it, `retries` in a row do.
    """

    command: str
    interval_sec: float = 5.0
    timeout_sec: float = 30.0
    start_period_sec: float = 0.0
    start_interval_sec: float = 5.0
    retries: int = 3


@dataclasses.dataclass(frozen=True)
class Task:
    """One Harbor task directory (docs/protocol.md#tasks). Field names say seconds and MiB.

    A limit or an account of None is not named by the task: the backend's own holds then.
    """

    task_id: str  # the directory's name
    path: pathlib.Path
    instruction: str
    agent_timeout_sec: float = 600.0
    verifier_timeout_sec: float = 600.0
    build_timeout_sec: float = 600.0
    docker_image: str | None = None
    cpus: float | None = None
    memory_mb: int | None = None
    storage_mb: int | None = None
    network: bool = True  # whether the sandbox reaches other machines
    workdir: str | None = None  # None is the image's own
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    solution_env: dict[str, str] = dataclasses.field(default_factory=dict)
    verifier_env: dict[str, str] = dataclasses.field(default_factory=dict)
    agent_user: str | int | None = None  # None is the image's own
    verifier_user: str | int | None = None
    healthcheck: Healthcheck | None = None
    # What this task asks for that only Harbor itself provides, such as 'docker-compose.yaml'. A
    # task with any of it runs with sandbox.backend = 'harbor'; other sandboxes refuse it.
    needs_harbor: tuple[str, ...] = ()
    environment_only: bool = False  # its rollouts carry the environment loss and no policy gradient
    # For people, who sort results by them; nothing is decided by either.
    metadata: dict[str, object] = dataclasses.field(default_factory=dict)  # of task.toml
    source: str = ''  # the set that it was read from


@dataclasses.dataclass
class Rollout:
    """One whole episode, flat: arrays are aligned to its tokens (docs/design.md#rollout)."""

    tokens: np.ndarray  # int32 [T], prompt and everything after
    roles: np.ndarray  # uint8 [T], Role
    rollout_logprobs: np.ndarray  # float32 [T], nats at the sampling temperature; 0 unless ACTION
    policy_versions: np.ndarray  # int32 [T], version that sampled the token; -1 unless ACTION
    turn_starts: np.ndarray  # int32 [turns], index of each turn's first ACTION token
    reward: float
    status: Status
    task_id: str
    group_id: int  # numbers the groups of the whole run
    sample_id: int  # within the group
    environment_only: bool = False  # the task's: it has a part in the environment loss alone
    reason: str = ''  # one line on why there is no reward of the tests, if there is none
    tests_output: str = ''  # the end of what the task's tests printed
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # for people to read only

    @property
    def action_versions(self) -> np.ndarray:
        """The version that sampled each ACTION token: int32 [ACTION tokens]."""
        return self.policy_versions[self.roles == Role.ACTION]


class TokenScores(NamedTuple):
    """What a model says of each token given those before it, in nats; arrays of one shape [..., T].

    The first token of a rollout is predicted by nothing, and what stands there says nothing.
    """

    logprobs: Any  # log-probability at the sampling temperature
    entropy: Any  # of the distribution that the token was drawn from, at the sampling temperature
    logprobs_t1: Any  # at temperature 1; of an observation's token, -environment CE


class Batch(NamedTuple):
    """What one step trains on; its weights hold every normalisation (docs/design.md#batch).

    Position t describes token t itself: `roles[r, t]` and the weights belong to `tokens[r, t]`,
    whose log-probability is predicted from position t - 1. The first token of every segment has
    weight 0. Padding has segment 0.
    """

    tokens: np.ndarray  # int32 [R, T]
    positions: np.ndarray  # int32 [R, T], counted from 0 in every segment
    segment_ids: np.ndarray  # int32 [R, T], from 1 in every row; 0 is padding
    roles: np.ndarray  # uint8 [R, T], Role
    rollout_logprobs: np.ndarray  # float32 [R, T], nats
    # float32 [R, T], nats: of the policy before the batch's first update; 0 if it is not asked for
    old_logprobs: np.ndarray
    advantages: np.ndarray  # float32 [R, T], the rollout's advantage on its ACTION tokens, else 0
    policy_weight: np.ndarray  # float32 [R, T], of the policy loss; 0 unless ACTION
    env_weight: np.ndarray  # float32 [R, T], of the environment loss; 0 unless a target
