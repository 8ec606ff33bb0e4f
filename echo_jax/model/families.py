"""The families of models that there are, by the `model_type` of their config.json."""

from echo_jax.model.family import ModelConfig
from echo_jax.model.qwen3 import Qwen3Config

DEFAULT = 'qwen3'  # of a config.json, or of a recipe's own sizes, that names none
FAMILIES: dict[str, type[ModelConfig]] = {Qwen3Config.model_type: Qwen3Config}
