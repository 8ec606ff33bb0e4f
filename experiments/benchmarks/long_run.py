"""What a learner that runs for long holds: memory, threads, file handles, and its workdir.

    python experiments/benchmarks/long_run.py [--steps 1000] [--first 100] [--workdir FOLDER] \
        [--config.KEY=VALUE ...]

A very small run of echo_jax.train, in a process of its own: configs/tiny.py with a model of one
layer, one group of two episodes of one turn a step, real sandboxes, an evaluation every 100 steps
and a save every 20. Other flags go to the program. `resident_mib`, `threads` and `handles` are
medians over ten looks, one after each of the ten steps up to `--first` and up to the last but one;
`mib` and `files` are those of the workdir, once, by its folders. Numbers of every hundredth step
are printed to stderr. Needs Linux. Prints one JSON line.
"""

import argparse
import collections
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
LOOKS = 10
SETTINGS = {
    'group_size': 2,
    'batch.groups': 1,
    'batch.seq_len': 256,
    'protocol.max_turns': 1,
    'protocol.max_turn_tokens': 24,
    'protocol.max_total_tokens': 256,
    'protocol.max_context_tokens': 256,
    'model.vocab_size': 400,
    'model.hidden_size': 16,
    'model.intermediate_size': 32,
    'model.num_hidden_layers': 1,
    'model.num_attention_heads': 1,
    'model.head_dim': 16,
    'policy.slots': 2,
    'sandbox.at_once': 2,
    'tasks.train_count': 50,
    'tasks.heldout_count': 2,
    'warm_start.steps': 0,
    'warm_start.explore_steps': 0,
    'eval.every': 100,
    'eval.tasks': 1,
    'checkpoint.every': 20,
}


def held(process: subprocess.Popen) -> dict[str, float]:
    """What the process holds now."""
    folder = pathlib.Path('/proc', str(process.pid))
    status = dict(
        line.split(':', 1) for line in (folder / 'status').read_text().splitlines() if ':' in line
    )
    return {
        'resident_mib': int(status['VmRSS'].split()[0]) / 1024,
        'threads': int(status['Threads']),
        'handles': len(list((folder / 'fd').iterdir())),
    }


def lies_in(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """MiB and files of each folder of the workdir, and of the files beside them ('.')."""
    sizes, files = collections.Counter(), collections.Counter()
    for folder, _, names in os.walk(workdir):
        inside = pathlib.Path(folder).relative_to(workdir).parts[:2]
        part = '/'.join(inside[: 2 if inside[:1] == ('rollouts',) else 1]) or '.'
        part = 'rollouts/heldout_STEP' if part.startswith('rollouts/heldout_0') else part
        for name in names:
            try:
                sizes[part] += (pathlib.Path(folder) / name).stat().st_size
            except FileNotFoundError:  # it was removed meanwhile
                continue
            files[part] += 1
    return {
        'mib': {part: round(size / 2**20, 3) for part, size in sorted(sizes.items())},
        'files': dict(sorted(files.items())),
    }


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all, as Ctrl-C does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--first', type=int, default=100)
    parser.add_argument('--workdir', type=pathlib.Path)
    args, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = args.workdir or pathlib.Path(folder, 'run')
        result = watch(workdir, args.steps, args.first, others)
    print(json.dumps(result))


def watch(workdir: pathlib.Path, steps: int, first: int, others: list[str]) -> dict:
    flags = [f'--config.{key}={value}' for key, value in (SETTINGS | {'num_steps': steps}).items()]
    program = [sys.executable, '-m', 'echo_jax.train', '--config=configs/tiny.py']
    process = subprocess.Popen(
        [*program, f'--workdir={workdir}', *flags, *others], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    metrics, done, started = workdir / 'metrics.jsonl', 0, time.monotonic()
    looks, found = [], {}
    try:
        while process.poll() is None:
            rows = metrics.read_bytes().count(b'\n') if metrics.exists() else 0
            if rows in (done, steps):  # after the last step there are other things to do
                time.sleep(0.02)
                continue
            done = rows
            looks = [*looks, held(process)][-LOOKS:]
            if done % 100 == 0 or done in (first, steps - 1):
                medians = {key: statistics.median(each[key] for each in looks) for key in looks[0]}
                found[done] = medians | lies_in(workdir)
                print(
                    f'step {done}, {time.monotonic() - started:.0f} s: {found[done]}',
                    file=sys.stderr,
                )
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise SystemExit(f'the run ended with exit code {process.returncode}')
    return {
        'benchmark': 'long_run',
        'steps': steps,
        'at_first': found[first],
        'at_last': found[steps - 1],
        'minutes': round((time.monotonic() - started) / 60, 1),
        'load': round(os.getloadavg()[0], 1),
    }


if __name__ == '__main__':
    main()
