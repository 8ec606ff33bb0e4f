"""A bucket on this machine, for TensorStore and gcsfs."""

import contextlib
import subprocess
import sys
from collections.abc import Generator

from tests.support.small_run import ROOT


@contextlib.contextmanager
def serving(*flags: str) -> Generator[dict[str, str]]:
    """What is in the environment of a process that finds the server, with the bucket `bucket`."""
    command = [sys.executable, 'tests/support/gcs_server.py', *flags, 'bucket']
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            address = server.stdout.readline().strip()
            yield {
                'TENSORSTORE_GCS_HTTP_URL': address,
                'STORAGE_EMULATOR_HOST': address,  # for gcsfs, which then sends no token
                'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'of-these-tests',
                'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # by gRPC, which is not served
            }
        finally:
            server.kill()
