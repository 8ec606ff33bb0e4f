"""The weight of the environment term: its schedules, and the one that follows the gradients.

Functions of numbers; `loss.env_schedule` and `loss.env_adaptive` are the keys.
"""

import itertools

import ml_collections

SCHEDULES = ('constant', 'linear', 'steps')


def scheduled(loss: ml_collections.ConfigDict, step: int, num_steps: int) -> float:
    """The coefficient of the update after the first `step`, by `loss.env_schedule`.

    - 'constant': `loss.env_coef`;
    - 'linear': from `loss.env_coef` at step 0 in a line to `end` at step `num_steps`, which would
      be the one after the last;
    - 'steps': `loss.env_coef` before the first of `steps`, then the one of `coefs` that belongs
      to the last of `steps` that is not after `step`.
    """
    options, start = loss.env_schedule, float(loss.env_coef)
    match options.name:
        case 'constant':
            return start
        case 'linear':
            done = min(step / max(num_steps, 1), 1.0)
            return start + (options.end - start) * done
        case 'steps':
            passed = [v for s, v in zip(options.steps, options.coefs, strict=True) if s <= step]
            return float(passed[-1]) if passed else start
        case other:
            raise ValueError(f'loss.env_schedule.name is {other!r}; expected one of {SCHEDULES}')


def is_traced(loss: ml_collections.ConfigDict) -> bool:
    """Whether the coefficient changes from step to step, so that the step takes it as an array."""
    return loss.env_schedule.name != 'constant' or loss.env_adaptive.every > 0


def adapted(
    coef: float, policy_norm: float, env_norm: float, options: ml_collections.ConfigDict
) -> float:
    """The next coefficient, by `loss.env_adaptive`, from the norms of the two terms' gradients.

    `env_norm` is that of the environment term before its coefficient. The coefficient moves to
    where coef * env_norm = target * policy_norm, by 1 - `smoothing` of the way, and stays within
    `low` and `high`. If a norm is 0 it stays as it is: a batch whose groups are all uninformative
    says nothing about the balance. (GradNorm, arXiv 1711.02257, is the idea of balancing by norms
    of gradients; PaW, arXiv 2606.02388, balances its two losses by the reward instead.)
    """
    if not (policy_norm > 0 and env_norm > 0):
        return coef
    wanted = options.target * policy_norm / env_norm
    moved = options.smoothing * coef + (1.0 - options.smoothing) * wanted
    return float(min(max(moved, options.low), options.high))


def check(loss: ml_collections.ConfigDict) -> None:
    """Refuses values that make no sense."""
    schedule, adaptive = loss.env_schedule, loss.env_adaptive
    if schedule.name not in SCHEDULES:
        raise ValueError(
            f'loss.env_schedule.name is {schedule.name!r}; expected one of {SCHEDULES}'
        )
    steps, values = tuple(schedule.steps), tuple(schedule.coefs)
    if schedule.name == 'steps' and (not steps or len(steps) != len(values)):
        raise ValueError(
            f'loss.env_schedule.steps={steps} and coefs={values}; expected as many coefs as '
            'steps, at least one'
        )
    if any(step < 0 for step in steps) or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f'loss.env_schedule.steps={steps}; expected steps that rise from 0 on')
    for key, value in (('env_coef', loss.env_coef), ('env_schedule.end', schedule.end)):
        if not value >= 0:
            raise ValueError(f'loss.{key} is {value}; expected 0 or more')
    if any(not value >= 0 for value in values):
        raise ValueError(f'loss.env_schedule.coefs={values}; expected coefficients of 0 or more')
    if not adaptive.every:
        return
    if adaptive.every < 0:
        raise ValueError(f'loss.env_adaptive.every is {adaptive.every}; expected 0 or more steps')
    if not loss.env_coef:
        raise ValueError(
            f'loss.env_adaptive.every={adaptive.every} adapts a loss.env_coef of 0; set '
            'loss.env_coef above 0 to begin with, or loss.env_adaptive.every=0'
        )
    if not (adaptive.target > 0 and 0 <= adaptive.smoothing < 1):
        raise ValueError(
            f'loss.env_adaptive.target={adaptive.target} and smoothing={adaptive.smoothing}; '
            'expected a target above 0 and a smoothing of 0 or more, below 1'
        )
    if not 0 <= adaptive.low <= loss.env_coef <= adaptive.high:
        raise ValueError(
            f'loss.env_adaptive.low={adaptive.low} and high={adaptive.high} do not hold '
            f'loss.env_coef={loss.env_coef} between them, where it begins'
        )
