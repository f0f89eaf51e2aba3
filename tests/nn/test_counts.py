import dataclasses

import pytest

from dreamer4.nn.counts import parameter_count, transformer_flops
from dreamer4.nn.layout import Layout, Modality
from tiny_transformer import ALIBI, CONFIG, LEARNED, STILL, build

SINGLE = Layout((Modality("a", reads=("a",), size=1),), temporal=1)
MAPS, MLP = 4 * 16 * 16, 3 * 16 * 32


def test_counts_match_the_parameters():
    assert parameter_count(build()[1]) == 4 * (MAPS + MLP + 2 * 16 + 2) + 16  # two norms and the gains; the last norm
    # One token, one frame: two operations for each weight of a matrix, and 4 D for the one pair of each attention.
    assert transformer_flops(CONFIG, SINGLE, 1) == 4 * (2 * (MAPS + MLP) + 4 * 16)
    # Experts have a router beside them; FiLM makes four vectors of a time step, and gates two more.
    several = 4 * (2 * (MAPS + 3 * MLP + 3 * 16 + 4 * 16 * 16) + 4 * 16)
    assert transformer_flops(LEARNED, SINGLE, 1) == several
    gated = 4 * (2 * (3 * 16 * 16 + MLP + 6 * 16 * 16) + 4 * 16)  # and keys and values of one head of two
    assert transformer_flops(ALIBI, SINGLE, 1) == gated


def test_without_layers_over_time_a_frame_costs_the_same_in_any_clip():
    # Three tokens, hence nine pairs, in each of two layers.
    still = 2 * (3 * 2 * (MAPS + MLP) + 9 * 4 * 16)
    three = Layout((Modality("a", reads=("a",), size=3),), temporal=0)
    assert [transformer_flops(STILL, three, frames) for frames in (1, 64)] == [still, still]


@pytest.mark.parametrize("config", [CONFIG, STILL])
def test_what_is_told_costs_its_maps_and_its_pairs(config):
    cross = dataclasses.replace(config, condition="cross", kv_heads=1)
    plain = dataclasses.replace(config, kv_heads=1)
    three = Layout((Modality("a", reads=("a",), size=3),), temporal=3)
    # A query and a way back for each of three tokens, a key and a value of half the width for each of five, and pairs.
    more = 3 * 2 * (2 * 16 * 16) + 5 * 2 * (2 * 16 * 8) + 3 * 5 * 4 * 16
    single = 2 * (2 * 16 * 16 + 2 * 16 * 8) + 4 * 16  # which is read once for all
    found = [transformer_flops(cross, three, 4, told) - transformer_flops(plain, three, 4) for told in (5, 1)]
    assert found == [config.depth * more, config.depth * single]
    maps = parameter_count(build(cross)[1]) - parameter_count(build(plain)[1])
    assert maps == config.depth * (2 * 16 * 16 + 2 * 16 * 8 + 16 + 2)  # and a norm and the gains
    with pytest.raises(ValueError, match="told: 0 found, 1 or more expected"):
        transformer_flops(cross, three, 4)
