"""Costs of modules: of one that is written out below, and of what XLA compiles here."""

import jax
import jax.numpy as jnp
import pytest

from echo_jax.planner.hlo import Chip, module_cost

# FLOPs, HBM bytes and sent bytes a second: products take 1 s a thousand, and so on.
CHIP = Chip(1000.0, 100.0, 10.0)
# A loop of 3 passes (0, 2, 4 of 6) around one of 5, and one whose end is no constant.
MODULE = """
HloModule jit_f, is_scheduled=true

%product (a: bf16[7,4,8], b: s32[], c: bf16[8,16]) -> bf16[4,16] {
  %a = bf16[7,4,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,4,8]{2,1,0} dynamic-slice(%a, %b, %zero, %zero), dynamic_slice_sizes={1,4,8}
  %flat = bf16[4,8]{1,0} bitcast(%slice)
  %c = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  ROOT %out = bf16[4,16]{1,0} convolution(%flat, %c), dim_labels=bf_io->bf
}

%inner_body (p: (s32[], bf16[7,4,8], bf16[8,16])) -> (s32[], bf16[7,4,8], bf16[8,16]) {
  %p = (s32[], bf16[7,4,8]{2,1,0}, /*index=2*/bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %a.1 = bf16[7,4,8]{2,1,0} get-tuple-element(%p), index=1
  %c.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=2
  %fused = bf16[4,16]{1,0} fusion(%a.1, %i, %c.1), kind=kOutput, calls=%product
  ROOT %t = (s32[], bf16[7,4,8]{2,1,0}, bf16[8,16]{1,0}) tuple(%next, %a.1, %c.1)
}

%inner_test (p: (s32[], bf16[7,4,8], bf16[8,16])) -> pred[] {
  %p.1 = (s32[], bf16[7,4,8]{2,1,0}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %five), direction=LT
}

%outer_body (p: (u32[], f32[20])) -> (u32[], f32[20]) {
  %p.2 = (u32[], f32[20]{0}) parameter(0)
  %i.2 = u32[] get-tuple-element(%p.2), index=0
  %x = f32[20]{0} get-tuple-element(%p.2), index=1
  %two = u32[] constant(2)
  %next.1 = u32[] add(%i.2, %two)
  %start = s32[] constant(0)
  %weights = bf16[7,4,8]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %matrix = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %init = (s32[], bf16[7,4,8]{2,1,0}, bf16[8,16]{1,0:S(1)}) tuple(%start, %weights, %matrix)
  %inner = (s32[], bf16[7,4,8], bf16[8,16]) while(%init), condition=%inner_test, body=%inner_body
  %sum = f32[20]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t.1 = (u32[], f32[20]{0}) tuple(%next.1, %sum)
}

%outer_condition (p: (u32[], f32[20])) -> pred[] {
  %p.3 = (u32[], f32[20]{0}) parameter(0)
  %i.3 = u32[] get-tuple-element(%p.3), index=0
  %six = u32[] constant(6)
  ROOT %lt.1 = pred[] compare(%i.3, %six), direction=LT, metadata={op_name="jit(f)"
}

%free_body (p: (s32[], f32[40])) -> (s32[], f32[40]) {
  %p.4 = (s32[], f32[40]{0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %end = s32[] get-tuple-element(%p.4), index=2
  %y = f32[40]{0} get-tuple-element(%p.4), index=1
  %negative = f32[40]{0} negate(%y)
  ROOT %t.2 = (s32[], f32[40]{0}) tuple(%i.4, %negative)
}

%free_condition (p: (s32[], f32[40], s32[])) -> pred[] {
  %p.5 = (s32[], f32[40]{0}, s32[]) parameter(0)
  %i.5 = s32[] get-tuple-element(%p.5), index=0
  %n = s32[] get-tuple-element(%p.5), index=2
  ROOT %lt.2 = pred[] compare(%i.5, %n), direction=LT
}

ENTRY %main (x: f32[20], y: f32[40], n: s32[]) -> f32[20] {
  %x.1 = f32[20]{0} parameter(0)
  %y.1 = f32[40]{0} parameter(1)
  %count = s32[] parameter(2)
  %nought = u32[] constant(0)
  %first = u32[] copy(%nought)
  %both = (u32[], f32[20]{0}) tuple(%first, %x.1)
  %outer = (u32[], f32[20]{0}) while(%both), condition=%outer_condition, body=%outer_body
  %free = (s32[], f32[40]{0}, s32[]) while(%more), condition=%free_condition, body=%free_body
  %g0 = f32[20]{0} get-tuple-element(%outer), index=1
  %more = (s32[], f32[40]{0}, s32[]) tuple(%count, %y.1, %count)
  %gather = (f32[20]{0}, f32[60]{0}) all-gather-start(%g0), replica_groups=[2,3]<=[6]
  %gathered = f32[60]{0} all-gather-done(%gather)
  ROOT %scattered = f32[10]{0} reduce-scatter(%g0), replica_groups=mesh['a'=3,'b'=2] {'b'}
}
"""


