"""Facts about labels, and what follows from them: checked against components found one pair at a time."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.graph.labels import FIXED, LabelBook, Solution, distinct, no_labels
from lightning_prune.graph.rules.movement import _laid_out


def components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """The least label that hangs together with each."""
    root = list(range(count))
    for a, b in pairs:
        least, most = sorted((root[a], root[b]))
        root = [least if each == most else each for each in root]
    return root


def why(solution: Solution, labels: Tensor) -> list[str | None]:
    """What froze each label, None where it can go."""
    numbers = solution.reason[solution.root[labels.flatten()]].tolist()
    return [solution.reasons[number - 1] if number else None for number in numbers]


def together(solution: Solution, *labels: Tensor) -> bool:
    """Whether the i-th of all rows are one component, and all components are different."""
    rows = [solution.root[row] for row in labels]
    return all(map(torch.equal, rows, rows[1:])) and len(rows[0].unique()) == len(rows[0])


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=60))
def test_labels_that_are_united_hang_together_and_no_others(size: int, drawn: list[tuple[int, int]]) -> None:
    book = LabelBook()
    book.new(size)
    pairs = [(1 + a % size, 1 + b % size) for a, b in drawn]
    for a, b in pairs:
        book.tie(torch.tensor([a]), torch.tensor([b]))
    if pairs:  # the same once more, in rows
        book.unify(torch.tensor([a for a, _ in pairs]), torch.tensor([b for _, b in pairs]), "")
    assert book.solve().root.tolist() == components(size + 1, pairs)


@pytest.mark.parametrize("span", [1, 300, 30_000, 10**9])
@pytest.mark.parametrize("size", [0, 1, 50, 10_000])
def test_distinct_labels_are_those_that_sorting_finds(size: int, span: int) -> None:
    labels = torch.randint(5, 5 + span, (size,), generator=torch.Generator().manual_seed(0))
    for some in (labels, torch.cat([labels, torch.full((3,), FIXED)])):
        for own, known in zip(distinct(some), some.unique(return_inverse=True), strict=True):
            assert torch.equal(own, known)
    assert torch.equal(distinct(labels.view(-1, 1))[1], distinct(labels)[1].view(-1, 1))


@given(st.data())
def test_labels_are_laid_out_as_a_view_lays_out_elements(data: st.DataObject) -> None:
    factors = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))

    def grouped() -> list[int]:
        """The same number of elements in dimensions of other sizes."""
        sizes = [1]
        for factor in data.draw(st.permutations(factors)):
            if data.draw(st.booleans()):
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return sizes

    before, after = grouped(), grouped()
    for dim, size in enumerate(before):
        labels = torch.arange(size) + 7
        whole = labels.view([-1 if at == dim else 1 for at in range(len(before))]).expand(before).reshape(after)
        inner = whole.numel() // torch.Size(before[: dim + 1]).numel()
        assert torch.equal(_laid_out(labels, inner, after).expand(after), whole)


def test_every_label_is_new() -> None:
    book = LabelBook()
    rows = [book.new(size) for size in (3, 1, 4)]
    assert FIXED not in torch.cat(rows)
    assert len(torch.cat(rows).unique()) == 8
    assert no_labels(torch.zeros(2, 3)) == (None, None)


def test_labels_that_meet_a_dimension_without_any_are_frozen() -> None:
    book = LabelBook()
    a, b, c, d = (book.new(2) for _ in range(4))
    assert book.unify(a, None, "right") is None
    assert book.unify(None, b, "left") is None
    assert book.unify(None, None, "neither") is None
    assert book.unify(c, d, "both") is c
    solution = book.solve()
    assert [why(solution, row) for row in (a, b, c, d)] == [["right"] * 2, ["left"] * 2, [None] * 2, [None] * 2]
    assert together(solution, c, d)


def test_what_hangs_together_with_something_frozen_is_frozen_for_the_first_real_reason() -> None:
    book = LabelBook()
    a, b, c = (book.new(3) for _ in range(3))
    book.freeze(a[:1], "")
    book.freeze(b[:1], "first")
    book.freeze(a[:1], "second")
    book.freeze(a[1:2], "")
    book.freeze(None, "nothing")
    book.tie(a, b, c)
    book.tie(c[2:], torch.tensor([FIXED]))
    solution = book.solve()
    assert [why(solution, row) for row in (a, b, c)] == [["first", "", "constant"]] * 3


def test_mixed_labels_are_found_by_their_components() -> None:
    book = LabelBook()
    a, b = book.new(3), book.new(3)
    book.tie(a, b)
    book.mix(b, "softmax")
    book.mix(a[:1], "mean")
    book.mix(None, "nothing")
    assert {text: roots.tolist() for text, roots in book.solve().mixed.items()} == {"softmax": [1, 2, 3], "mean": [1]}


def test_filled_labels_go_with_those_that_came_in_but_are_others() -> None:
    book = LabelBook()
    labels = torch.cat([book.new(2), torch.tensor([FIXED])])[[0, 1, 1, 2]]
    filled = book.fill(labels)
    assert filled is not None
    assert (book.is_filled(labels), book.is_filled(filled), book.fill(None)) == (False, True, None)
    assert book.fill(filled) is filled
    assert not set(filled[:3].tolist()) & set(labels.tolist())
    assert filled[1] == filled[2] != filled[0]
    assert filled[3] == FIXED
    assert torch.equal(book.solve().root[filled], book.solve().root[labels])


# Boxes: a dimension that is several at once


SIDES = ["split", "merge"]


def box(side: str, first: int = 4, second: int = 3) -> tuple[LabelBook, Tensor, Tensor, Tensor]:
    """A book with one box: its cells, outer axis and inner axis."""
    book = LabelBook()
    if side == "split":
        cells = book.new(first * second).view(first, second)
        outer, inner = book.split(cells, "here")
    else:
        outer, inner = book.new(first), book.new(second)
        cells = book.merge((outer, inner), "here")
    return book, cells, outer, inner


def assert_chosen(book: LabelBook, cells: Tensor, axes: Sequence[Tensor], chosen: int) -> Solution:
    """The cells go with one axis: all that share an index of it, and only these. The other axes stay."""
    solution = book.solve()
    assert solution.chosen == (chosen,)
    for cell, *at in ((int(cells[i, j]), i, j) for i in range(cells.size(0)) for j in range(cells.size(1))):
        assert solution.root[cell] == solution.root[axes[chosen][at[chosen]]]
    assert len(solution.root[axes[chosen]].unique()) == len(axes[chosen])
    assert set(why(solution, axes[1 - chosen])) == {""}
    assert set(why(solution, axes[chosen])) == {None}
    return solution


def assert_whole(book: LabelBook, cells: Tensor, reason: str) -> None:
    solution = book.solve()
    assert solution.chosen == (None,)
    assert set(why(solution, cells)) == {reason}


NO_AXIS = "splits a prunable dimension (here)"


@pytest.mark.parametrize("side", SIDES)
def test_of_two_axes_the_outer_one_goes(side: str) -> None:
    book, cells, outer, inner = box(side)
    assert_chosen(book, cells, (outer, inner), 0)


def freeze_axis(book: LabelBook, axis: Tensor) -> None:
    book.freeze(axis, "stays")


def freeze_silently(book: LabelBook, axis: Tensor) -> None:
    book.freeze(axis, "")


def make_constant(book: LabelBook, axis: Tensor) -> None:
    book.tie(axis, torch.full_like(axis, FIXED))


def tie_all(book: LabelBook, axis: Tensor) -> None:
    book.tie(axis[:-1], axis[1:])


def tie_to_frozen(book: LabelBook, axis: Tensor) -> None:
    other = book.new(len(axis))
    book.tie(axis, other)
    book.freeze(other, "stays")


UNABLE = [freeze_axis, freeze_silently, make_constant, tie_all, tie_to_frozen]


@pytest.mark.parametrize("unable", UNABLE)
@pytest.mark.parametrize("side", SIDES)
def test_the_inner_axis_goes_where_the_outer_one_cannot(side: str, unable: Any) -> None:
    book, cells, outer, inner = box(side)
    unable(book, outer)
    solution = book.solve()
    assert solution.chosen == (1,)
    assert together(solution, inner, *cells)
    assert set(why(solution, inner)) == {None}


@pytest.mark.parametrize("unable", UNABLE)
@pytest.mark.parametrize("side", SIDES)
def test_the_outer_axis_goes_whatever_the_inner_one_can(side: str, unable: Any) -> None:
    book, cells, outer, inner = box(side)
    unable(book, inner)
    solution = book.solve()
    assert solution.chosen == (0,)
    assert together(solution, outer, *cells.T)
    assert set(why(solution, outer)) == {None}


@pytest.mark.parametrize("second", UNABLE)
@pytest.mark.parametrize("first", UNABLE)
@pytest.mark.parametrize("side", SIDES)
def test_if_neither_can_go_the_whole_dimension_stays_and_says_why(side: str, first: Any, second: Any) -> None:
    book, cells, outer, inner = box(side)
    first(book, outer)
    second(book, inner)
    assert_whole(book, cells, NO_AXIS)


@pytest.mark.parametrize("side", SIDES)
def test_part_of_an_axis_that_stays_is_no_reason_against_it(side: str) -> None:
    book, cells, outer, _inner = box(side)
    book.freeze(outer[1:2], "stays")
    solution = book.solve()
    assert solution.chosen == (0,)
    assert [set(why(solution, row)) for row in cells] == [{None}, {"stays"}, {None}, {None}]


@pytest.mark.parametrize("side", SIDES)
def test_an_axis_that_is_idle_only_once_the_cells_go_with_it_is_given_up(side: str) -> None:
    """Two cells of neighbouring rows are the same index, in every pair of rows: then all rows hang together."""
    book, cells, _outer, inner = box(side)
    book.tie(cells[:-1, 0], cells[1:, 0])
    solution = book.solve()
    assert solution.chosen == (1,)
    assert together(solution, inner, *cells)


@pytest.mark.parametrize("side", SIDES)
def test_an_axis_whose_cells_are_frozen_is_given_up(side: str) -> None:
    book, cells, _outer, inner = box(side)
    book.freeze(cells[:, 0], "one of each row stays")
    solution = book.solve()
    assert solution.chosen == (1,)
    assert why(solution, inner) == ["one of each row stays", None, None]


@pytest.mark.parametrize("side", SIDES)
def test_an_axis_that_nothing_mixes_is_preferred(side: str) -> None:
    for mixed, chosen in (([0], 1), ([1], 0), ([0, 1], 0)):
        book, cells, *axes = box(side)
        for axis in mixed:
            book.mix(axes[axis][1:2], "softmax")
        assert_chosen(book, cells, axes, chosen)


@pytest.mark.parametrize("side", SIDES)
def test_a_mixed_axis_goes_if_the_other_cannot(side: str) -> None:
    book, cells, outer, inner = box(side)
    book.mix(outer, "softmax")
    book.freeze(inner, "stays")
    solution = book.solve()
    assert solution.chosen == (0,)
    assert together(solution, outer, *cells.T)


def test_three_axes_and_one_of_them_goes() -> None:
    book = LabelBook()
    cells = book.new(24).view(2, 3, 4)
    first, second, third = book.split(cells, "here")
    assert book.solve().chosen == (0,)
    book.freeze(first, "stays")
    solution = book.solve()
    assert solution.chosen == (1,)
    assert together(solution, second, *cells.transpose(1, 2).reshape(-1, 3))
    assert set(why(solution, third)) == {""}
    book.freeze(second, "stays")
    assert book.solve().chosen == (2,)


def test_boxes_that_share_an_axis_make_one_choice() -> None:
    """Heads of queries and keys: what holds for the one holds for the other."""
    book = LabelBook()
    queries, keys = book.new(12).view(4, 3), book.new(20).view(4, 5)
    heads, features = book.split(queries, "queries")
    heads2, others = book.split(keys, "keys")
    book.unify(heads, heads2, "")
    assert book.solve().chosen == (0, 0)
    assert together(book.solve(), heads, *queries.T, *keys.T)
    book.freeze(heads2, "stays")
    solution = book.solve()
    assert solution.chosen == (1, 1)
    assert together(solution, features, *queries)
    assert together(solution, others, *keys)


def test_a_dimension_that_is_split_and_merged_again_is_the_same() -> None:
    book, cells, outer, inner = box("split")
    again = book.merge((outer, inner), "there")
    assert book.solve().chosen == (0, 0)
    assert torch.equal(book.solve().root[again], book.solve().root[cells])
    book.freeze(outer, "stays")
    assert book.solve().chosen == (1, 1)
    assert torch.equal(book.solve().root[again], book.solve().root[cells])


def test_a_dimension_that_is_split_and_shuffled_keeps_its_groups() -> None:
    book, cells, outer, inner = box("split", 2, 4)
    shuffled = book.merge((inner, outer), "there")
    solution = book.solve()
    assert set(solution.chosen) == {0, 1}  # the same axis, which comes first here and second there
    assert torch.equal(solution.root[shuffled.T], solution.root[cells])


def test_equal_slices_of_a_split_get_equal_labels() -> None:
    """A batch that was folded into the heads is no axis of its own: its indices are copies of each other."""
    book = LabelBook()
    cells = book.new(6).view(1, 2, 3).expand(4, 2, 3)
    batch, heads, features = book.split(cells, "here")
    assert (len(batch.unique()), len(heads.unique()), len(features.unique())) == (1, 2, 3)
    solution = book.solve()
    assert solution.chosen == (1,)
    assert together(solution, heads, *cells[0].T)


def test_an_axis_paired_with_itself_stays_and_says_so() -> None:
    book = LabelBook()
    row = book.new(3)
    cells = book.merge((row, row), "here")
    solution = book.solve()
    assert solution.chosen == (None,)
    assert set(why(solution, row)) == {"pairs a prunable dimension with itself (here)"}
    assert set(why(solution, cells)) == {NO_AXIS}


def test_values_that_a_mask_leaves_behind_are_marked_through_boxes() -> None:
    book = LabelBook()
    filled, plain = book.fill(book.new(6)), book.new(6)
    assert filled is not None
    assert all(map(book.is_filled, book.split(filled.view(2, 3), "here")))
    assert not any(map(book.is_filled, book.split(plain.view(2, 3), "here")))
    assert book.is_filled(book.merge((filled, plain), "here"))
    assert not book.is_filled(book.merge((plain, book.new(2)), "here"))


# A second thought


@pytest.mark.parametrize("side", SIDES)
def test_what_was_reconsidered_goes_along_another_axis_and_then_stays(side: str) -> None:
    book, cells, outer, inner = box(side)
    book.reconsider(book.solve(), book.solve().root[outer[:1]], "it failed")
    solution = book.solve()
    assert solution.chosen == (1,)
    assert together(solution, inner, *cells)
    assert set(why(solution, inner)) == {None}
    book.reconsider(solution, solution.root[inner], "it failed again")
    assert_whole(book, cells, NO_AXIS)


def test_what_belongs_to_no_box_is_frozen_when_reconsidered() -> None:
    book, cells, outer, inner = box("split")
    alone, other = book.new(2), book.new(2)
    book.reconsider(book.solve(), book.solve().root[alone], "it failed")
    solution = book.solve()
    assert [set(why(solution, row)) for row in (alone, other)] == [{"it failed"}, {None}]
    assert_chosen(book, cells, (outer, inner), 0)


def test_only_the_boxes_of_what_failed_choose_anew() -> None:
    book = LabelBook()
    first, second = book.new(6).view(2, 3), book.new(6).view(2, 3)
    heads, _ = book.split(first, "first")
    book.split(second, "second")
    book.reconsider(book.solve(), book.solve().root[heads], "it failed")
    assert book.solve().chosen == (1, 0)


def test_an_axis_that_is_avoided_is_known_the_second_time() -> None:
    book, cells, outer, inner = box("split")
    assert book.avoid([outer])
    assert not book.avoid([outer])
    assert_chosen(book, cells, (outer, inner), 1)


def test_axes_that_lie_within_components() -> None:
    book, _cells, outer, inner = box("split")
    solution = book.solve()
    assert [axis.tolist() for axis in solution.axes_within(book.boxes, solution.root[outer])] == [outer.tolist()]
    assert solution.axes_within(book.boxes, solution.root[outer[1:]]) == []
    assert solution.axes_within(book.boxes, inner) == []


@given(st.data())
def test_in_random_boxes_every_choice_is_consistent(data: st.DataObject) -> None:
    """Whatever is frozen and tied: cells go with the chosen axis and with nothing that stays, or all of them stay."""
    book = LabelBook()
    rows = [book.new(12) for _ in range(data.draw(st.integers(1, 3)))]
    sizes = st.sampled_from([(2, 6), (6, 2), (3, 4), (2, 2, 3)])
    axes = [axis for row in rows for axis in book.split(row.view(data.draw(sizes)), "here")]
    for _ in range(data.draw(st.integers(0, 3))):
        one = data.draw(st.sampled_from(axes))
        other = data.draw(st.sampled_from([axis for axis in axes if len(axis) == len(one)]))
        book.tie(one, other)
    for _ in range(data.draw(st.integers(0, 2))):
        axis = data.draw(st.sampled_from(axes))
        book.freeze(axis[: data.draw(st.integers(1, len(axis)))], "stays")
    solution = book.solve()
    for each, choice in zip(book.boxes, solution.chosen, strict=True):
        roots = solution.root[each.cells]
        if choice is None:
            assert None not in why(solution, each.cells)
            continue
        along = solution.root[each.axes[choice]]
        shape = [-1 if dim == choice else 1 for dim in range(each.cells.dim())]
        assert torch.equal(roots, along.view(shape).expand_as(roots))
        assert len(along.unique()) > 1
        assert None in why(solution, along)
        for axis, labels in enumerate(each.axes):
            assert axis == choice or None not in why(solution, labels)
