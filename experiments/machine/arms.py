"""The runs of the study: which recipe, control and seeds. No run has settings of its own."""

import importlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections

ROOT = pathlib.Path(__file__).parents[2]


class Arm(NamedTuple):
    """Runs that differ in their seed alone."""

    title: str
    recipe: str = 'machine'  # of configs/, with its variant: 'machine:grpo'
    control: str = ''  # of experiments/machine/control.py; '' is the program itself
    seeds: int = 2  # 0 to this, which is left out
    warm_start: str = 'echo'  # the arm whose warm start of the same seed this one takes over
    against: str = 'grpo'  # the arm without the environment term that this one is compared with

    def config(self, seed: int) -> ml_collections.FrozenConfigDict:
        name, _, variant = self.recipe.partition(':')
        config = importlib.import_module(f'configs.{name}').get_config(*filter(None, [variant]))
        config.seed = seed
        return ml_collections.FrozenConfigDict(config)

    def flags(self, seed: int, folder: pathlib.Path) -> list[str]:
        """What Python is called with to make the run, or to go on with it, from ROOT."""
        name, _, variant = self.recipe.partition(':')
        program = ['-m', 'echo_jax.train']
        if self.control:
            program = ['-m', 'experiments.machine.control', f'--control={self.control}']
        recipe = f'configs/{name}.py' + (f':{variant}' if variant else '')
        return [*program, f'--config={recipe}', f'--config.seed={seed}', f'--workdir={folder}']


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
    'new_machine': Arm(
        'ECHO, 0.3, a new machine in every task', 'machine:new_machine', against='new_machine_grpo'
    ),
    'new_machine_grpo': Arm(
        'GRPO, the same', 'machine:new_machine_grpo', against='new_machine_grpo'
    ),
    'tiny': Arm('configs/tiny.py: ECHO, 0.05', 'tiny', warm_start='tiny', against='tiny_grpo'),
    'tiny_grpo': Arm('configs/tiny.py: GRPO', 'tiny:grpo', warm_start='tiny', against='tiny_grpo'),
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
