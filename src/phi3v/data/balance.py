"""Equal work for all ranks: who gets what, and in which rows."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

GOOD = 1.005  # the most work of a rank over the mean, below which nothing is moved any more
GOOD_AT_HOME = 1.03  # the same of items that prefer a rank
ROUNDS = 12  # of moving, at most


def assign_to_ranks(work: Sequence[float], ranks: int, preferred: Sequence[int] | None = None) -> list[int]:
    """The rank of each item, so that the most work of a rank is little above the mean.

    The largest item first, each to the rank that has the least so far (Graham 1969, https://doi.org/10.1137/0117039);
    then ranks with much and ranks with little exchange items, as long as that lowers the larger of the two.

    Args:
        preferred: a rank for each item, which it leaves only where that evens the work out; -1: none.
    """
    if ranks == 1:
        return [0] * len(work)
    assigned = _largest_first(work, ranks, preferred)
    _exchange(work, assigned, ranks, GOOD if preferred is None else GOOD_AT_HOME)
    return assigned


def _largest_first(work: Sequence[float], ranks: int, preferred: Sequence[int] | None) -> list[int]:
    assigned, at = [0] * len(work), [0.0] * ranks
    items: Sequence[int] = sorted(range(len(work)), key=lambda item: -work[item])
    if preferred is not None:
        limit = GOOD_AT_HOME * sum(work) / ranks
        homeless = []
        for item in items:
            rank = preferred[item]
            if rank < 0 or (at[rank] and at[rank] + work[item] > limit):
                homeless.append(item)
                continue
            assigned[item] = rank
            at[rank] += work[item]
        items = homeless
    loads = [(load, rank) for rank, load in enumerate(at)]
    heapq.heapify(loads)
    for item in items:
        load, rank = heapq.heappop(loads)
        assigned[item] = rank
        heapq.heappush(loads, (load + work[item], rank))
    return assigned


def _exchange(work: Sequence[float], assigned: list[int], ranks: int, good: float) -> None:
    """Round by round the ranks with the most work are paired with those with the least, each with another each time."""
    items = by_rank(assigned, ranks)
    loads = [sum(work[item] for item in own) for own in items]
    enough = good * sum(loads) / ranks
    for turn in range(min(ROUNDS, 3 * ranks)):
        order = sorted(range(ranks), key=lambda rank: -loads[rank])
        above = next((place for place, rank in enumerate(order) if loads[rank] <= enough), ranks)
        if above == 0:
            return
        half = max(above, ranks // 2)
        for place in range(above):
            # From the back; in later turns a neighbour of whom did not help.
            giver, taker = order[place], order[-1 - (place + turn) % (ranks - half)] if half < ranks else order[-1]
            gap = loads[giver] - loads[taker]
            if gap <= 0:
                continue
            best = gap
            pair: tuple[int, int | None] | None = None
            for given in items[giver]:
                for back in items[taker]:
                    left = abs(gap - 2 * (work[given] - work[back]))
                    if left < best:
                        best, pair = left, (given, back)
                if abs(gap - 2 * work[given]) < best:
                    best, pair = abs(gap - 2 * work[given]), (given, None)
            if pair is None:
                continue
            moved, returned = pair
            loads[giver] -= work[moved]
            loads[taker] += work[moved]
            _move(moved, items[giver], items[taker])
            assigned[moved] = taker
            if returned is not None:
                loads[giver] += work[returned]
                loads[taker] -= work[returned]
                _move(returned, items[taker], items[giver])
                assigned[returned] = giver


def _move(item: int, giver: list[int], taker: list[int]) -> None:
    giver.remove(item)
    taker.append(item)


def by_rank(assigned: Sequence[int], ranks: int) -> list[list[int]]:
    """The items of each rank, in their order."""
    items: list[list[int]] = [[] for _ in range(ranks)]
    for item, rank in enumerate(assigned):
        items[rank].append(item)
    return items


def abreast(work: Sequence[float], ranks: int, preferred: Sequence[int] | None = None) -> list[list[int]]:
    """The items of each rank where all compute one at the same time: first the largest, then the next largest."""
    rows: list[list[int]] = [[] for _ in range(ranks)]
    order = sorted(range(len(work)), key=lambda item: -work[item])
    for start in range(0, len(order), ranks):
        placed: dict[int, int] = {}
        left = []
        for item in order[start : start + ranks]:
            if preferred is not None and preferred[item] >= 0 and preferred[item] not in placed:
                placed[preferred[item]] = item
            else:
                left.append(item)
        free = [rank for rank in range(ranks) if rank not in placed]
        for rank, item in [*placed.items(), *zip(free, left, strict=False)]:
            rows[rank].append(item)
    return rows


def fill_rows(tokens: Sequence[int], room: int) -> list[list[int]]:
    """The items of each row, by best fit, the longest first: each goes where it leaves the least room."""
    rows: list[list[int]] = []
    left: list[int] = []
    for item in sorted(range(len(tokens)), key=lambda item: -tokens[item]):
        fits = [place for place, free in enumerate(left) if free >= tokens[item]]
        if fits:
            place = min(fits, key=lambda place: left[place])
            rows[place].append(item)
            left[place] -= tokens[item]
        else:
            rows.append([item])
            left.append(room - tokens[item])
    return rows


def even_rows(work: Sequence[float], tokens: Sequence[int], room: int, count: int) -> list[list[int]] | None:
    """The items of ``count`` rows of about equal work, the row with the most first; None if they do not fit so.

    With fewer items than that, a row each.
    """
    rows: list[list[int]] = [[] for _ in range(min(count, len(work)))]
    loads, left = [0.0] * len(rows), [room] * len(rows)
    for item in sorted(range(len(work)), key=lambda item: -work[item]):
        fits = [place for place, free in enumerate(left) if free >= tokens[item] or not rows[place]]
        if not fits:
            return None
        place = min(fits, key=lambda place: loads[place])
        rows[place].append(item)
        loads[place] += work[item]
        left[place] -= tokens[item]
    return [rows[place] for place in sorted(range(len(rows)), key=lambda place: -loads[place])]
