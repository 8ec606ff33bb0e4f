"""The machine study: makes its runs, keeps what they showed, and writes the report.

    python -m experiments.machine
    python -m experiments.machine --seeds=0 --arms=echo,grpo,shuffled --output=runs/seed_0

Every run is a process of its own. It goes on from where it stands, and one that is done is not
repeated, so the same command resumes the study. The runs of a seed share tasks and warm start: the
first makes them and the others take them over. In the end, results.json holds what all runs of the
folder showed, and experiments.machine.report makes the page's tables and figures of it.
"""

import pathlib
import signal

from absl import flags

from echo_jax.run import entry
from echo_jax.run.workdir import write_whole
from experiments.machine import report
from experiments.machine.arms import ARMS, SEEDS, runs
from experiments.machine.results import dumps
from experiments.machine.study import Study


def main(_) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all, as Ctrl-C does
    wanted = runs(_ARMS.value, [int(seed) for seed in _SEEDS.value])
    study = Study(pathlib.Path(_RUNS.value), wanted)
    if _JOBS.value:
        study.make(_JOBS.value)
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / 'results.json', dumps(study.results()))
    print(report.write(output))


if __name__ == '__main__':
    _RUNS = flags.DEFINE_string('runs', 'runs/machine_study', 'Folder of the runs, which are kept.')
    _OUTPUT = flags.DEFINE_string('output', str(report.HERE), 'Folder of results and report.')
    _ARMS = flags.DEFINE_list('arms', list(ARMS), 'Which arms to run.')
    _SEEDS = flags.DEFINE_list('seeds', list(map(str, SEEDS)), 'Which seeds; an arm has its first.')
    _JOBS = flags.DEFINE_integer(
        'jobs', 1, 'How many runs are made at a time; 0: none, only the report.', lower_bound=0
    )
    entry.run(main)
