"""Numbers read from a compiled TPU program, against counts made another way."""

import dataclasses
import itertools
import math
import re

import pytest
from plan_case import small_case, small_run, stored

from zephyr_jax.chips import CHIPS
from zephyr_jax.config.run import MeshConfig, load_config
from zephyr_jax.planning import hlo
from zephyr_jax.planning.compiling import make_case, needed_gib, parse_topology
from zephyr_jax.planning.estimate import estimate, find_collectives, memory, warnings_of
from zephyr_jax.planning.plans import (
    sample_plan,
    sample_table,
    sampling_mesh,
    smaller,
    step_count,
    table,
)
from zephyr_jax.sharding import arrange_devices


def test_kernels_transfers_and_memory_of_a_step():
    case, done = small_case(), stored()
    plan, held = estimate(case, done), memory(case, done)
    kinds = {name: gib * 2**30 for name, gib in held["gib_by_kind"].items()}
    heads, length, width, layers = 6, 512, 128, 3
    product = 2 * length**2 / 2 * heads * width
    # forward, forward again under remat, keys and values, queries
    assert plan["flops"]["kernels"] == pytest.approx(16 * layers * product * (2 + 2 + 4 + 3))
    transfers = [one for one in plan["transfers"] if one["kind"] == "all-gather"]
    gathered = sum(one["bytes"] for one in transfers if one["axis"] == "fsdp")
    model = case.config.model
    matrices = layers * 256 * (2 * 6 * 128 + 2 * 2 * 128 + 3 * 640)
    # in bfloat16, forward and backward, in both micro-batches: all but the last product, which is
    # not needed again
    assert 3 * 2 * matrices < gathered < 2 * 2 * 2 * (matrices + 2 * model.vocab_size * 256) * 1.1
    state = (matrices + 2 * model.vocab_size * 256 + 7 * 256) * 4
    assert kinds["parameters"] == pytest.approx(state / 2, rel=0.01)
    assert kinds["moments"] == pytest.approx(state, rel=0.01)
    kept = layers * 2 * 512 * 256 * 2  # what goes into each layer, two rows a device, bfloat16
    assert kinds["kept for the backward pass"] == pytest.approx(kept)
    assert held["fits"]
    assert not plan["warnings"]
    assert plan["seconds"]["step"] >= plan["seconds"]["compute"] + plan["seconds"]["kernels"]


WINDOWED = """
%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(9)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

%body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %q = (s32[], f32[4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %there = s32[] constant(2)
  %two = s32[] copy(%there)
  %next = s32[] add(%two, %j)
  %x = f32[4] get-tuple-element(%q), index=1
  ROOT %out = (s32[], f32[4]) tuple(%next, %x)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
  %zero = s32[] constant(2)
  %start = s32[] copy(%zero)
  %t = (s32[], f32[4]) tuple(%start, %a)
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, metadata={op_name="a/loop"}
  ROOT %r = f32[4] get-tuple-element(%w), index=1
}
"""


def test_loops_that_step_by_a_copied_two():
    counts = hlo.count(hlo.parse(WINDOWED), {})
    assert counts.times["body"] == 4  # 2, 4, 6, 8
    assert not counts.unknown


def test_a_loop_that_ends_by_data_is_named_or_counted_by_the_callers_bound():
    program = hlo.parse(WINDOWED.replace("constant(9)", "get-tuple-element(%p), index=0"))
    assert [loop.origin for loop in hlo.count(program, {}).unknown] == ["a/loop"]
    assert hlo.count(program, {"a/lo": 7}).times["body"] == 7


SPARSE_CORES = """
%sum (p: f32[64]) -> f32[64] {
  %p = f32[64] parameter(0)
  ROOT %r = f32[64] all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}

%product (q: f32[64]) -> f32[64] {
  %q = f32[64] parameter(0)
  ROOT %c = f32[64] convolution(%q, %q), dim_labels=bf_io->bf
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64] parameter(0)
  %start = ((f32[64]), f32[64]) call-start(%a), async_execution_thread="sparsecore", to_apply=%sum
  %f = f32[64] fusion(%a), kind=kOutput, calls=%product
  ROOT %done = f32[64] call-done(%start)
}
"""


