"""Batches of similar length, and masks that mark padding."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tsdkd.stages.data.batches import (
    batches_by_length,
    consecutive_blocks,
    even_batches,
    join_sequences,
    packed_batches,
    pad_left,
    predicted_ids,
)
from tsdkd.stages.data.turns import response_turns

PROMPTS, RESPONSES = [[5, 6, 7], [8]], [[1], [2, 3]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
def test_batches_of_a_size_hold_every_sequence_once(lengths: list[int], size: int) -> None:
    batches = list(batches_by_length(lengths, size=size))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= size
    longest = [lengths[batch[0]] for batch in batches]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_padded_tokens_do_not_exceed_the_limit(lengths: list[int], tokens: int) -> None:
    for batch in batches_by_length(lengths, tokens=tokens):
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= tokens


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_packed_batches_hold_every_sequence_once_and_at_most_the_tokens(lengths: list[int], tokens: int) -> None:
    batches = list(packed_batches(lengths, tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= tokens for batch in batches)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 200), st.integers(1, 4))
def test_even_batches_differ_by_at_most_one_sequence(lengths: list[int], tokens: int, ranks: int) -> None:
    batches = even_batches(lengths, tokens, ranks)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) % ranks == 0
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    assert max(sizes) <= tokens
    assert max(sizes) - min(sizes) <= max(lengths)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 120))
def test_blocks_are_consecutive_and_bounded(sizes: list[int], limit: int) -> None:
    blocks = list(consecutive_blocks(sizes, limit))
    assert [i for block in blocks for i in block] == list(range(len(sizes)))
    assert all(len(block) == 1 or sum(sizes[i] for i in block) <= limit for block in blocks)
    following = [sizes[block.stop] for block in blocks[:-1]]
    # Blocks are maximal.
    assert all(sum(sizes[i] for i in b) + n > limit for b, n in zip(blocks, following, strict=False))


def test_pad_left() -> None:
    ids, attention = pad_left(PROMPTS)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_sequences_start_in_the_first_column() -> None:
    batch = join_sequences(PROMPTS, RESPONSES, [[range(1)], [range(2)]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [8, 2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 2]]
    assert batch["predicting"].tolist() == [[False, False, True, False], [True, True, False, False]]
    assert batch["response_mask"].tolist() == [[True, False], [True, True]]


def test_packed_sequences_share_a_row_without_padding() -> None:
    turns = [[range(1)], [range(2)]]
    batch = join_sequences(PROMPTS, RESPONSES, turns, packed=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 8, 2, 3]]
    assert batch["attention_mask"] is None
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["predicting"].tolist() == [[False, False, True, False, True, True, False]]
    assert predicted_ids(batch).tolist() == [1, 2, 3]
    assert batch["response_mask"].tolist() == join_sequences(PROMPTS, RESPONSES, turns)["response_mask"].tolist()


@given(st.lists(st.booleans(), max_size=12))
def test_turns_are_the_pieces_of_a_mask(mask: list[bool]) -> None:
    turns = response_turns(len(mask), mask)
    assert [i for turn in turns for i in turn] == [i for i, marked in enumerate(mask) if marked]
    assert all(turn.stop < following.start for turn, following in pairwise(turns))
    assert all(turns)
