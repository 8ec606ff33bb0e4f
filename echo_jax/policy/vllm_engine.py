"""Starts vLLM's asynchronous engine, and tells its errors from others; `vllm.py` is its policy.

It imports vLLM inside functions, because programs without it import `vllm.py` too.
"""

import contextlib
import os
from collections.abc import AsyncGenerator

from echo_jax.policy import PolicyError, vllm_rank

# vLLM reads these when it is imported. VLLM_CPU_KVCACHE_SPACE is in GiB.
_ENVIRONMENT = {
    'VLLM_NO_USAGE_STATS': '1',
    'DO_NOT_TRACK': '1',
    'HF_HUB_OFFLINE': '1',
    'TRANSFORMERS_OFFLINE': '1',
    'VLLM_LOGGING_LEVEL': 'WARNING',
    'VLLM_LOGGING_STREAM': 'ext://sys.stderr',  # stdout is the program's own
    'VLLM_CPU_KVCACHE_SPACE': '1',
    'VLLM_WORKER_MULTIPROC_METHOD': 'spawn',  # a fork would not import vllm_rank anew
}
_CPU_BATCH_TOKENS = 2048  # the engine may prefill at least this many tokens at one time


def start_engine(arguments: dict):
    """vLLM's AsyncLLM, by arguments of its AsyncEngineArgs; it blocks for a minute.

    Its processes end when this one does.
    Raises PolicyError if vLLM is missing, too old or too new for swaps, or refuses the arguments.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise PolicyError(
            f'vLLM cannot be imported ({error}); install requirements-rollout.txt, or on a CPU '
            'run `make rollout`, and start the worker in that environment'
        ) from error
    check_interface()
    if current_platform.is_cpu():
        # On a CPU a prompt that is prefilled in parts kills the engine (0.32): vLLM then sets the
        # random generator of the request's seed back, which PyTorch's for CPUs cannot do. A turn
        # that a swap interrupts is prefilled again, as a whole, beside one token of every other.
        batch = max(arguments['max_model_len'] + arguments['max_num_seqs'], _CPU_BATCH_TOKENS)
        arguments = dict(enable_chunked_prefill=False, max_num_batched_tokens=batch) | arguments
    os.environ[vllm_rank.OWNER] = str(os.getpid())
    arguments = dict(additional_config=vllm_rank.Belongings()) | arguments
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition('\n')[0]
        raise PolicyError(f'vLLM does not start with {arguments["model"]}: {reason}') from error
    finally:
        del os.environ[vllm_rank.OWNER]


def check_interface() -> None:
    """Raises PolicyError if this vLLM lacks what swaps and the versions of tokens are made of."""
    import vllm
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    needed = 'pause_generation', 'resume_generation', 'reset_prefix_cache', 'update_weight_version'
    # Not hasattr: its base class has them all, to say that they are not implemented.
    missing = [f'AsyncLLM.{name}' for name in needed if name not in vars(AsyncLLM)]
    if 'weight_versions' not in CompletionOutput.__dataclass_fields__:
        missing.append('CompletionOutput.weight_versions')
    if missing:
        raise PolicyError(
            f'vLLM {vllm.__version__} has no {", ".join(missing)}, by which weights are swapped; '
            'install a version that requirements-rollout.txt allows'
        )


async def request(
    engine, number: str, context: list[int], salt: str | None, priority: int, **sampling
):
    """Asks the engine for one request, and returns vLLM's whole output.

    number: no other request's. salt: prefixes in the cache are shared within one. priority: the
    lowest is scheduled first, if the engine's queue goes by it. sampling: vLLM's SamplingParams.
    Raises PolicyError if the engine failed.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        **sampling, detokenize=False, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY
    )
    prompt = TokensPrompt(prompt_token_ids=context)
    if salt is not None:
        prompt['cache_salt'] = salt
    async with engine_errors():
        outputs = engine.generate(prompt, params, number, priority=priority)
        return [output async for output in outputs][-1]


@contextlib.asynccontextmanager
async def engine_errors() -> AsyncGenerator[None]:
    """Raises PolicyError in the place of the errors of an engine that failed."""
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as error:
        raise PolicyError(f"vLLM's engine failed: {error or type(error).__name__}") from error
