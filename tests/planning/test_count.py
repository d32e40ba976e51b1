"""Operations are those of the products by hand; bytes between devices those of programs whose traffic is known."""

import jax
import jax.numpy as jnp
import pytest

from saap_jax.planning.count import collectives_of, work_of


def test_products_in_loops_count_as_often_as_they_turn():
    weights = jnp.zeros((5, 8, 8), jnp.float32)

    def forward(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    jaxpr = jax.make_jaxpr(forward)(weights, jnp.zeros((3, 8)))
    work = work_of(jaxpr, frozenset({64}))
    assert work.flops == 5 * 2 * 3 * 8 * 8
    assert work.weight_bytes == 5 * 64 * 4
    assert work.other_bytes == 5 * 2 * 24 * 4
    both = work_of(jax.make_jaxpr(jax.grad(forward))(weights, jnp.zeros((3, 8))), frozenset({64}))
    # forward, gradient of the weights in every turn, and of the activations
    assert both.flops == 3 * work.flops


def test_remat_counts_the_second_forward_pass():
    def loss(w, x):
        return jnp.sum(jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))(w, x))

    def plain(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))

    arguments = jnp.zeros((8, 8)), jnp.zeros((3, 8))
    programs = [jax.make_jaxpr(jax.value_and_grad(each))(*arguments) for each in (loss, plain)]
    assert [work_of(each, frozenset()).flops / (2 * 3 * 8 * 8) for each in programs] == [7, 5]


def test_branches_count_as_the_dearest():
    def forward(which, x):
        return jax.lax.cond(which, lambda x: x @ x @ x, lambda x: x, x)

    assert work_of(jax.make_jaxpr(forward)(True, jnp.zeros((4, 4))), frozenset()).flops == 2 * 2 * 64


def test_what_no_result_needs_does_not_count():
    """As the gradient by the words, which the loss that scoring differentiates could make, and nobody asks for."""

    def forward(x, w):
        _, unused = jax.lax.scan(lambda x, _: (x, x @ w), x, length=5)
        return x @ w, (unused, x @ w @ w)[:0]

    assert work_of(jax.make_jaxpr(forward)(*[jnp.zeros((8, 8))] * 2), frozenset()).flops == 2 * 8**3


HLO = """\
HloModule jit_f

%region_add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,4] get-tuple-element(%p), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %g = bf16[64,4]{1,0} all-gather(%x), channel_id=1, replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
  %r = bf16[8,4]{1,0} all-reduce(%x), channel_id=2, replica_groups=[2,8]<=[16], to_apply=%region_add
  ROOT %t = (s32[], bf16[8,4]) tuple(%next, %x)
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %p = (s32[], bf16[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(12)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,4]) tuple(%zero, %x)
  %loop = (s32[], bf16[8,4]) while(%start), condition=%condition, body=%body
  %s = f32[2,4]{1,0} reduce-scatter(%x), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %c = (f32[2,4], f32[2,4], u32[]) collective-permute-start(%s), channel_id=4, source_target_pairs={{0,1}}
  %again = (f32[2,4], f32[2,4], u32[]) collective-permute-start(%s), channel_id=4, source_target_pairs={{0,1}}
  ROOT %out = bf16[8,4] get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(("step", "turns"), [(1, 12), (2, 6), (5, 3)])
def test_bytes_by_hand(step, turns):
    sent = collectives_of(HLO.replace("STEP", str(step)), 16)
    assert sent.bytes == {
        "all-gather": pytest.approx(turns * 7 / 8 * 64 * 4 * 2),
        "all-reduce": pytest.approx(turns * 2 * 7 / 8 * 8 * 4 * 2),
        "reduce-scatter": pytest.approx(3 * 2 * 4 * 4),
        "collective-permute": pytest.approx(2 * 4 * 4),
    }
    assert sent.largest["all-gather"] == 64 * 4 * 2


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives_of("nothing", 2)
