import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.parallel import MeshConfig, make_mesh
from slm_jax.plan.collectives import Collective, read_collectives

# What libtpu writes, shortened: a loop of three in which an all-gather is started, gone on with
# and ended in fusions, and one reduce-scatter of two arrays; outside, one collective of each form.
TEXT = """HloModule jit_step, is_scheduled=true

%start (p.0: bf16[32,512]) -> (bf16[128,512], u32[]) {
  %p.0 = bf16[32,512]{1,0:T(8,128)(2,1)} parameter(0)
  %g.0 = bf16[128,512]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=37, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  ROOT %c.0 = (bf16[128,512]{1,0}, u32[]) custom-call(%g.0), custom_call_target="Start"
}

%going_on (p.1: bf16[32,512]) -> bf16[128,512] {
  %p.1 = bf16[32,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.1 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=37, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
}

%all-reduce-scatter.5 (a: bf16[128,512], b: bf16[512,128]) -> (bf16[32,512], bf16[512,32]) {
  %a = bf16[128,512]{1,0} parameter(0)
  %b = bf16[512,128]{1,0} parameter(1)
  %r.0 = (bf16[128,512]{1,0:T(8,128)(2,1)}, /*index=1*/bf16[512,128]{0,1}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (bf16[32,512]{1,0}, bf16[512,32]{1,0}) tuple(%r.0)
}

%body (s: (s32[], bf16[32,512])) -> (s32[], bf16[32,512]) {
  %s = (s32[], bf16[32,512]{1,0}) parameter(0)
  %async-collective-start = (bf16[128,512]{1,0}, u32[]) fusion(%s), kind=kCustom, calls=%start
  %fusion.1 = bf16[128,512]{1,0} fusion(%s), kind=kOutput, calls=%going_on
  ROOT %fusion.2 = (bf16[32,512]{1,0}, bf16[512,32]{1,0}) fusion(%s), kind=kCustom, calls=%all-reduce-scatter.5
}

%condition (s.1: (s32[], bf16[32,512])) -> pred[] {
  %s.1 = (s32[], bf16[32,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s.1), index=0
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%called_computation.1 (p.2: f32[16,257]) -> f32[128,257] {
  %p.2 = f32[16,257]{1,0:T(8,128)} parameter(0)
  ROOT %g.2 = f32[128,257]{1,0:T(8,128)} all-gather(%p.2), channel_id=1, replica_groups=mesh['data'=1,'fsdp'=16] {'fsdp'}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[32,512]) -> f32[] {
  %x = bf16[32,512]{1,0} parameter(0)
  %while.1 = (s32[], bf16[32,512]{1,0}) while(%x), condition=%condition, body=%body
  %ar = f32[100]{0} all-reduce(%x), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add
  %ag = (s8[10]{0}, s8[80]{0}) all-gather-start(%x), channel_id=10, replica_groups={}, dimensions={0}
  %rs = f32[5]{0} reduce-scatter(%x), channel_id=11, replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %aa = (s4[64]{0}, pred[32]{0}) all-to-all(%x, %x), replica_groups={{0,1,2,3,4,5,6,7}}
  %cp = (f32[6]{0}, f32[6]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %done = f32[6]{0} collective-permute-done(%cp)
  %hand.1 = f32[3]{0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  %hand.2 = f32[3]{0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  %part.1 = f32[2]{0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, frontend_attributes={chain_id="4"}
  %part.2 = f32[2]{0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, frontend_attributes={chain_id="4"}
  %g.call-start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%called_computation.1
  %send = (f32[64,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%x, %x), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%x), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %z = f32[] constant(0)
}
"""  # noqa: E501


def test_every_form_that_the_compiler_writes() -> None:
    found = {(c.kind, c.group): c for c in read_collectives(TEXT, 8)}
    gathered = 128 * 512 * 2
    assert found == {
        ("all-gather", 4): Collective("all-gather", 3, 3 * gathered, 3 * gathered * 3 / 4, 4),
        ("reduce-scatter", 4): Collective(
            "reduce-scatter", 3, 6 * gathered, 6 * gathered * 3 / 4, 4
        ),
        ("all-reduce", 8): Collective("all-reduce", 1, 400, 2 * 400 * 7 / 8, 8),
        ("all-gather", 8): Collective("all-gather", 1, 80, 70, 8),
        ("reduce-scatter", 2): Collective("reduce-scatter", 1, 40, 20, 2),
        ("all-to-all", 8): Collective("all-to-all", 1, 64, 56, 8),
        # By hand: two that share a channel, and one in two pieces.
        ("reduce-scatter", 8): Collective("reduce-scatter", 2, 2 * 96, 2 * 84, 8),
        ("all-gather", 2): Collective("all-gather", 1, 8, 4, 2),
        ("collective-permute", 2): Collective("collective-permute", 1, 24, 24, 2),
        # By a sparse core, as tpu7x does all of them.
        ("all-gather", 16): Collective("all-gather", 1, 4 * 128 * 257, 4 * 128 * 257 * 15 / 16, 16),
        # Between four slices.
        ("all-reduce of slices", 4): Collective(
            "all-reduce of slices", 1, 2**18, 2 * 2**18 * 3 / 4, 4
        ),
    }
    assert [c.kind for c in found.values() if c.leaves_slice] == ["all-reduce of slices"]


def test_a_collective_in_a_loop_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="no trip count"):
        read_collectives(TEXT.replace("constant(3)", "parameter(1)"), 8)


def test_a_known_all_reduce_in_a_scan() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))

    def step(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        return total + jnp.sum(row * total, axis=0), None

    def program(x: jax.Array) -> jax.Array:
        return jax.lax.scan(step, jnp.ones(16), x)[0]

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(
            (5, 8, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
        )
        hlo = jax.jit(program).lower(x).compile().as_text()
    assert read_collectives(hlo, 8) == [Collective("all-reduce", 5, 5 * 64, 5 * 2 * 64 * 3 / 4, 4)]
