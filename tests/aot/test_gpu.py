"""Programs for NVIDIA GPUs that nobody here has: what is read from their text, and a small model compiled for them."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from medplib_jax.aot import topologies
from medplib_jax.aot.flops import executed_kernel_flops
from medplib_jax.aot.report import Request, as_text, examine
from medplib_jax.aot.usage import read_usage
from medplib_jax.benchmarks import grouped
from medplib_jax.config.experiment import MeshConfig
from medplib_jax.models.kernels.grouped_matmul import WAYS, grouped_matmul, obstacle
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train import flops
from tests.aot.test_report import config

needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(plugin) for plugin in topologies.CUDA_PLUGINS),
    reason="JAX's CUDA plugin (the extra gpu) is not installed",
)

# Two trips of a product with gathered weights, whose gradient is scattered; attention, a kernel of ours and
# convolutions outside.
MODULE = r"""HloModule jit_f, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%fused_compare (p0: s32[], p1: s32[]) -> pred[] {
  %p0 = s32[] parameter(0)
  %bound = s32[] constant(3)
  %lt = pred[] compare(%p0, %bound), direction=LT
  %p1 = s32[] parameter(1)
  %row = s32[1]{0} bitcast(%p1)
  %end = s32[1]{0} constant({9})
  %going = pred[1]{0} compare(%row, %end), direction=NE
  %other = pred[] bitcast(%going)
  ROOT %and = pred[] and(%lt, %other)
}