@pytest.mark.parametrize(("opcode", "hidden"), [("convolution", True), ("add", False)])
def test_a_transfer_of_the_sparse_cores_is_hidden_behind_a_product(opcode, hidden):
    """Forms of libtpu 0.0.42.1, of a program for v6e."""
    program = hlo.parse(SPARSE_CORES.replace("convolution", opcode))
    times = hlo.count(program, {}).times
    (one,) = find_collectives(program, times, {"data": 2, "fsdp": 1, "tensor": 1})
    assert (one.kind, one.times, one.hidden) == ("all-reduce", 1, hidden)


def transfers_of(body, times=1.0):
    """The collectives of a program of one computation, on a mesh of 2 x 2 x 2."""
    program = hlo.parse("ENTRY %main (x: bf16[16]) -> bf16[16] {\n" + body + "\n}\n")
    return find_collectives(program, {"main": times}, {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    ("attributes", "axis", "devices"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "data+fsdp", 4),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor", 2),
        ("replica_groups=[2,4]<=[2,2,2]T(2,0,1)", "data+fsdp", 4),
        ("replica_groups=[4,2]<=[8]", "tensor", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", "data", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", "fsdp+tensor", 4),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}", "fsdp", 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "data", 2),
        ("replica_groups={}", "data+fsdp+tensor", 8),
    ],
)
def test_the_axes_of_a_transfer(attributes, axis, devices):
    line = f"  ROOT %g = bf16[8,128] all-gather(%x), channel_id=3, {attributes}, dimensions={{0}}"
    (one,) = transfers_of(line, times=5.0)
    assert (one.axis, one.devices, one.total, one.hidden) == (axis, devices, 5 * 2048.0, False)


@pytest.mark.parametrize(
    ("width", "times", "warning"),
    [
        (2**22, 1.0, "a synchronous all-reduce over data (128 MiB, 1 times a step, of no named"),
        (2**20, 64.0, "synchronous all-reduces over data (2.0 GiB in 64 transfers a step)"),
        (2**20, 32.0, None),
    ],
)
def test_all_reduces_that_devices_wait_for_are_named(width, times, warning):
    groups = "replica_groups=mesh['a'=2,'b'=4] {'a'}"
    line = f"  ROOT %g = bf16[16,{width}] all-reduce(%x), channel_id=3, {groups}"
    warnings = warnings_of(stored()._replace(parts={}), transfers_of(line, times), [])
    assert [text.startswith(warning) for text in warnings] == [True] * (warning is not None)


def test_a_ring_is_one_transfer_and_a_group_of_one_is_none():
    pairs = "{{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}"
    (one,) = transfers_of(
        "  %s = (bf16[16], bf16[16], u32[]) collective-permute-start(%x), channel_id=1, "
        f"source_target_pairs={pairs}\n"
        "  ROOT %g = bf16[16] all-reduce(%x), channel_id=2, replica_groups=[8,1]<=[8]"
    )
    assert (one.axis, one.devices, one.bytes, one.hidden) == ("data+fsdp", 4, 32.0, True)


def test_groups_in_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="groups of g are not understood"):
        transfers_of("  ROOT %g = bf16[8] all-gather(%x), channel_id=3, replica_groups=new[2]")


def test_the_need_of_a_program_that_does_not_fit_is_read_from_the_message():
    whole = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.52G of 15.75G hbm."
    parts = "memory required for HLO temporaries (128.00G) exceeds available HBM (15.75G)."
    messages = (whole, parts, "Used 512.0M of")
    assert [needed_gib(message) for message in messages] == [18.52, 128.0, 0.5]
    assert needed_gib("something else") == math.inf


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5e:4x4", 16, 16), ("v3:2x2", 4, 8), ("tpu7x:2x2x2", 8, 16), ("2*v5e:8x8", 128, 128)],
)
def test_names_of_slices(name, chips, devices):
    topology = parse_topology(name)
    assert (topology.chips, topology.devices, topology.name) == (chips, devices, name)


