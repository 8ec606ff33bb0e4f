"""Which tokens the environment term learns and what they weigh: by hand, and by a slow count."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_jax.learner.batching import make_batch, unpack
from echo_jax.learner.losses import env_term, finish_metrics
from echo_jax.learner.targets import (
    Targets,
    choose_targets,
    message_mask,
    target_mask,
    turn_numbers,
)
from echo_jax.types import ENV_TARGETS, OBSERVATION_ROLES, Role, Status
from tests.support.random_rollouts import make_rollout, rollout_lists, small_config

# Two turns. The first is answered by a warning, the words around an output and the output, the
# second by an error of the parser.
TWO_TURNS = 'PPAASSWWROORSSSAASSFFSSS'


def letters(mask, roles=TWO_TURNS):
    return ''.join(letter if on else '.' for letter, on in zip(roles, mask))


@pytest.mark.parametrize(
    ('targets', 'expected'),
    [
        ('released', '........ROOR.......FF...'),
        ('output', '.........OO.............'),
        ('warning', '......WW................'),
        ('warning_and_released', '......WWROOR.......FF...'),
        # No token opens a message here, so all between two turns is taken.
        ('observation', '....SSWWROORSSS..SSFFSSS'),
    ],
)
def test_targets_by_hand(targets, expected):
    assert letters(target_mask(make_rollout(TWO_TURNS), targets)) == expected


def test_the_first_token_is_never_a_target():
    for targets in ENV_TARGETS:
        assert not target_mask(make_rollout('OWSOA'), targets)[0]
        assert not len(target_mask(make_rollout(''), targets))
    with pytest.raises(ValueError, match=r"loss.targets is 'all'; expected one of \('released'"):
        target_mask(make_rollout('PAO'), 'all')


def test_a_message_goes_from_the_token_that_opens_it_to_the_next_generation_prompt():
    #        < s > A A e n < u t W R O t e n < a A A
    roles = 'PPPAASSSSSWROSSSSSAA'
    rollout = make_rollout(roles)
    # Token 7 opens messages: it opens the prompt, the observation and the generation prompt.
    rollout.tokens[[0, 7, 16]] = 7
    rollout.tokens[4] = 7  # sampled by the agent, which opens nothing
    # e n (the end of the agent's turn) and the generation prompt are left out.
    assert letters(message_mask(rollout), roles) == '.......SSSWROSSS....'
    assert letters(target_mask(rollout, 'observation'), roles) == '.......SSSWROSSS....'
    # Template tokens that answer nothing belong to no observation.
    assert not message_mask(make_rollout('PPAASS')).any()


@pytest.mark.parametrize('name', ['tiny', 'qwen'])
def test_a_message_of_a_real_conversation(name, request):
    """The tokens of 'observation' decode to the message of docs/protocol.md#template."""
    from echo_jax.agent.encoding import Span
    from echo_jax.agent.protocol import Protocol
    from echo_jax.policy import Generation
    from tests.support.tokenizers import QWEN, TINY, build

    tokenizer = build({'tiny': TINY, 'qwen': QWEN}[name])
    config = small_config().protocol
    config.max_total_tokens = config.max_context_tokens = 10_000
    conversation = Protocol(tokenizer, config).start('List /tmp.')
    for text in ('I look.', 'Again, cut off'):
        ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
        zeros = np.zeros(len(ids))
        conversation.append_turn(Generation(ids, zeros, zeros.astype(np.int32), 'length'))
        spans = [Span(Role.WARNING, 'WARNINGS:\n- x\n\n'), Span(Role.OUTPUT, 'hello\nworld')]
        assert conversation.append_observation(spans)
    tokens = np.array(conversation.tokens, np.int32)
    rollout = dataclasses.replace(
        make_rollout('P'), tokens=tokens, roles=np.array(conversation.roles, np.uint8)
    )
    text = tokenizer.decode(tokens[target_mask(rollout, 'observation')])
    message = (
        '<|im_start|>user\n<tool_response>\nWARNINGS:\n- x\n\nhello\nworld\n</tool_response>'
        '<|im_end|>\n'
    )
    assert text == message * 2


