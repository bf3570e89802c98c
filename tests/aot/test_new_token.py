"""What one new token reads: from the text of a compiled loop, and by arithmetic."""

import dataclasses

import jax
import pytest

from medplib_jax.aot.new_token import needed_bytes, per_token
from medplib_jax.aot.programs import make_program
from medplib_jax.aot.table import markdown
from medplib_jax.aot.usage import read_usage
from medplib_jax.config.experiment import EvalConfig, MeshConfig
from medplib_jax.parallel.mesh import make_mesh
from tests.helpers import MODEL, tiny_experiment

LOOP = """HloModule jit_answer, is_scheduled=true

%goes_on (state.1: (pred[], bf16[16,64])) -> pred[] {
  %state.1 = (pred[], bf16[16,64]{1,0}) parameter(0)
  ROOT %active = pred[] get-tuple-element(%state.1), index=0
}

%advance (state: (pred[], bf16[16,64])) -> (pred[], bf16[16,64]) {
  %state = (pred[], bf16[16,64]{1,0:S(1)}) parameter(0)
  %more = pred[] get-tuple-element(%state), index=0
  %cache = bf16[16,64]{1,0} get-tuple-element(%state), index=1
  %new = bf16[16,64]{1,0:S(1)} negate(%cache)
  ROOT %next = (pred[], bf16[16,64]{1,0}) tuple(%more, %new)
}

ENTRY %main (start: pred[], prompt: bf16[16,64]) -> bf16[16,64] {
  %start = pred[] parameter(0)
  %prompt = bf16[16,64]{1,0} parameter(1)
  %seen = bf16[16,64]{1,0} add(%prompt, %prompt)
  %first = (pred[], bf16[16,64]{1,0}) tuple(%start, %seen)
  %loop = (pred[], bf16[16,64]{1,0}) while(%first), condition=%goes_on, body=%advance
  ROOT %last = bf16[16,64]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_tokens_and_the_prompt_are_told_apart():
    usage = read_usage(LOOP, lambda name, operands: 0.0, loop_trips=7)
    found, array = per_token(LOOP, usage, 7, needed=1000.0), 16 * 64 * 2
    assert found["hbm_gb"] * 1e9 == pytest.approx(array) and found["hbm_over_needed"] == pytest.approx(2.048)
    assert found["hbm_gb_outside_the_loop"] * 1e9 == pytest.approx(3 * array)


@pytest.mark.parametrize(("rows", "experts"), [(1, 1), (4, 2)])
@pytest.mark.parametrize(("quantize", "weight", "entry"), [("", 2, 2), ("int8", 1, 2)])
def test_a_token_needs_its_experts_and_the_filled_cache(rows, experts, quantize, weight, entry):
    llm = dataclasses.replace(MODEL.llm, num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, mlp_dim=96)
    model = dataclasses.replace(MODEL, llm=llm, dtype="bfloat16")
    config = tiny_experiment(model=model, mesh=MeshConfig(), eval=EvalConfig(max_new_tokens=8))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    program = make_program("decode", config, mesh, rows, 64, quantize)
    found = needed_bytes(config, program.args[0], mesh, rows, 64, quantize)
    attention, expert = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96
    kernels = 2 * (attention + experts * expert) + 64 * llm.vocab_size
    narrow = 2 * (attention + experts * expert)
    cache = 2 * 2 * rows * 2 * 16 * (64 - 4) * entry
    least = (kernels * 2 if not quantize else narrow * weight) + cache
    assert least < found < least * 1.3  # norms, router, scales; the head, where it is narrow


def test_generation_has_a_table_of_its_own():
    common = {"topology": "v5e:2x4", "mesh": {"data": 1, "tensor": 8}, "rows": 8, "length": 64, "accumulate": 1}
    common |= {"fits": True, "peak_hbm_gb_per_chip": 4.0, "hbm_gb_per_chip": 16.0, "spare_share": 0.75}
    common |= {"roofline_seconds": {"compute": 0.1, "hbm": 0.2, "ici": 0.05}, "hbm_traffic_gb_per_chip": 200.0}
    train = common | {"program": "train", "remat": "products", "executed_over_model": 1.05}
    train |= {"tokens_per_second_per_chip": 320.0, "mfu_at_roofline": 0.48}
    token = {"hbm_gb": 2.0, "needed_gb": 1.6, "hbm_over_needed": 1.25, "hbm_gb_outside_the_loop": 72.0}
    decode = common | {"program": "decode", "quantize": "int8", "per_token": token}
    lacking = common | {"program": "decode", "quantize": "", "fits": False, "peak_hbm_gb_per_chip": None}
    first, second = markdown({"IV on x": train, "answers on x": decode, "long on x": lacking}).split("\n\n")
    assert first.splitlines()[2].endswith("| products | 4.0 of 16.0 | 75% | 1.05 | 0.10 | 0.20 | 0.05 | 320 | 48% |")
    answers, long = second.splitlines()[2:]
    assert answers.endswith("| 8 x 64 | int8 | 4.0 of 16.0 | 75% | 2.00 | 1.60 | 1.25 | 2.0 | 72 |")
    lacking = decode | {"per_token": token | {"hbm_over_needed": 0.83}}  # less than it needs cannot be all of it
    assert "| 0.83 (not all counted) |" in markdown({"generation on v5e:2x4": lacking})
    assert "| ? of 16.0 | does not fit |" in long and long.count("|") == answers.count("|")
