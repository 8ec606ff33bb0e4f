"""Rollouts for the learner's tests: spelled out by hand, or drawn by hypothesis."""

import ml_collections
import numpy as np
from hypothesis import strategies as st

from configs.tiny import get_config
from echo_jax.types import Role, Rollout, Status

LETTERS = {
    'P': Role.PROMPT,
    'A': Role.ACTION,
    'S': Role.SCAFFOLD,
    'W': Role.WARNING,
    'F': Role.FEEDBACK,
    'R': Role.WRAPPER,
    'O': Role.OUTPUT,
}


def make_rollout(
    roles: str, reward=0.0, group=0, sample=0, status=Status.OK, first_token=1, version=3
) -> Rollout:
    """`roles` as letters, such as 'PPAAROO'. Tokens count up from `first_token`."""
    codes = np.array([LETTERS[letter] for letter in roles], np.uint8)
    acting = codes == Role.ACTION
    tokens = np.arange(first_token, first_token + len(roles), dtype=np.int32)
    return Rollout(
        tokens=tokens,
        roles=codes,
        rollout_logprobs=np.where(acting, -0.01 * tokens, 0).astype(np.float32),
        policy_versions=np.where(acting, version, -1).astype(np.int32),
        turn_starts=np.flatnonzero(acting & ~np.r_[False, acting[:-1]]).astype(np.int32),
        reward=reward,
        status=status,
        task_id=f'task-{group}',
        group_id=group,
        sample_id=sample,
    )


def small_config(groups=3, group_size=3, seq_len=24, micro_rows=2, pack=True, **loss):
    config = get_config()
    config.group_size = group_size
    config.batch.groups, config.batch.seq_len = groups, seq_len
    config.batch.micro_rows, config.batch.pack = micro_rows, pack
    config.protocol.max_total_tokens = seq_len
    config.loss.update(loss)
    return config


def add_model(config: ml_collections.ConfigDict, vocab_size: int) -> None:
    """Gives a recipe of `small_config` a model of one layer, and one device to lie on."""
    config.model.update(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
    )
    config.mesh.fsdp = 1


@st.composite
def rollout_lists(draw, max_rollouts=9, max_tokens=24) -> list[Rollout]:
    """Groups of unequal size. Rollouts may be empty, lack actions or targets, or have failed.

    No token occurs twice in a list, so that a table can hold a value for each token.
    """
    rollouts, first_token = [], 1
    for i in range(draw(st.integers(0, max_rollouts))):
        body = draw(st.text('ASWFRO' + 'AO' * 2, max_size=max_tokens - 2))
        roles = draw(st.sampled_from(['', 'P', 'PP' + body, 'PA' + body]))
        rollouts.append(
            make_rollout(
                roles,
                reward=draw(st.sampled_from([0.0, 0.0, 1.0, 0.25])),
                group=draw(st.integers(0, 2)),
                sample=i,
                status=draw(st.sampled_from([Status.OK] * 4 + list(Status))),
                first_token=first_token,
            )
        )
        first_token += len(roles)
    return rollouts


loss_settings = st.fixed_dictionaries(
    {
        'reduction': st.sampled_from(['sequence_mean', 'token_mean', 'prompt_mean', 'dr_grpo']),
        'env_normalization': st.sampled_from(['full_observation', 'selected']),
        'targets': st.sampled_from(['released', 'output']),
        'advantages': st.sampled_from(['grpo', 'dr_grpo', 'rloo', 'maxrl']),
        'count_infra_errors': st.booleans(),
    }
)
