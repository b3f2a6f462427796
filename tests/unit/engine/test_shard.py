"""The split of a model over ranks: together they have all of it, once, but for KV heads that several of them read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.engine.config import ModelConfig, RopeConfig
from kvferry.engine.ranks.shard import UNIT, Shard, cut, shards_of
from kvferry.errors import SettingError

SMOLLM2 = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30,
    num_heads=9, num_kv_heads=3, head_dim=64, rms_norm_eps=1e-5, max_position_embeddings=8192,
    tie_word_embeddings=True, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, windows=(None,) * 30,
    rope=RopeConfig("default", 1e4), dtype="bfloat16", eos_token_ids=frozenset(),
)  # fmt: skip
dimension = st.one_of(st.integers(64, 200), st.sampled_from([576, 1536, 4096, 14336, 49152]))


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    kv_heads, group = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return replace(
        SMOLLM2, num_kv_heads=kv_heads, num_heads=kv_heads * group, hidden_size=draw(dimension),
        intermediate_size=draw(dimension), vocab_size=draw(dimension),
    )  # fmt: skip


def joined(parts: list[range]) -> list[int]:
    return [place for part in parts for place in part]


@given(models(), st.data())
def test_ranks_together_have_every_dimension_once(config: ModelConfig, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, min(config.num_heads, 64)))
    shards = shards_of(config, size)
    assert [(shard.rank, shard.size) for shard in shards] == [(rank, size) for rank in range(size)]
    for name, count in (
        ("heads", config.num_heads), ("hidden", config.hidden_size), ("intermediate", config.intermediate_size),
        ("vocab", config.vocab_size),
    ):  # fmt: skip
        parts = [getattr(shard, name) for shard in shards]
        assert all(parts), "a rank without work"
        assert joined(parts) == list(range(count))


@given(models(), st.data())
def test_a_rank_has_just_the_kv_heads_that_its_queries_read(config: ModelConfig, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, min(config.num_heads, 64)))
    group = config.queries_per_kv_head
    for shard in shards_of(config, size):
        read = sorted({head // group for head in shard.heads})
        assert list(shard.kv_heads) == read
        # Kernels walk whole groups of equal size: several KV heads with all of their queries, or one with some.
        assert len(shard.kv_heads) == 1 or len(shard.heads) == group * len(shard.kv_heads)


@given(models(), st.data())
def test_kv_heads_are_only_repeated_where_there_are_fewer_than_ranks(config: ModelConfig, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, min(config.num_heads, 64)))
    held = joined([shard.kv_heads for shard in shards_of(config, size)])
    assert held == sorted(held)
    assert set(held) == set(range(config.num_kv_heads))
    assert len(held) == max(size, config.num_kv_heads)


@given(st.integers(1, 100_000), st.integers(1, 64))
def test_parts_differ_by_one_unit_at_most(count: int, size: int) -> None:
    parts = [cut(count, size, rank) for rank in range(size)]
    assert joined(parts) == list(range(count))
    unit = UNIT if count // UNIT >= size else 1
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * unit  # a last unit may be cut short
    assert all(part.start % unit == 0 for part in parts)


def test_an_uneven_model_is_split_as_documented() -> None:
    def heads(size: int) -> list[tuple[list[int], list[int]]]:
        return [(list(shard.heads), list(shard.kv_heads)) for shard in shards_of(SMOLLM2, size)]

    assert heads(2) == [([0, 1, 2], [0]), ([3, 4, 5, 6, 7, 8], [1, 2])]
    assert heads(4) == [([0, 1, 2], [0]), ([3, 4, 5], [1]), ([6], [2]), ([7, 8], [2])]
    assert heads(8) == [
        ([0], [0]), ([1, 2], [0]), ([3], [1]), ([4], [1]), ([5], [1]), ([6], [2]), ([7], [2]), ([8], [2])
    ]  # fmt: skip
    assert [len(shard.intermediate) for shard in shards_of(SMOLLM2, 4)] == [384] * 4


@pytest.mark.parametrize("size", [0, 10, 64])
def test_more_ranks_than_query_heads_are_refused_by_name(size: int) -> None:
    with pytest.raises(SettingError, match="1 to 9 ranks") as error:
        shards_of(SMOLLM2, size)
    assert error.value.setting == "tensor_parallel_size"


def test_rows_of_heads_are_rows_of_the_checkpoint() -> None:
    shard: Shard = shards_of(SMOLLM2, 2)[1]
    assert shard.query_rows(64) == range(192, 576)
    assert shard.key_rows(64) == range(64, 192)
