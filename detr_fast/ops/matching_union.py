"""Union of the matchings of several prediction sets: every query keeps the target that most sets gave it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from detr_fast import _C  # noqa: F401  registers the ops


def unite(
    query_of_target: Tensor,  # [S, T] int32, -1 = unmatched
    offsets: Tensor,  # [B + 1] int32
    num_queries: int,
) -> Tensor:
    """The pairs of all S sets together, no query with two targets: ``[S, T]`` int32, -1 = no pair.

    Sets are matchings of the same targets to the same queries, of every decoder layer and what else predicts. In each
    image the pair (query, target) counts in how many sets it is. A query keeps the target whose pair counts most, the
    lower target if several do; it may lose all but one of its targets, but a target may keep several queries. A pair
    that is kept stands once in the result, in the first set that has it; everything else is -1, rows past
    ``offsets[B]`` too. So the union of one matching is that matching, and the pairs of image b are the entries of
    columns ``offsets[b]`` to ``offsets[b + 1]`` that are not -1.

    Nothing is differentiated, and the result has the same bits on every device. On a CUDA device one launch, without
    memory of its own; offsets are not checked there, and queries outside of ``[-1, num_queries)`` are no pairs. At most
    2^31 - 2 targets, queries and entries. On the CPU O(S T + B num_queries), there O(S^2 T) in parallel.

    Raises:
        RuntimeError: a tensor has another shape, type or device, there are too many entries, `num_queries` is negative;
            on the CPU also if offsets are no segments of the columns or a query is outside of ``[-1, num_queries)``.

    Source: Peng et al., "D-FINE", ICLR 2025, whose code leaves the order of equal counts to the sort.
    """
    return torch.ops.detr_fast.unite.default(query_of_target, offsets, num_queries)


def unite_reference(query_of_target: Tensor, offsets: Tensor, num_queries: int) -> Tensor:
    """The definition of :func:`unite`; as on a device, queries out of range are no pairs."""
    united = torch.full_like(query_of_target, -1)
    bounds = offsets.tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end or num_queries == 0:
            continue
        query = query_of_target[:, start:end].long()  # [S, t]
        is_pair = (query >= 0) & (query < num_queries)
        has = torch.nn.functional.one_hot(query.where(is_pair, num_queries), num_queries + 1)[..., :num_queries]
        target_of_query = has.sum(0).max(0).indices  # [Q], the first of equal counts
        is_first = (has * has.cumsum(0) == has).all(-1)  # no earlier set has it
        target = torch.arange(end - start, device=query.device)
        kept = is_pair & is_first & (target_of_query[query.where(is_pair, 0)] == target)
        united[:, start:end] = query_of_target[:, start:end].where(kept, -1)
    return united


@torch.library.register_fake("detr_fast::unite")
def _(query_of_target: Tensor, offsets: Tensor, num_queries: int) -> Tensor:
    return query_of_target.new_empty(query_of_target.shape)
