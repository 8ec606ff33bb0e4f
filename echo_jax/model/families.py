"""The families of models that there are, by the `model_type` of their config.json."""

from echo_jax.model.family import ModelConfig
from echo_jax.model.qwen3 import Qwen3Config

DEFAULT = 'qwen3'  # the family if neither config.json nor the recipe names a model_type
FAMILIES: dict[str, type[ModelConfig]] = {Qwen3Config.model_type: Qwen3Config}
