"""The dialects by the name that `protocol.dialect` gives; dialect.py says what each must have."""

from echo_jax.agent.dialects import qwen3_xml
from echo_jax.agent.dialects.dialect import Dialect

DIALECTS: dict[str, Dialect] = {
    'qwen3_xml': qwen3_xml,
}


def find_dialect(name: str) -> Dialect:
    """The dialect that a recipe names; raises ValueError if there is none of that name."""
    if name not in DIALECTS:
        raise ValueError(f'protocol.dialect is {name!r}; choose one of {sorted(DIALECTS)}')
    return DIALECTS[name]
