"""configs/tiny.py with the table of configs/base.py, which divides parameters over every axis."""

import ml_collections

from configs import base, tiny


def get_config(variant: str = 'echo') -> ml_collections.ConfigDict:
    config = tiny.get_config(variant)
    with config.unlocked():
        config.sharding = base.get_config().sharding
    return config