%condition (state.1: (s32[], bf16[16,64], bf16[8,32])) -> pred[] {
  %state.1 = (s32[], bf16[16,64]{1,0}, bf16[8,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state.1), index=0
  ROOT %loop_and_fusion = pred[] fusion(%i, %i), kind=kLoop, calls=%fused_compare
}

%body (state: (s32[], bf16[16,64], bf16[8,32])) -> (s32[], bf16[16,64], bf16[8,32]) {
  %state = (s32[], bf16[16,64]{1,0}, bf16[8,32]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%state), index=1
  %w = bf16[8,32]{1,0} get-tuple-element(%state), index=2
  %gather = (bf16[8,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%w), channel_id=2, replica_groups=mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %whole = bf16[64,32]{1,0} all-gather-done(%gather)
  %product = (bf16[16,32]{1,0}, s8[33554432]{0}) custom-call(%x, %whole), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %y = bf16[16,32]{1,0} get-tuple-element(%product), index=0
  %scatter = ((bf16[16,32]{1,0}), bf16[2,32]{1,0}) reduce-scatter-start(%y), channel_id=5, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, dimensions={0}, to_apply=%add
  %part = bf16[2,32]{1,0} reduce-scatter-done(%scatter)
  ROOT %next = (s32[], bf16[16,64]{1,0}, bf16[8,32]{1,0}) tuple(%i.1, %x, %w)
}

ENTRY %main (q: bf16[2,640,4,128], k: bf16[2,640,2,128], x.1: bf16[16,64], w.1: bf16[8,32], image: bf16[2,8,8,4], filter: bf16[5,3,3,4]) -> bf16[16,64] {
  %q = bf16[2,640,4,128]{3,2,1,0} parameter(0)
  %k = bf16[2,640,2,128]{3,2,1,0} parameter(1)
  %x.1 = bf16[16,64]{1,0} parameter(2)
  %w.1 = bf16[8,32]{1,0} parameter(3)
  %image = bf16[2,8,8,4]{3,2,1,0} parameter(4)
  %filter = bf16[5,3,3,4]{3,2,1,0} parameter(5)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[16,64]{1,0}, bf16[8,32]{1,0}) tuple(%zero, %x.1, %w.1)
  %loop = (s32[], bf16[16,64]{1,0}, bf16[8,32]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"},"known_init_step":{"init":"0","step":"1"}}
  %fwd = (bf16[2,4,640,128]{3,1,2,0}, f32[2,4,640]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"mask_type": "CAUSAL"}}
  %o = bf16[2,4,640,128]{3,1,2,0} get-tuple-element(%fwd), index=0
  %residual = f32[2,4,640]{2,1,0} get-tuple-element(%fwd), index=1
  %bwd = (bf16[2,4,640,128]{3,1,2,0}, bf16[2,2,640,128]{3,1,2,0}, bf16[2,2,640,128]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k, %residual, %q, /*index=5*/%q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"mask_type": "CAUSAL"}}
  %pallas_call.2 = bf16[16,64]{1,0} custom-call(%x.1), custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 8 : i32, ir = "ML\EFR\0Dname = \22no\22 calls=%body (", name = "scale_rows", num_stages = 3 : i32}
  %conv = (bf16[2,8,8,5]{3,2,1,0}, u8[4096]{0}) custom-call(%image, %filter), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %out = bf16[2,8,8,5]{3,2,1,0} get-tuple-element(%conv), index=0
  %dimage = (bf16[2,8,8,4]{3,2,1,0}, u8[4096]{0}) custom-call(%out, %filter), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %dfilter = (bf16[5,3,3,4]{3,2,1,0}, u8[4096]{0}) custom-call(%image, %out), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %y.1 = bf16[16,64]{1,0} get-tuple-element(%loop), index=1
}
"""


def kernel_flops(name, operands):
    return 7.0 if name == "scale_rows" else executed_kernel_flops(name, operands)


@pytest.fixture(scope="module")
def usage():
    return read_usage(MODULE, kernel_flops)


def test_products_of_cublas_and_cudnn(usage):
    product, scores, convolution = 2 * 16 * 64 * 32, 2 * 2 * 4 * 640 * 640 * 128, 2 * 2 * 4 * 5 * 22 * 22
    tiles = 5 * 6 / 2 / 5**2  # of 128 x 128 scores that hold one a query may see
    assert usage.kernels == {
        "cublas$lt$matmul": (2, 2 * product),
        "cudnn$fmhaSoftmax": (1, pytest.approx(2 * scores * tiles)),
        "cudnn$fmhaSoftmaxBackward": (1, pytest.approx(5 * scores * tiles)),
        "cudnn$convForward": (1, convolution),
        "cudnn$convBackwardInput": (1, convolution),
        "cudnn$convBackwardFilter": (1, convolution),
        "scale_rows": (1, 7),
    }
    assert usage.flops == pytest.approx(sum(flops for _, flops in usage.kernels.values()))


def test_a_condition_inside_a_fusion_bounds_a_loop():
    unsaid = MODULE.replace("known_trip_count", "unknown")
    assert read_usage(unsaid, kernel_flops).kernels["cublas$lt$matmul"][0] == 3


def test_asynchronous_collectives(usage):
    gather, scatter = sorted(usage.collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.count, gather.group, gather.bytes) == ("all-gather", 2, 8, 2 * 56 * 32 * 2)
    assert (scatter.kind, scatter.count, scatter.group, scatter.bytes) == (
        "reduce-scatter",
        2,
        8,
        2 * 16 * 32 * 2 * 7 / 8,
    )


def test_traffic_counts_neither_workspaces_nor_what_a_collective_names_twice(usage):
    gather, product, scatter = 8 * 32 + 64 * 32, 16 * 64 + 64 * 32 + 16 * 32, 16 * 32 + 2 * 32
    q, k, image, out, kernel = 2 * 640 * 4 * 128, 2 * 640 * 2 * 128, 2 * 64 * 4, 2 * 64 * 5, 5 * 9 * 4
    sums = 2 * 2 * 640 * 4  # float32, counted in bfloat16's size
    attention = (q + 2 * k + q + sums) + (3 * q + 2 * k + sums + q + 2 * k)
    assert usage.hbm_bytes == 2 * (
        2 * (gather + product + scatter) + attention + 2 * 16 * 64 + 3 * (image + out + kernel)
    )


def test_what_is_missing_or_misspelt_is_said(monkeypatch):
    nodes = "a node has 1 to 8 GPUs"
    for misspelt, message in (
        ("b200:8", "GPUs: a100, h100, h200"),
        ("h200", "nor KIND:NUMBER"),
        ("h200:16", nodes),
        ("h100:2x4", nodes),
    ):
        with pytest.raises(ValueError, match=message):
            topologies.devices_of(misspelt)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install -e '.\\[gpu\\]'"):
        topologies.devices_of("h200:1")


@needs_cuda
@pytest.mark.parametrize("kind", flops.GPUS)
def test_nodes_of_every_kind(kind):
    devices = topologies.devices_of(f"{kind}:4", slices=2)
    assert (
        len(devices) == 8
        and {device.platform for device in devices} == {"gpu"}
        and kind.upper() in devices[0].device_kind
    )
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, dcn_data=2), devices)
    assert [{device.process_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]


@needs_cuda
def test_a_training_step_for_two_gpus():
    report = examine(Request(config(), "h100:2", "train", rows=8, length=128))
    assert report["fits"] and report["mesh"] == {"data": 1, "fsdp": 2, "expert": 1, "tensor": 1}
    assert 0 < report["argument_gb_per_chip"] <= report["peak_hbm_gb_per_chip"] < report["hbm_gb_per_chip"]
    assert {"cublas$lt$matmul", "cudnn$fmhaSoftmax", "cudnn$fmhaSoftmaxBackward", "gmm_triton"} <= report[
        "kernels"
    ].keys()
    assert report["collectives"]["all-gather"]["count"] >= 2  # the compiler joins a layer's
    assert report["full_rematerialisations"] == []
    assert "kernels             calls" in as_text(json.loads(json.dumps(report)))


@needs_cuda
@pytest.mark.parametrize(
    ("kind", "dtype", "ways"),
    [
        ("a100", "int8", {"triton", "blocks", "xla"}),
        ("h100", "int8", {"triton", "blocks", "xla"}),
        ("h100", "bfloat16", {"triton", "mosaic", "blocks", "xla"}),
        ("h200", "bfloat16", {"triton", "mosaic", "blocks", "xla"}),
    ],
)
def test_grouped_products_compile(kind, dtype, ways):
    """Every way that there is for a GPU, and its gradients; what its kernels do is counted."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), topologies.devices_of(f"{kind}:1"))
    shapes = ((512, 256), dtype), ((2, 256, 512), dtype), ((512, 512), dtype), ((2,), "int32")
    placed = NamedSharding(mesh, PartitionSpec())
    x, w, dy, sizes = (jax.ShapeDtypeStruct(shape, dtype, sharding=placed) for shape, dtype in shapes)
    assert {way for way in WAYS["gpu"] if not obstacle(way, x, w)} == ways
    for way in sorted(ways):
        product, gradients = grouped.programs(way)
        programs = [product.lower(x, w, sizes)] + ([gradients.lower(x, w, dy, sizes)] if dtype == "bfloat16" else [])
        usage = [
            read_usage(program.compile(topologies.COMPILER_OPTIONS["gpu"]).as_text(), executed_kernel_flops)
            for program in programs
        ]
        if way in ("triton", "mosaic"):
            kernels = [set(found.kernels) for found in usage]
            products = {"triton": ("gmm_triton", "tgmm_triton"), "mosaic": ("mosaic_gmm", "mosaic_tgmm")}[way]
            assert kernels == [{products[0]}, set(products)][: len(programs)]
            assert all(found.flops >= 2 * 512 * 256 * 512 for found in usage)