def test_only_the_first_tokens_of_each_turn():
    def chosen(**loss):
        [targets], counts = choose_targets([make_rollout(TWO_TURNS)], small_config(**loss))
        assert not targets.dropped.any()
        return letters(targets.chosen), counts

    assert chosen(max_env_tokens=3) == ('........ROO........FF...', {'env_dropped/capped': 1.0})
    assert chosen(max_env_tokens=1) == ('........R..........F....', {'env_dropped/capped': 4.0})
    # The limit is of targets, so the warning takes none of it unless it is one.
    assert chosen(max_env_tokens=3, targets='warning_and_released')[0] == (
        '......WWR..........FF...'
    )
    assert chosen() == ('........ROOR.......FF...', {})
    np.testing.assert_array_equal(
        turn_numbers(make_rollout('PPAASOAAOO').roles), [0, 0] + [1] * 4 + [2] * 4
    )


@pytest.mark.parametrize(
    ('loss', 'first', 'second'),
    [
        # N = 2. O_i: 6 + 2 = 8 and 1, the template not counted; E_i: 4 + 2 and 1.
        ({}, 1 / 16, 1 / 2),
        ({'env_normalization': 'selected'}, 1 / 12, 1 / 2),
        ({'env_normalization': 'token_mean'}, 1 / 7, 1 / 7),
        # With at most 1 of each turn: O_i is what it was, E_i is what is left.
        ({'max_env_tokens': 1}, 1 / 16, 1 / 2),
        ({'max_env_tokens': 1, 'env_normalization': 'selected'}, 1 / 4, 1 / 2),
        ({'max_env_tokens': 1, 'env_normalization': 'token_mean'}, 1 / 3, 1 / 3),
        ({'max_env_tokens': 1, 'reduction': 'token_mean'}, 1 / 3, 1 / 3),
        ({'max_env_tokens': 1, 'reduction': 'dr_grpo'}, 1 / 48, 1 / 48),
        ({'targets': 'observation'}, 1 / 16, 1 / 2),
        ({'targets': 'warning', 'env_normalization': 'selected'}, 1 / 4, 0),
    ],
)
def test_weights_by_hand(loss, first, second):
    rollouts = [make_rollout(TWO_TURNS), make_rollout('PAO', sample=1, first_token=31)]
    batch = make_batch(rollouts, small_config(**loss))
    for ours, weight in ((batch.tokens < 30, first), (batch.tokens > 30, second)):
        assert batch.env_weight[ours].max() == np.float32(weight)


def test_what_is_dropped_counts_or_does_not():
    rollouts = [make_rollout(TWO_TURNS), make_rollout('PAO', sample=1, first_token=31)]
    targets, _ = choose_targets(rollouts, small_config())
    # The first output, the 10th token, and the second rollout's only target are dropped.
    out = np.arange(24) == 9
    targets = [
        Targets(targets[0].chosen & ~out, out),
        Targets(np.zeros(3, bool), targets[1].chosen),
    ]
    expected = {
        # (normalization, counted): 1 / what divides. O_1 = 8, E_1 = 6, one of each is dropped.
        ('full_observation', True): 1 / 16,
        ('full_observation', False): 1 / 14,
        ('selected', True): 1 / 12,
        ('selected', False): 1 / 10,
        ('token_mean', True): 1 / 7,
        ('token_mean', False): 1 / 5,
    }
    for (normalization, counted), weight in expected.items():
        config = small_config(env_normalization=normalization, count_dropped=counted)
        batch = make_batch(rollouts, config, targets)
        assert batch.env_weight.max() == np.float32(weight)
        assert not batch.env_weight[batch.tokens == 10].any()
        assert not batch.env_weight[batch.tokens > 30].any()
        assert np.count_nonzero(batch.env_weight) == 5


