"""The runs of the study: which recipe, settings, control and seeds."""

import importlib
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_collections

ROOT = pathlib.Path(__file__).parents[2]
WORKER_PYTHON = ROOT / '.venv-rollout' / 'bin' / 'python'
# Groups of five steps are drawn at a time, by a worker that shares the learner's two cores. So an
# episode may take as long as five steps, and the agent's limit must not be what ends it.
FOUR_AHEAD = {
    'max_staleness': 4,
    'loss.mismatch': 'token',
    'policy.backend': 'vllm',
    'policy.slots': 320,
    'sandbox.at_once': 128,
    'sandbox.agent_timeout': 900.0,
}


class Arm(NamedTuple):
    """Runs that differ in their seed alone."""

    title: str
    recipe: str = 'machine'  # of configs/, with its variant: 'machine:grpo'
    settings: Mapping[str, bool | int | float | str] = {}  # keys that differ from the recipe's
    control: str = ''  # of experiments/machine/control.py; '' is the program itself
    seeds: int = 2  # 0 to this, which is left out
    warm_start: str = 'echo'  # the arm whose warm start of the same seed this one takes over
    against: str = 'grpo'  # the arm without the environment term that this one is compared with

    @property
    def has_worker(self) -> bool:
        return self.settings.get('policy.backend') == 'vllm'

    def config(self, seed: int) -> ml_collections.FrozenConfigDict:
        name, _, variant = self.recipe.partition(':')
        config = importlib.import_module(f'configs.{name}').get_config(*filter(None, [variant]))
        config.update_from_flattened_dict({'seed': seed, **self.settings})
        return ml_collections.FrozenConfigDict(config)

    def programs(self, seed: int, folder: pathlib.Path) -> list[list[str]]:
        """The commands that make the run, or go on with it, given in ROOT at the same time: the
        learner's, and its worker's if the run has one.
        """
        name, _, variant = self.recipe.partition(':')
        flags = [f'--config=configs/{name}.py' + (f':{variant}' if variant else '')]
        changes = {'seed': seed, **self.settings}
        flags += [f'--config.{key}={value}' for key, value in changes.items()]
        flags += [f'--workdir={folder}']
        learner = ['-m', 'echo_jax.train']
        if self.control:
            learner = ['-m', 'experiments.machine.control', f'--control={self.control}']
        commands = [[sys.executable, *learner, *flags]]
        if self.has_worker:
            commands += [[str(WORKER_PYTHON), '-m', 'echo_jax.worker', *flags]]
        return commands


ARMS = {
    'echo': Arm('ECHO, 0.3', seeds=5),
    'grpo': Arm('GRPO', 'machine:grpo', seeds=5),
    'shuffled': Arm('ECHO, 0.3, options shuffled', control='shuffled', seeds=5),
    'echo_0p05': Arm('ECHO, 0.05', 'machine:echo_0p05'),
    'echo_1p0': Arm('ECHO, 1.0', 'machine:echo_1p0'),
    'echo_released': Arm('ECHO, 0.3, released targets', 'machine:echo_released'),
    'grpo_no_kl': Arm('GRPO without KL', 'machine:grpo_no_kl'),
    'env_only': Arm('environment term alone', control='env_only'),
    'env_only_no_kl': Arm('the same without KL', 'machine:echo_no_kl', control='env_only'),
    'one_ahead': Arm('ECHO, 0.3, one step ahead', settings={'max_staleness': 1}, seeds=3),
    'four_ahead': Arm('ECHO, 0.3, up to four steps ahead', settings=FOUR_AHEAD, seeds=5),
    'new_machine': Arm(
        'ECHO, 0.3, a new machine in every task', 'machine:new_machine', against='new_machine_grpo'
    ),
    'new_machine_grpo': Arm(
        'GRPO, the same', 'machine:new_machine_grpo', against='new_machine_grpo'
    ),
    'tiny': Arm(
        'configs/tiny.py: ECHO, 0.05', 'tiny', seeds=5, warm_start='tiny', against='tiny_grpo'
    ),
    'tiny_grpo': Arm('configs/tiny.py: GRPO', 'tiny:grpo', warm_start='tiny', against='tiny_grpo'),
    'tiny_four_ahead': Arm(
        'configs/tiny.py: ECHO, 0.05, up to four steps ahead',
        'tiny',
        settings=FOUR_AHEAD,
        seeds=5,
        warm_start='tiny',
        against='tiny_grpo',
    ),
}


SEEDS = list(range(max(arm.seeds for arm in ARMS.values())))


class Run(NamedTuple):
    """One run of the study."""

    arm: str  # of ARMS
    seed: int

    @property
    def name(self) -> str:
        return f'{self.arm}_{self.seed}'

    @property
    def source(self) -> 'Run':
        """The run whose warm start this one takes over; itself, if it makes its own."""
        return Run(ARMS[self.arm].warm_start, self.seed)


def runs(arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The study's runs of these arms and seeds: first the arms of most seeds, seed by seed.

    Raises ValueError for an arm or a seed that the study has not.
    """
    if unknown := sorted({*arms} - {*ARMS}) + sorted({*seeds} - {*SEEDS}):
        raise ValueError(f'{unknown} are no arms or seeds; there are {list(ARMS)} and {SEEDS}')
    found = [Run(arm, seed) for arm in ARMS for seed in seeds if arm in arms]
    found = [run for run in found if run.seed < ARMS[run.arm].seeds]
    return sorted(found, key=lambda run: (-ARMS[run.arm].seeds, run.seed))