@needs_cuda
def test_jaxs_kernels_on_two_gpus_with_gathered_and_frozen_matrices():
    """What a JAX without Triton gets on Hopper, as a mixture calls it."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), topologies.devices_of("h200:2"))
    rows, columns = PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")

    def local(x, w):
        w = jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)
        return grouped_matmul(x, w, jnp.array([100, 300]), False, "mosaic")

    run = jax.shard_map(local, mesh=mesh, in_specs=(rows, columns), out_specs=rows, check_vma=False)
    x, w = (
        jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, spec))
        for shape, spec in (((1024, 256), rows), ((2, 256, 512), columns))
    )
    for wanted, kernels in (((0, 1), {"mosaic_gmm", "mosaic_tgmm"}), ((0,), {"mosaic_gmm"})):
        program = jax.jit(jax.grad(lambda x, w: jnp.square(run(x, w).astype(jnp.float32)).sum(), wanted)).lower(x, w)
        text = program.compile(topologies.COMPILER_OPTIONS["gpu"]).as_text()
        assert set(read_usage(text, executed_kernel_flops).kernels) == kernels


@needs_cuda
def test_what_does_not_fit_is_said(monkeypatch):
    small = dataclasses.replace(flops.GPUS["h100"], hbm_bytes=2**20)
    monkeypatch.setattr("medplib_jax.aot.report.chip_of", lambda topology: small)
    report = examine(Request(config(), "h100:1", "eval", rows=1, length=128))
    assert not report["fits"] and report["peak_hbm_gb_per_chip"] > 0.001
    assert as_text(report).splitlines()[2].startswith("DOES NOT FIT: needs ")