def test_a_missing_rule_is_an_error():
    with pytest.raises(ValueError, match='drop_unpredictable reads the text of tokens'):
        make_batch([make_rollout('PAO')], small_config(drop_unpredictable=True))
    config = small_config()
    config.loss.drop_surprising.top = 0.1
    with pytest.raises(ValueError, match='drop_surprising needs the log-probabilities'):
        make_batch([make_rollout('PAO')], config)


def test_metrics_follow_the_targets():
    rollouts = [make_rollout('PPAASWROSSA')]
    logprobs = -np.arange(24, dtype=np.float32)[None].repeat(10, 0)

    def metrics(targets):
        batch = make_batch(rollouts, small_config(targets=targets))
        return finish_metrics(env_term(logprobs, batch, targets=targets)[1])

    # Position t has t nats: warning 5, wrapper 6, output 7, template 4, 8 and 9.
    released, warning, whole = map(metrics, ('released', 'warning', 'observation'))
    assert released['env_ce'] == 6.5 and released['env_ce/warning'] == 5  # measured, not learned
    assert released['target_tokens'] == 2 and 'env_ce/scaffold' not in released
    assert (warning['env_ce'], warning['env_ce/warning'], warning['warning_tokens']) == (5, 5, 1)
    assert warning['env_ce/output'] == released['env_ce/output'] == 7
    assert (whole['env_ce'], whole['env_ce/scaffold'], whole['target_tokens']) == (6.5, 7, 6)


settings = st.fixed_dictionaries(
    {
        'targets': st.sampled_from(sorted(ENV_TARGETS)),
        'max_env_tokens': st.sampled_from([0, 1, 3]),
        'env_normalization': st.sampled_from(['full_observation', 'selected', 'token_mean']),
        'reduction': st.sampled_from(['sequence_mean', 'token_mean', 'dr_grpo']),
        'count_infra_errors': st.booleans(),
        'count_dropped': st.booleans(),
        'drop_unpredictable': st.booleans(),
    }
)
shares = st.sampled_from([0.0, 0.5, 1.0])


def every_third(rollout):
    """A rule that depends on the token alone."""
    return rollout.tokens % 3 == 0


def slow_weights(rollouts, config):
    """{token: weight}, a token at a time."""
    loss = config.loss
    kept = [r for r in rollouts if loss.count_infra_errors or r.status != Status.INFRA_ERROR]
    chosen, dropped = {}, {}
    quality = {}
    for r in kept:
        turns, bad, warned = 0, set(), set()
        for t, role in enumerate(r.roles):
            turns += role == Role.ACTION and (t == 0 or r.roles[t - 1] != Role.ACTION)
            if turns and role == Role.FEEDBACK:
                bad.add(turns)
            if turns and role == Role.WARNING:
                warned.add(turns)
        options = loss.env_filter
        ok = True
        if any(options.values()):
            ok = turns > 0 and (turns - len(bad)) / turns >= options.min_parsed
            ok = ok and (turns - len(bad | warned)) / turns >= options.min_clean
        quality[r.sample_id] = ok
    if loss.env_filter.min_correct:
        for group in {r.group_id for r in kept}:
            members = sorted(
                (r for r in kept if r.group_id == group and quality[r.sample_id]),
                key=lambda r: r.sample_id,
            )
            good = [r for r in members if r.reward >= 0.5 and r.status != Status.INFRA_ERROR]
            room = 0
            while good and len(good) / (len(good) + room + 1) >= loss.env_filter.min_correct:
                room += 1
                if room > 20:
                    break
            for r in [r for r in members if not any(r is g for g in good)][room:]:
                quality[r.sample_id] = False
    for r in kept:
        chosen[r.sample_id], dropped[r.sample_id] = [], []
        if not quality[r.sample_id]:
            continue
        turn, taken = 0, 0
        for t, role in enumerate(r.roles):
            if role == Role.ACTION and (t == 0 or r.roles[t - 1] != Role.ACTION):
                turn, taken = turn + 1, 0
            wanted = role in ENV_TARGETS[loss.targets] and t > 0
            if role == Role.SCAFFOLD and wanted:  # does its stretch between turns hold content?
                left = right = t
                while left >= 0 and r.roles[left] > Role.ACTION:
                    left -= 1
                while right < len(r.roles) and r.roles[right] > Role.ACTION:
                    right += 1
                wanted = np.isin(r.roles[left + 1 : right], OBSERVATION_ROLES).any()
            if not wanted or (loss.max_env_tokens and taken == loss.max_env_tokens):
                continue
            taken += 1
            out = loss.drop_unpredictable and r.tokens[t] % 3 == 0
            (dropped if out else chosen)[r.sample_id].append(t)
    weights = {}
    counts = {
        r.sample_id: len(chosen[r.sample_id]) + loss.count_dropped * len(dropped[r.sample_id])
        for r in kept
    }
    for r in kept:
        observed = [t for t in range(1, len(r.roles)) if r.roles[t] in OBSERVATION_ROLES]
        if not loss.count_dropped:
            observed = [t for t in observed if t not in dropped[r.sample_id]]
        by_tokens = 'token_mean' in (loss.reduction, loss.env_normalization)
        if loss.reduction == 'dr_grpo':
            divide = len(kept) * config.protocol.max_total_tokens
        elif by_tokens:
            divide = sum(counts.values())
        elif loss.env_normalization == 'selected':
            divide = len(kept) * counts[r.sample_id]
        else:
            divide = len(kept) * len(observed)
        weights |= {r.tokens[t]: 1 / divide for t in chosen[r.sample_id]}
    return weights