@pytest.mark.parametrize("name", ["v5e-16", "v9:2x2", "0*v5e:2x2", "v5p:2x2", "v5e:0x4"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=rf"topology '{re.escape(name)}'.* is not known"):
        parse_topology(name)


def test_meshes_that_do_not_fit_a_topology_are_refused():
    run, two = load_config("zephyr_7b_sft"), parse_topology("2*v5e:8x8")

    def case(*sizes):
        return make_case(dataclasses.replace(run, mesh=MeshConfig(*sizes)), two)

    assert case(2, -1, 1).config.mesh == MeshConfig(2, 64, 1)
    with pytest.raises(ValueError, match="tensor=1, context=1 do not multiply to the 128 devices"):
        case(3, -1, 1)
    with pytest.raises(ValueError, match="mesh.data=1 is not divisible by the 2 slices"):
        case(1, -1, 1)
    with pytest.raises(ValueError, match="128 rows is not divisible .* = 256 on v5e:16x16"):
        make_case(load_config("zephyr_7b_sft"), parse_topology("v5e:16x16"))


@pytest.mark.parametrize("family", CHIPS)
@pytest.mark.parametrize("name", ["zephyr_7b_sft", "zephyr_7b_dpo", "zephyr_7b_sft_lora"])
def test_the_default_case_divides(family, name):
    sizes = {3: ["2x2x2", "2x2x4"], 2: ["2x2", "4x4", "8x8", "16x16"]}
    for size in sizes[3 if family in ("v4", "v5p", "tpu7x") else 2]:
        for slices in ("", "2*"):
            topology = parse_topology(f"{slices}{family}:{size}")
            if topology.devices > 8 * 8 and name.endswith("lora"):  # 8 rows, tensor at most 8
                with pytest.raises(ValueError, match="8 rows is not divisible"):
                    make_case(load_config(name), topology, auto=True)
                continue
            case = make_case(load_config(name), topology, auto=True)
            assert case.config.mesh.fsdp <= 16
            while case is not None:
                mesh, train = case.config.mesh, case.config.train
                assert case.rows % (mesh.data * mesh.fsdp * train.micro_batches) == 0
                case = smaller(case, None)


@dataclasses.dataclass(frozen=True)
class Device:
    """As a TPU of several slices describes itself."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    process_index: int = 0


def test_several_slices_shard_data_alone():
    places = itertools.product((0, 1), (0, 1), range(4))
    devices = [Device(8 * s + 4 * y + x, s, (x, y, 0)) for s, y, x in places]
    arranged = arrange_devices(devices, (4, 2, 2))
    assert [sorted({d.slice_index for d in part.flat}) for part in arranged] == [[0], [0], [1], [1]]
    assert sorted(d.id for d in arranged.flat) == list(range(16))
    with pytest.raises(ValueError, match="mesh.data=1 is not divisible by the 2 slices here"):
        arrange_devices(devices, (1, 16, 1))
    one_slice = [Device(8 * y + x, 0, (x, y, 0)) for y in range(8) for x in range(8)]
    arranged = arrange_devices(one_slice, (4, 16, 1))  # an axis of the slice is split
    assert arranged.shape == (4, 16, 1)
    assert sorted(d.id for d in arranged.flat) == list(range(64))


def test_operations_without_an_estimate_count_by_their_bytes():
    body = "\n".join(
        f'  %{name} = bf16[4,8]{{1,0}} copy(%x), backend_config={{"estimated_cycles":"{cycles}"}}'
        for name, cycles in {"a": 70, "b": 2**63 - 1, "c": 5}.items()
    )
    program = hlo.parse("ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {\n" + body + "\n}\n")
    assert hlo.cycles(program, {"main": 2.0}) == (150, 2 * 4 * 8 * 2)


def test_steps_by_published_counts_or_by_examples():
    assert step_count(load_config("zephyr_7b_sft")) == 1085
    assert step_count(load_config("zephyr_7b_beta_dpo")) == 3 * (61135 // 32)
    assert step_count(small_run(max_steps=7)) == 7
    data = dataclasses.replace(small_run().data, dataset="messages/own")
    other = dataclasses.replace(small_run(), data=data)
    assert step_count(other) is None
    assert step_count(other, 160) == 10


def test_the_table_has_a_row_per_plan_and_notes_below():
    fits = {
        "config": "a", "topology": "v5e:2x2", "mesh": {"data": 1, "fsdp": 4, "tensor": 1},
        "gib": {"needed": 9.25, "usable": 15.75}, "fits": True, "seconds": {"step": 1.5},
        "mfu": 0.456, "calibration": 1.25, "hours": 2.0, "chip_hours": 8.0,
        "warnings": ["an all-to-all over data"],
    }  # fmt: skip
    large = fits | {"fits": False, "gib": {"needed": 20.0, "usable": 15.75}, "advice": ["halve it"]}
    text = table([fits, large, {"config": "b", "topology": "v5e:4x4", "refused": "no such mesh"}])
    assert (
        "| a | v5e:2x2 | fsdp 4 | 9.25 of 15.75, fits | 1.50 s | 46% | 1.20 s, 57% | 2.0 | 8 |"
        in text
    )
    assert "20.00 of 15.75, **does not fit** | - |" in text
    assert "| b | v5e:4x4 | - | no such mesh | - |" in text
    assert "* a on v5e:2x2: an all-to-all over data" in text
    assert "* a on v5e:2x2: halve it" in text


@pytest.mark.parametrize(
    ("slice_name", "mesh"),
    [("v5e:2x4", (1, 1, 8)), ("v5e:4x4", (2, 1, 8)), ("v5p:1x1x1", (1, 1, 1))],
)
def test_sampling_shards_heads_first(slice_name, mesh):
    run = load_config("zephyr_7b_sft")
    assert sampling_mesh(run, parse_topology(slice_name)) == MeshConfig(*mesh)
    own = dataclasses.replace(run, mesh=MeshConfig(1, -1, 2))
    assert sampling_mesh(own, parse_topology("v5e:2x4")) == MeshConfig(1, 4, 2)


@pytest.mark.parametrize(
    ("rows", "lengths", "message"),
    [
        (3, (256, 512), "3 replies at once must be divisible by data x fsdp = 2 on v5e:4x4, and"),
        (4, (32256, 513), r"32256 \+ 513 tokens at most 32768 positions"),
    ],
)
def test_sampling_that_cannot_be_is_refused_before_it_is_compiled(rows, lengths, message):
    run, where = load_config("zephyr_7b_sft"), parse_topology("v5e:4x4")
    with pytest.raises(ValueError, match=message):
        sample_plan(run, where, rows, lengths)


def test_the_table_of_sampling():
    plan = {"config": "a", "topology": "v5e:2x4", "mesh": {"data": 1, "tensor": 8}, "rows": 8}
    held = {"fits": True, "gib": {"needed": 2.0, "usable": 15.75}, "tokens_per_second": 1234.5}
    held |= {"hours": 2.25, "chip_hours": 18.0}
    held["seconds"] = {"prefill": 0.05, "token": 0.004, "bound": 0.002}
    lines = sample_table([plan | held, plan | held | {"fits": False}]).splitlines()
    start = "| a | v5e:2x4 | tensor 8 | 2.00 of 15.75, "
    assert lines[2] == start + "fits | 8 | 50 ms | 4.00 ms | 2.00 | 1,234 | 2.2 | 18 |"
    assert lines[3].startswith(f"{start}**does not fit** | 8 | - |")
    assert len({line.count("|") for line in lines}) == 1
