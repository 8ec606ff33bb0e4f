"""The folder of a run and its one learner, with real processes."""

import signal
import subprocess
import sys

import pytest

from configs import base
from echo_jax.run.workdir import Workdir

LEARNER = """
import sys, time
from configs import base
from echo_jax.run.workdir import Workdir
with Workdir(sys.argv[1], base.get_config()).only_learner():
    print('learns', flush=True)
    time.sleep(60)
"""


def test_a_run_has_one_learner_at_a_time(tmp_path):
    place = tmp_path / 'run'
    command = [sys.executable, '-c', LEARNER, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == 'learns\n'
            work = Workdir(place, base.get_config())
            said = rf'run has a learner already, process {other.pid} on \S+; stop it'
            with pytest.raises(ValueError, match=said) as raised, work.only_learner():
                pass
            assert '\n' not in str(raised.value)
        finally:
            other.send_signal(signal.SIGKILL)
    with work.only_learner():  # the lock of a killed process is nobody's
        pass
