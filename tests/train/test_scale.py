"""The arithmetic of scales that no machine here has, against sums made by hand."""

import pytest

from decoding.target import Shape
from tests.train.composing import ROOT
from train.compose import bind, build
from train.scale import (
    PLACEMENTS,
    Hardware,
    Work,
    bound,
    cache_bytes,
    drafter_traffic,
    held,
    page,
    ring,
    stages_table,
    table,
    target_bytes,
    target_flops,
)

GPU = Hardware(
    name="toy", memory=1e9, flops=1e12, bandwidth=1e11, link=1e10, network=1e9, per_node=4
)
DENSE = Shape(1000, 100, 10, 4, 4, 300, 512, head_dim=25)
WORK = Work(parameters=50_000, passes=2, layers=1, width=100, taps=3, micro=2, length=64)


def test_a_drafter_by_zero_stage():
    assert held(1000, 0, 8) == 1000 * (2 + 2 + 4 + 12)
    assert held(1000, 1, 1) == 1000 * (2 + 2 + 2 + 12 + 4)
    assert held(1000, 2, 4) == 1000 * (2 + 2 + (2 + 12 + 4) / 4)
    # while a pass runs the weights are whole, beside the share that is kept
    assert held(1000, 3, 4) == 1000 * (2 + 2 + (2 + 2 + 12 + 4) / 4)
    assert held(1000, 0, 1, "float32") == 1000 * 16


def test_a_target_by_placement():
    outside, layer = 2 * 1000 * 100 + 100, 2 * 100 * 25 * 8 + 3 * 100 * 300 + 200
    assert DENSE.parameters() == outside + 10 * layer
    assert target_bytes(DENSE, "replicated", 8, 4) == 2 * (outside + 10 * layer)
    assert target_bytes(DENSE, "tensor", 8, 4) == 2 * (outside + 10 * layer) / 4
    # what lies outside of the layers whole, an eighth of the layers, and the one in use
    assert target_bytes(DENSE, "zero3", 8, 4) == 2 * (outside + 10 * layer / 8 + layer)
    assert target_bytes(DENSE, "cached", 8, 4) < target_bytes(DENSE, "zero3", 8, 4)


def test_operations_of_a_pass():
    products = 2 * (DENSE.parameters() - 1000 * 100)  # the embeddings are looked up
    attention = 10 * 2 * 2 * (64 / 2) * 4 * 25  # scores and values, each token half the others
    assert target_flops(DENSE, 64) == products + attention


def test_only_the_experts_that_read_a_token_take_operations_and_all_take_memory():
    mixture = Shape(1000, 100, 10, 4, 4, 300, 512, head_dim=25, experts=8, active_experts=2,
                    expert_size=150)  # fmt: skip
    assert target_flops(mixture, 64) - target_flops(DENSE, 64) == 2 * 10 * 100 * 8  # the choosing
    more = target_bytes(mixture, "replicated", 1, 4) - target_bytes(DENSE, "replicated", 1, 4)
    assert more == 2 * 10 * (6 * 3 * 100 * 150 + 100 * 8)


def test_a_ring_moves_two_shares_of_all_but_ones_own():
    assert ring(800, 4) == 2 * 3 * 200  # three pieces of a quarter, twice
    assert ring(800, 1) == 0
    assert drafter_traffic(1000, 0, 4) == drafter_traffic(1000, 2, 4) == 2 * 2000 * 3 / 4
    assert drafter_traffic(1000, 3, 4) == 3 * 2000 * 3 / 4


def test_a_bound_is_the_longest_of_its_parts():
    one = bound(DENSE, WORK, "replicated", 1, GPU)
    assert one.seconds["links"] == 0
    assert one.by == "operations"
    flops = 128 * (target_flops(DENSE, 64) + 6 * 50_000 * 2)
    assert one.tokens_per_second == pytest.approx(128 / (flops / 1e12))
    four = bound(DENSE, WORK, "replicated", 4, GPU)
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)
    apart = bound(DENSE, WORK, "zero3", 8, GPU)  # over the slow network
    assert apart.by == "links"
    moved = (2 * DENSE.parameters() + 2 * 2 * 50_000) * 7 / 8
    assert apart.tokens_per_second == pytest.approx(8 * 128 / (moved / 1e9))


def test_ranks_that_share_a_pass_read_the_same_tokens():
    four = bound(DENSE, WORK, "tensor", 4, GPU)
    own = 128 * (target_flops(DENSE, 64) / 4 + 6 * 50_000 * 2) / 1e12
    assert four.seconds["operations"] == pytest.approx(own)
    assert four.tokens_per_second == pytest.approx(128 / max(four.seconds.values()))


def test_without_a_target_only_its_head_is_multiplied():
    cached = bound(DENSE, WORK, "cached", 1, GPU)
    flops = 128 * (2 * 1000 * 100 + 6 * 50_000 * 2)
    assert cached.seconds["operations"] == pytest.approx(flops / 1e12)


def test_a_cache_of_heads_holds_the_last_state_and_the_taps():
    sizes = cache_bytes(DENSE, 3, 1_000_000)
    fp16, fp8, top = sizes.values()
    assert fp16 == pytest.approx(1_000_000 * 4 * 200, rel=0.03)  # scales come on top
    assert fp8 == pytest.approx(fp16 / 2, rel=0.05)
    assert top < fp16


def test_tables_say_what_fits():
    rows = table(DENSE, WORK, 4, GPU)
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == list(PLACEMENTS)
    small = Hardware(
        name="small", memory=5e7, flops=1e12, bandwidth=1e11, link=1e10, network=1e9, per_node=4
    )
    assert all("| yes |" in row for row in rows[2:])
    assert all("| no |" in row for row in table(DENSE, WORK, 4, small)[2:])
    assert len(stages_table(WORK, (4, 8), GPU)) == 2 + 4 * 2


@pytest.mark.parametrize("name", ["h100", "h200", "a100"])
def test_hardware_is_named_with_its_figures(name: str):
    import yaml

    config = yaml.safe_load((ROOT / "conf" / "hardware" / f"{name}.yaml").read_text("utf-8"))
    bind(config, "hardware")
    gpu = build(config)
    assert gpu.per_node == 8
    assert gpu.memory < 150e9 < gpu.flops
    assert gpu.network < gpu.link < gpu.bandwidth
    with pytest.raises(ValueError, match="every figure must be above 0"):
        build(config | {"flops": 0.0})


def test_the_document_has_the_tables_that_the_command_prints():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert page().strip() in text
