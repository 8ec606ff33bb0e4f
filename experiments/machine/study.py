"""Makes the runs of the study, some at a time, and reads what they showed."""

import json
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Sequence

from echo_jax.run.entry import printable
from echo_jax.run.workdir import Workdir, write_whole
from experiments.machine import arms
from experiments.machine.arms import ARMS, ROOT, SEEDS, Run, runs
from experiments.machine.results import read_run, spoiled

# What the first run of a seed makes for the others: its warm start, and what depends on tasks too.
WARM_START = ('tokenizer', 'checkpoints/warm_start')
SAME_TASKS = ('tasks', 'rollouts/heldout_before')
POLL_SECONDS = 10.0
SAY_SECONDS = 120.0  # between two lines of progress


class Study:
    """Runs of one folder, some of them at a time."""

    def __init__(self, folder: pathlib.Path, wanted: Sequence[Run]):
        self._folder, self._wanted = folder, wanted
        self._running: dict[Run, list[subprocess.Popen]] = {}  # the learner, then its worker

    def make(self, jobs: int) -> None:
        """Makes the runs that are not done, `jobs` at a time. Raises SystemExit if one fails, or if
        the machine was too busy for one; the same call goes on from there.
        """
        self._expect_worker()
        self._folder.mkdir(parents=True, exist_ok=True)
        began, at_first, said = time.monotonic(), self.steps(), -SAY_SECONDS
        try:
            while not all(self.is_done(run) for run in self._wanted):
                self._look_after()
                for run in self._wanted:
                    if len(self._running) < jobs and self.is_ready(run):
                        self._start(run)
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    print(self.progress(said - began, self.steps() - at_first), flush=True)
                time.sleep(POLL_SECONDS)
        finally:
            _end([program for programs in self._running.values() for program in programs])

    def is_done(self, run: Run) -> bool:
        return run not in self._running and (self._folder / run.name / 'summary.json').exists()

    def is_ready(self, run: Run) -> bool:
        """Whether a run can be started: it is not done, and what it copies is there."""
        if self.is_done(run) or run in self._running:
            return False
        is_first = run.source == run or run.source not in self._wanted
        # A run draws its held-out rollouts before its first step.
        return is_first or self._steps_of(run.source) > 0 or (self._folder / run.name).exists()

    def steps(self) -> int:
        """The learner steps that the wanted runs have made, all together."""
        return sum(self._steps_of(run) for run in self._wanted)

    def progress(self, seconds: float, steps: int) -> str:
        """A line for a person; `steps` were made in so many seconds."""
        done = sum(self.is_done(run) for run in self._wanted)
        running = ', '.join(f'{run.name} step {self._steps_of(run)}' for run in self._running)
        total = sum(ARMS[run.arm].config(run.seed).num_steps for run in self._wanted)
        left = f'{seconds / steps * (total - self.steps()) / 60:.0f} min' if steps else 'unknown'
        return f'{done} of {len(self._wanted)} runs done; running: {running}; left: {left}'

    def _steps_of(self, run: Run) -> int:
        file = self._folder / run.name / 'metrics.jsonl'
        return file.read_text().count('\n') if file.exists() else 0

    def _start(self, run: Run) -> None:
        folder = self._folder / run.name
        if not folder.exists() and run.source != run and self._steps_of(run.source):
            self._take_over(run)
        environment = {'JAX_PLATFORMS': 'cpu', **os.environ}
        programs = self._running[run] = []
        for command in ARMS[run.arm].programs(run.seed, folder.absolute()):
            with (self._folder / f'{run.name}.log').open('a') as log:
                programs += [
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # Ctrl-C is for the study, which ends its runs
                    )
                ]
        print(f'{run.name} started', flush=True)

    def _take_over(self, run: Run) -> None:
        """Makes the workdir of a run, with what it shares with its source."""
        source = self._open(run.source)  # raises if it is a run of other settings
        partial = self._folder / f'{run.name}.partial'
        shutil.rmtree(partial, ignore_errors=True)
        mine = Workdir(partial, ARMS[run.arm].config(run.seed))
        same_tasks = mine.config.tasks == source.config.tasks
        for part in (*WARM_START, *SAME_TASKS) if same_tasks else WARM_START:
            # As links, since there are thousands of files, and nothing writes into one of them.
            shutil.copytree(source.path / part, partial / part, copy_function=os.link)
        partial.rename(self._folder / run.name)

    def _open(self, run: Run) -> Workdir:
        return Workdir(self._folder / run.name, ARMS[run.arm].config(run.seed))

    def _look_after(self) -> None:
        """Forgets the runs that ended. Raises SystemExit if one failed or is spoiled."""
        for run, programs in list(self._running.items()):
            self._expect_whole(run)
            if any(program.poll() for program in programs):
                log = self._folder / f'{run.name}.log'
                end = printable('\n'.join(log.read_text().splitlines()[-20:]))
                raise SystemExit(f'{end}\n{run.name} failed; the whole log is {log}')
            if programs[0].poll() is None:
                continue
            _end(programs)
            del self._running[run]
            print(f'{run.name} is done', flush=True)

    def _expect_worker(self) -> None:
        wanted = [run for run in self._wanted if ARMS[run.arm].has_worker]
        need = [run.name for run in wanted if not self.is_done(run)]
        if need and not arms.WORKER_PYTHON.exists():
            raise SystemExit(
                f'error: {", ".join(need)}: a run with a worker needs {arms.WORKER_PYTHON}, which '
                '`make rollout` makes; or leave the arm out with --arms'
            )

    def _expect_whole(self, run: Run) -> None:
        folder = self._folder / run.name
        if reason := spoiled(folder):
            raise SystemExit(
                f'error: {run.name} does not count: {reason}. Remove {folder} and give the same '
                'command again when nothing else runs, with --jobs=1'
            )

    def results(self) -> list[dict]:
        """What the runs showed that are done, of all arms and seeds."""
        return [self._result(run) for run in runs(list(ARMS), SEEDS) if self.is_done(run)]

    def _result(self, run: Run) -> dict:
        """What a run showed, as it was read once and kept beside its folder."""
        work = self._open(run)
        self._expect_whole(run)
        kept = self._folder / f'{run.name}.json'
        if not kept.exists():
            write_whole(kept, json.dumps({'arm': run.arm, 'seed': run.seed, **read_run(work)}))
        return json.loads(kept.read_text())


def _end(programs: Sequence[subprocess.Popen]) -> None:
    """Ends programs of runs, which save their state then."""
    for program in programs:
        program.terminate()
    for program in programs:
        program.wait()