@pytest.mark.slow
@given(
    rollouts=rollout_lists(),
    loss=settings,
    filters=st.fixed_dictionaries({f'min_{n}': shares for n in ('parsed', 'clean', 'correct')}),
    pack=st.booleans(),
    data=st.data(),
)
def test_weights_are_those_of_a_slow_count(rollouts, loss, filters, pack, data):
    """With every option, packed or not; and the order of the rollouts changes no bit."""
    config = small_config(pack=pack, **loss)
    config.loss.env_filter.update(filters)

    def batch_of(some):
        rule = every_third if config.loss.drop_unpredictable else None
        targets, _ = choose_targets(some, config, rule)
        return make_batch(some, config, targets)

    batch, expected = batch_of(rollouts), slow_weights(rollouts, config)
    weighted = batch.env_weight > 0
    assert set(batch.tokens[weighted]) == set(expected)
    for token, weight in zip(batch.tokens[weighted], batch.env_weight[weighted]):
        assert weight == pytest.approx(expected[token], rel=1e-6)
    for array, again in zip(batch, batch_of(data.draw(st.permutations(rollouts)))):
        np.testing.assert_array_equal(array, again)
    # The policy's weights do not depend on any of it.
    plain = make_batch(
        rollouts,
        small_config(
            pack=pack, reduction=loss['reduction'], count_infra_errors=loss['count_infra_errors']
        ),
    )
    np.testing.assert_array_equal(batch.policy_weight, plain.policy_weight)
    # The loss is linear in the log-probabilities: its gradient is minus the weights.
    gradient = jax.grad(lambda l: env_term(l, batch, targets=config.loss.targets)[0])(
        np.full(batch.tokens.shape, -1.0, np.float32)
    )
    np.testing.assert_array_equal(gradient, -batch.env_weight)


@given(rollouts=rollout_lists(), pack=st.booleans())
def test_unpack_is_the_inverse_of_packing(rollouts, pack):
    config = small_config(pack=pack)
    batch = make_batch(rollouts, config)
    for rollout, tokens in zip(rollouts, unpack(rollouts, batch.tokens, config), strict=True):
        expected = rollout.tokens * (rollout.status != Status.INFRA_ERROR)
        np.testing.assert_array_equal(tokens, expected)
