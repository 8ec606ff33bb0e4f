"""What a recipe that asks for Harbor says where Harbor is not installed."""

import importlib.util
import sys

import pytest

from echo_jax.sandbox import harbor


def test_harbor_is_missing():
    if importlib.util.find_spec('harbor'):
        pytest.skip('Harbor is installed here')
    version = '.'.join(map(str, sys.version_info[:2]))
    with pytest.raises(ValueError, match=rf'pip install harbor, .* this is {version}'):
        harbor.check('docker')
