"""What is read from the text of a compiled program."""

import pytest

from medplib_jax.aot.usage import read_usage

MODULE = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%product (p0: bf16[5,64,32], p1: s32[], p2: bf16[16,64]) -> bf16[16,32] {
  %p0 = bf16[5,64,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %p2 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %slice = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,64,32}
  %w = bf16[64,32]{1,0:T(8,128)(2,1)} bitcast(%slice)
  ROOT %y = bf16[16,32]{1,0:T(8,128)(2,1)} convolution(%p2, %w), dim_labels=bf_io->bf
}

%condition (state.1: (s32[], bf16[16,64], bf16[5,64,32])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %other = s32[]{:T(128)} constant(512)
  %i = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (state: (s32[], bf16[16,64], bf16[5,64,32])) -> (s32[], bf16[16,64], bf16[5,64,32]) {
  %state = (s32[]{:T(128)}, bf16[16,64]{1,0:S(1)}, /*index=2*/bf16[5,64,32]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %ws = bf16[5,64,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %half = bf16[16,32]{1,0:T(8,128)(2,1)} fusion(%ws, %i.1, %x), kind=kOutput, calls=%product
  %whole = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%half), channel_id=1, replica_groups=mesh['data'=4,'fsdp'=2] {'fsdp'}, dimensions={1}, metadata={op_name="jit(f)/while/body/dot_general"}
  ROOT %next = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) tuple(%i.1, %whole, %ws)
}

ENTRY %main (q: bf16[2,256,128], ws.1: bf16[5,64,32], x.1: bf16[16,64]) -> bf16[16,64] {
  %q = bf16[2,256,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %ws.1 = bf16[5,64,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  %x.1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) tuple(%zero, %x.1, %ws.1)
  %loop = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[5,64,32]{2,1,0}) while(%start), condition=%condition, body=%body
  %splash_mha_fwd.3 = bf16[2,256,128]{2,1,0:T(8,128)(2,1)} custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"
  %y.1 = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  ROOT %reduced = bf16[16,64]{1,0:T(8,128)(2,1)} all-reduce(%y.1), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


@pytest.fixture(scope="module")
def usage():
    return read_usage(MODULE, lambda name, operands: float(operands[0].size))


def test_products_count_as_often_as_their_loop_runs(usage):
    assert usage.flops == 5 * 2 * 16 * 64 * 32 + 2 * 256 * 128
    assert usage.kernels == {"splash_mha_fwd": (1.0, 2 * 256 * 128)}


def test_products_of_8_bit_integers_are_counted_apart(usage):
    """One whose factors are both of 8 bits; weights alone are widened before the product."""
    assert usage.integer_flops == 0
    one = MODULE.replace("%w = bf16[64,32]", "%w = s8[64,32]")
    both = one.replace("%p2 = bf16[16,64]", "%p2 = s8[16,64]")
    found = [read_usage(text, lambda name, operands: float(operands[0].size)) for text in (one, both)]
    assert [usage.integer_flops for usage in found] == [0, 5 * 2 * 16 * 64 * 32]
    assert {one.flops for one in found} == {usage.flops}


def test_collectives_count_what_a_chip_receives(usage):
    gather, reduce = sorted(usage.collectives, key=lambda c: c.kind)
    half = 16 * 32 * 2
    assert (gather.kind, gather.count, gather.group, gather.in_loop, gather.bytes) == (
        "all-gather",
        5,
        2,
        True,
        5 * half,
    )
    assert gather.source == "jit(f)/while/body/dot_general" and gather.output.dims == (16, 64)
    assert (reduce.kind, reduce.count, reduce.group, reduce.in_loop) == ("all-reduce", 1, 4, False)
    assert reduce.bytes == 2 * 16 * 64 * 2 * 3 / 4


def test_traffic_counts_slices_and_leaves_out_what_stays_on_the_chip(usage):
    half, slice_, whole = 16 * 32 * 2, 64 * 32 * 2, 16 * 64 * 2
    scalar = 4  # the slice's index is an operand too
    loop = 5 * (
        (slice_ + scalar + half) + half
    )  # the product; the gather reads its input, its output stays on the chip
    kernel, reduce = 4 * 2 * 256 * 128 * 2, 2 * whole
    assert usage.hbm_bytes == loop + kernel + reduce


@pytest.mark.parametrize(
    ("attributes", "lhs", "rhs", "out", "products"),
    [
        ("dim_labels=bf_io->bf", (8, 16), (16, 32), (8, 32), 8 * 16 * 32),
        ("dim_labels=fb_io->bf", (16, 8), (16, 32), (8, 32), 8 * 16 * 32),
        (
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            (2, 8, 8, 4),
            (3, 3, 4, 5),
            (2, 8, 8, 5),
            2 * 4 * 5 * 22 * 22,
        ),
        # a batched product: the batch is a spatial axis with holes, of which every output position meets one
        (
            "window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
            (6, 8, 16),
            (6, 16, 32),
            (6, 8, 32),
            6 * 8 * 16 * 32,
        ),
    ],
)
def test_convolutions(attributes, lhs, rhs, out, products):
    def text(dims):
        return f"bf16[{','.join(map(str, dims))}]"

    module = f"""ENTRY %main (a: {text(lhs)}, b: {text(rhs)}) -> {text(out)} {{
  %a = {text(lhs)} parameter(0)
  %b = {text(rhs)} parameter(1)
  ROOT %y = {text(out)} convolution(%a, %b), {attributes}
}}
"""
    assert read_usage(module, lambda *_: 0.0).flops == 2 * products


def test_a_loop_without_a_bound_runs_as_often_as_it_is_said_to():
    unbounded = MODULE.replace("constant(5)", "constant(0)")
    kernels = 2 * 256 * 128
    assert (
        read_usage(unbounded, lambda name, operands: float(operands[0].size), loop_trips=7).flops
        == 7 * 2 * 16 * 64 * 32 + kernels
    )


def test_one_branch_of_a_conditional_runs():
    calls = (
        'custom-call(%q, %q, %q), custom_call_target="tpu_custom_call"',
        "conditional(%which, %q, %q), branch_computations={%scaled, %same}",
        "conditional(%which, %q, %q), true_computation=%scaled, false_computation=%same",
    )
    branches = """%scaled (p.1: bf16[2,256,128]) -> bf16[2,256,128] {
  %p.1 = bf16[2,256,128]{2,1,0} parameter(0)
  ROOT %scale.1 = bf16[2,256,128]{2,1,0} custom-call(%p.1), custom_call_target="tpu_custom_call"
}

%same (p.2: bf16[2,256,128]) -> bf16[2,256,128] {
  ROOT %p.2 = bf16[2,256,128]{2,1,0} parameter(0)
}

"""
    module = MODULE.replace("ENTRY", branches + "ENTRY").replace("%zero =", "%which = pred[] constant(true)\n  %zero =")
    for conditional in calls[1:]:
        kernels = read_usage(module.replace(calls[0], conditional), lambda name, operands: 6.0).kernels
        assert kernels == {"scale": (0.5, 3.0)}


def test_what_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read_usage("func.func @main", lambda *_: 0.0)


def test_traffic_says_what_moves_it(usage):
    moved = {(one.kind, one.source): (one.bytes, one.times) for one in usage.traffic}
    assert moved == {
        ("products", ""): (5 * ((64 * 32 + 16 * 32) * 2 + 4), 5),  # a slice of the weights, the result, a counter
        ("kernels", ""): (4 * 2 * 256 * 128 * 2, 1),
        ("collectives", "jit(f)/while/body/dot_general"): (5 * 16 * 32 * 2, 5),  # its result stays on the chip
        ("collectives", ""): (2 * 16 * 64 * 2, 1),
    }
    assert usage.hbm_bytes == sum(size for size, _ in moved.values())


NESTED = """HloModule jit_g, is_scheduled=true

%one_layer (a: bf16[5,64,32], i: s32[]) -> bf16[64,32] {
  %a = bf16[5,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = bf16[1,64,32]{2,1,0} dynamic-slice(%a, %i, %i, %i), dynamic_slice_sizes={1,64,32}
  ROOT %layer = bf16[64,32]{1,0} bitcast(%row)
}

%put (stack: bf16[5,16,32], y: bf16[1,16,32], j: s32[]) -> bf16[5,16,32] {
  %j = s32[] parameter(2)
  %stack = bf16[5,16,32]{2,1,0} parameter(0)
  %y = bf16[1,16,32]{2,1,0} parameter(1)
  ROOT %new = bf16[5,16,32]{2,1,0} dynamic-update-slice(%stack, %y, %j, %j, %j)
}

%product (p0: bf16[5,64,32], p1: s32[], p2: bf16[16,64], p3: bf16[5,16,32]) -> bf16[5,16,32] {
  %p0 = bf16[5,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[16,64]{1,0} parameter(2)
  %p3 = bf16[5,16,32]{2,1,0} parameter(3)
  %w = bf16[64,32]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%one_layer
  %x = bf16[16,32]{1,0} convolution(%p2, %w), dim_labels=bf_io->bf
  %row.1 = bf16[1,16,32]{2,1,0} bitcast(%x)
  ROOT %kept = bf16[5,16,32]{2,1,0} fusion(%p3, %row.1, %p1), kind=kLoop, calls=%put
}

ENTRY %main (ws: bf16[5,64,32], n: s32[], x.1: bf16[16,64], saved: bf16[5,16,32]) -> bf16[5,16,32] {
  %ws = bf16[5,64,32]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x.1 = bf16[16,64]{1,0} parameter(2)
  %saved = bf16[5,16,32]{2,1,0} parameter(3)
  %begun = (bf16[16,64]{1,0:S(1)}, bf16[16,64]{1,0}, u32[]{:S(2)}) copy-start(%x.1)
  %near = bf16[16,64]{1,0:S(1)} copy-done(%begun)
  ROOT %z = bf16[5,16,32]{2,1,0} fusion(%ws, %n, %near, %saved), kind=kOutput, calls=%product
}
"""


def test_slices_within_fusions_within_fusions_are_slices():
    moved = {one.kind: one.bytes for one in read_usage(NESTED, lambda name, operands: 0.0).traffic}
    layer, kept, counter, x = 64 * 32 * 2, 16 * 32 * 2, 4, 16 * 64 * 2
    assert moved == {"products": layer + kept + counter + x, "moves": x}  # a copy into the chip's memory is read once


# As the loop over tokens has them: a kernel of another layout, and a down projection that computes its rows first.
RENAMED = """HloModule jit_r, is_scheduled=true

%as_it_is (b: bf16[64,32]) -> bf16[64,32] {
  %b = bf16[64,32]{1,0} parameter(0)
  ROOT %same = bf16[64,32]{1,0} bitcast(%b)
}

%one (c: bf16[5,64,32]) -> bf16[5,64,32] {
  ROOT %c = bf16[5,64,32]{2,1,0} parameter(0)
}

%product (p0: bf16[64,32], p1: bf16[16,64], p2: bf16[5,64,32], p3: s32[]) -> bf16[16,32] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[16,64]{1,0:S(1)} parameter(1)
  %p2 = bf16[5,64,32]{2,1,0} parameter(2)
  %p3 = s32[] parameter(3)
  %w = bf16[64,32]{1,0} fusion(%p0), kind=kLoop, calls=%as_it_is
  %x = bf16[16,32]{1,0} convolution(%p1, %w), dim_labels=bf_io->bf
  %stack = bf16[5,64,32]{2,1,0} fusion(%p2), kind=kLoop, calls=%one
  %v = bf16[1,64,32]{2,1,0} dynamic-slice(%stack, %p3, %p3, %p3), dynamic_slice_sizes={1,64,32}
  %v.1 = bf16[64,32]{1,0} bitcast(%v)
  %y = bf16[16,32]{1,0} convolution(%p1, %v.1), dim_labels=bf_io->bf
  ROOT %sum = bf16[16,32]{1,0} add(%x, %y)
}

ENTRY %main (w.1: bf16[64,32], near: bf16[16,64], ws: bf16[5,64,32], n: s32[]) -> bf16[64,32] {
  %w.1 = bf16[64,32]{1,0} parameter(0)
  %near = bf16[16,64]{1,0:S(1)} parameter(1)
  %ws = bf16[5,64,32]{2,1,0} parameter(2)
  %n = s32[]{:S(2)} parameter(3)
  %z = bf16[16,32]{1,0:S(1)} fusion(%w.1, %near, %ws, %n), kind=kOutput, calls=%product
  ROOT %moved = bf16[64,32]{1,0:S(1)} fusion(%w.1), kind=kLoop, calls=%as_it_is
}
"""


def test_an_array_that_a_fusion_only_renames_is_read_by_what_takes_it():
    moved = [one.bytes for one in read_usage(RENAMED, lambda name, operands: 0.0).traffic]
    kernel, index = 64 * 32 * 2, 4
    assert moved == [2 * kernel + index, kernel]


PIECES = """HloModule jit_h, is_scheduled=true

%two (stack: bf16[5,16,32], y: bf16[1,16,32], j: s32[]) -> (bf16[5,16,32], bf16[5,16,32], bf16[1,16,32]) {
  %stack = bf16[5,16,32]{2,1,0} parameter(0)
  %y = bf16[1,16,32]{2,1,0:S(1)} parameter(1)
  %j = s32[] parameter(2)
  %zeros = bf16[5,16,32]{2,1,0} broadcast(%y), dimensions={0,1,2}
  %kept = bf16[5,16,32]{2,1,0} dynamic-update-slice(%stack, %y, %j, %j, %j)
  %made = bf16[5,16,32]{2,1,0} dynamic-update-slice(%zeros, %y, %j, %j, %j)
  %twice = bf16[1,16,32]{2,1,0} add(%y, %y)
  ROOT %all = (bf16[5,16,32]{2,1,0}, bf16[5,16,32]{2,1,0}, bf16[1,16,32]{2,1,0:S(1)}) tuple(%kept, %made, %twice)
}

ENTRY %main (saved: bf16[5,16,32], x: bf16[16,64], n: s32[]) -> bf16[5,16,32] {
  %saved = bf16[5,16,32]{2,1,0} parameter(0)
  %x = bf16[16,64]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %begun = ((bf16[16,64]{1,0}), bf16[4,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:64]}
  %near = bf16[4,64]{1,0:S(1)} slice-done(%begun)
  %row = bf16[1,16,32]{2,1,0:S(1)} dynamic-slice(%saved, %n, %n, %n), dynamic_slice_sizes={1,16,32}
  %f = (bf16[5,16,32]{2,1,0}, bf16[5,16,32]{2,1,0}, bf16[1,16,32]{2,1,0:S(1)}) fusion(%saved, %row, %n), kind=kLoop, calls=%two
  %g = bf16[5,16,32]{2,1,0} get-tuple-element(%f), index=0
  ROOT %z = bf16[5,16,32]{2,1,0} dynamic-update-slice(%g, %row, %n, %n, %n)
}
"""


def test_pieces_of_arrays_move_alone_and_only_where_they_leave_or_reach_hbm():
    moved = [one.bytes for one in read_usage(PIECES, lambda name, operands: 0.0).traffic]
    rows, layer, whole = 4 * 64 * 2, 16 * 32 * 2, 5 * 16 * 32 * 2
    assert moved == [rows, layer, layer + whole + 4, layer]  # an index; one result is updated, one is made anew


KERNELS = """HloModule jit_k, is_scheduled=true

ENTRY %main (g: s32[4], x: bf16[2048,11008], near: bf16[2048,11008], w: bf16[2,11008,4096]) -> bf16[2048,4096] {
  %g = s32[4]{0:S(1)} parameter(0)
  %x = bf16[2048,11008]{1,0} parameter(1)
  %near = bf16[2048,11008]{1,0:S(1)} parameter(2)
  %w = bf16[2,11008,4096]{2,1,0} parameter(3)
  %gmm.1 = bf16[2048,4096]{1,0:S(1)} custom-call(%g, %near, %w), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1","bytes_accessed":"287309824"}}}
  ROOT %gmm.2 = bf16[2048,4096]{1,0:S(1)} custom-call(%g, %x, %w), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"1","bytes_accessed":"287309824"}}}
}
"""


def test_a_grouped_product_reads_its_rows_for_every_block_of_columns():
    near, far = (one.bytes for one in read_usage(KERNELS, lambda name, operands: 0.0).traffic)
    weights, rows = 2 * 11008 * 4096 * 2, 2048 * 11008 * 2
    assert near == weights and far == weights + 2 * rows