def test_a_module_by_hand():
    cost = module_cost(MODULE, CHIP, devices=8, unknown_trips=7)
    # The product of [4, 8] and [8, 16]: 2 x 4 x 16 x 8 = 1,024 FLOPs, 5 times in each of 3 passes.
    assert cost.flops == 3 * 5 * 1024
    # The product reads its slice of 4 x 8 bfloat16 (64 bytes), not the 7; the matrix is in VMEM;
    # the index is an S(6) operand inside, but s32 in HBM outside (4). It writes 4 x 16 x 2 = 128.
    # The counters read and write 12 bytes a pass: 4 + 4 read, 4 written.
    inner = 5 * ((64 + 4 + 128) + 12)
    # The all-reduce reads and writes 80 bytes.
    outer = 3 * (inner + 12 + 80 + 80)
    # The free loop's 40 floats in and out, 7 times. copy: 4 + 4. The gather reads 80 and writes
    # 240, the scatter reads 80 and writes 40; comparisons are not of the schedule.
    assert cost.hbm_bytes == outer + 7 * 320 + 8 + 320 + 120
    # Groups of 4: an all-reduce sends 2 x 3/4 of 80 bytes. Of 3: each sends its 80 bytes to the 2
    # others. Of 2: half of 80.
    assert cost.sent_bytes == 3 * 120 + 160 + 40
    # Products: max(1,024 / 1,000, 196 / 100) s. An all-reduce: 120 / 10 s. The gather is not waited
    # for, but reads and writes 320 bytes; the scatter sends 40 / 10 s.
    pass_seconds = 5 * (1.96 + 0.12) + 0.12 + 12
    assert cost.seconds == pytest.approx(3 * pass_seconds + 7 * 3.2 + 0.08 + 3.2 + 4)


@pytest.mark.parametrize(
    'branches',
    [
        'branch_computations={%cheap, %dear}, backend_config={"note":"%p"}',
        'true_computation=%dear, false_computation=%cheap',
    ],
)
def test_a_condition_costs_as_much_as_its_dearer_branch(branches):
    text = f"""
%cheap (a: f32[20]) -> f32[20] {{
  %a = f32[20]{{0}} parameter(0)
  ROOT %b = f32[20]{{0}} negate(%a)
}}

%dear (a: f32[20]) -> f32[20] {{
  %a.1 = f32[20]{{0}} parameter(0)
  %b.1 = f32[20]{{0}} negate(%a.1)
  ROOT %c.1 = f32[20]{{0}} negate(%b.1)
}}

ENTRY %main (p: pred[], x: f32[20]) -> f32[20] {{
  %p = pred[] parameter(0)
  %x = f32[20]{{0}} parameter(1)
  ROOT %y = f32[20]{{0}} conditional(%p, %x, %x), {branches}
}}
"""
    # Each negation reads and writes 80 bytes; the dear branch has two.
    assert module_cost(text, CHIP, devices=1, unknown_trips=1).hbm_bytes == 2 * 160


def test_a_text_in_another_form_is_refused():
    text = MODULE.replace('condition=%outer_condition, ', '')
    with pytest.raises(ValueError, match=r'the compiler wrote .*expected condition='):
        module_cost(text, CHIP, devices=8, unknown_trips=7)


def product(line: str, lhs: str, rhs: str) -> float:
    text = f"""
ENTRY %main (a: {lhs}, b: {rhs}) -> f32[] {{
  %a = {lhs} parameter(0)
  %b = {rhs} parameter(1)
  ROOT {line}
}}
"""
    return module_cost(text, CHIP, devices=1, unknown_trips=1).flops


@pytest.mark.parametrize(
    'line, lhs, rhs, flops',
    [
        # [4, 8] x [8, 16].
        (
            '%c = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
            'f32[4,8]{1,0}',
            'f32[8,16]{1,0}',
            2 * 4 * 16 * 8,
        ),
        # 3 heads: a window over them with padding 2 on both sides meets one head at each place.
        (
            '%c = bf16[5,6,3,7]{3,2,1,0} convolution(%a, %b), window={size=1x3 pad=0_0x2_2 '
            'rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f',
            'bf16[5,6,8,1]{3,2,1,0}',
            'bf16[3,7,8,1]{3,2,1,0}',
            2 * 5 * 6 * 3 * 7 * 8,
        ),
        # A batch of 4 products [6, 8] x [8, 10], written as a convolution that strides through
        # the batch: only the diagonal pairs of an item and a window position meet.
        (
            '%c = f32[6,10,4]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 '
            'lhs_dilate=4}, dim_labels=bf0_io0->bf0',
            'f32[6,8,4]{2,1,0}',
            'f32[8,10,4]{2,1,0}',
            2 * 6 * 10 * 8 * 4,
        ),
    ],
)
def test_products(line, lhs, rhs, flops):
    assert product(line, lhs, rhs) == flops


def test_what_xla_makes_of_nested_loops():
    """XLA's own count has each body once: 2 x 32 x 64 x 64, of 15 of them."""

    def layer(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

    shapes = jnp.zeros((5, 64, 64)), jnp.zeros((32, 64))
    compiled = jax.jit(lambda w, x: jax.lax.scan(layer, x, w)[0]).lower(*shapes).compile()
    cost = module_cost(compiled.as_text(), CHIP, devices=1, unknown_trips=1)
    assert cost.flops == 15 * 2 * 32 * 64 * 64
    # Every pass reads a matrix and the rows and writes the rows; tanh moves them once more.
    assert cost.hbm_bytes >= 15 * 4 * (64 * 64 + 4 * 32 * 64)
    assert cost.hbm_bytes < 1.5 * 15 * 4 * (64 * 64 + 4 * 32 * 64)
