"""How DeepSpeed's ZeRO lays tensors out in flat shards, and how it steps an optimizer over them, for one rank."""

import math
from dataclasses import dataclass

import torch

from tests.reference_optimizers import DECAY, SETTINGS, problem
from trainer.engine.lamb import Lamb, Segments

# Tensors of `problem` in the parameter groups, and the parts of a group that are stepped at once: all of it in stages 1
# and 2 (stage_1_and_2.py, _optimizer_step), its sub-groups one after the other in stage 3 (stage3.py, _optimizer_step).
NOISE = 17.0
DECAYS = (DECAY, DECAY, 0.0)
PARTS = {
    "zero1": [(0, [0, 2, 5]), (1, [3]), (2, [1, 4, 6])],
    "zero3": [(0, [0, 5]), (0, [2]), (1, [3]), (2, [1, 4, 6])],
}


@dataclass(frozen=True)
class Piece:
    """flat[start:stop] of a rank is tensor `index`, flattened, from `offset` on."""

    index: int
    start: int
    stop: int
    offset: int


def cut(kind, sizes, world):
    """For each rank the pieces of tensors of these sizes, and the length of its flat tensor."""
    return (_cut_together if kind == "zero1" else _cut_each)(sizes, world)


def _cut_together(sizes, world):
    """Stages 1 and 2: one long tensor, padded to a multiple of twice the ranks, in equal shares."""
    share = math.ceil(sum(sizes) / (2 * world)) * 2
    layouts = []
    for low in range(0, share * world, share):
        pieces, at = [], 0
        for index, size in enumerate(sizes):
            start, stop = max(at, low), min(at + size, low + share)
            if start < stop:
                pieces.append(Piece(index, start - low, stop - low, start - at))
            at += size
        layouts.append((pieces, share))
    return layouts


def _cut_each(sizes, world):
    """Stage 3: each tensor in equal shares, the last one padded; a rank's shares one after the other."""
    layouts = []
    for rank in range(world):
        pieces, at = [], 0
        for index, size in enumerate(sizes):
            share = math.ceil(size / world)
            offset = min(size, rank * share)
            length = min(size, offset + share) - offset
            if length:
                pieces.append(Piece(index, at, at + length, offset))
            at += share
        layouts.append((pieces, at))
    return layouts


def flat_of(tensors, pieces, length):
    """A rank's flat tensor; its padding is full of NOISE, so that a use of it shows."""
    flat = torch.full((length,), NOISE)
    for piece in pieces:
        size = piece.stop - piece.start
        flat[piece.start : piece.stop] = tensors[piece.index].flatten()[piece.offset : piece.offset + size]
    return flat


def train_rank(kind, rank, world, reduce, sharded=True):
    """The flat tensors of one rank after the steps of `problem`, one for each part; `sharded`: Lamb is told of them."""
    weights, gradients, _ = problem()
    parts = []
    for group, members in PARTS[kind]:
        sizes = [weights[index].numel() for index in members]
        pieces, length = cut(kind, sizes, world)[rank]
        flat = torch.nn.Parameter(flat_of([weights[index] for index in members], pieces, length))
        parts.append((group, members, pieces, flat))
    segments = {
        flat: Segments(tuple((piece.index, piece.start, piece.stop) for piece in pieces), len(members))
        for _, members, pieces, flat in parts
    }
    flats = [[flat for group, _, _, flat in parts if group == number] for number in range(len(DECAYS))]
    optimizer = Lamb(
        [{"params": own, "weight_decay": decay} for own, decay in zip(flats, DECAYS, strict=True)], **SETTINGS
    )
    if sharded:
        optimizer.shard(segments.__getitem__, reduce)
    whole_groups = optimizer.param_groups
    for at_step in gradients:
        for group, members, pieces, flat in parts:
            flat.grad = flat_of([at_step[index] for index in members], pieces, flat.numel())
            optimizer.param_groups = [whole_groups[group] | {"params": [flat]}]
            optimizer.step()
    return [flat.detach() for *_, flat in parts]


def joined(kind, flats_of_ranks):
    """The whole tensors out of the ranks' flat ones."""
    weights = [torch.full_like(weight, torch.nan) for weight in problem()[0]]
    for number, members, layouts in _laid_out(kind, len(flats_of_ranks)):
        for (pieces, _), flats in zip(layouts, flats_of_ranks, strict=True):
            for piece in pieces:
                whole = weights[members[piece.index]].view(-1)
                stop = piece.offset + piece.stop - piece.start
                whole[piece.offset : stop] = flats[number][piece.start : piece.stop]
    return weights


def padding(kind, flats_of_ranks):
    """What lies in the flat tensors and in no piece of them."""
    kept = []
    for number, _, layouts in _laid_out(kind, len(flats_of_ranks)):
        for (pieces, length), flats in zip(layouts, flats_of_ranks, strict=True):
            unused = torch.ones(length, dtype=torch.bool)
            for piece in pieces:
                unused[piece.start : piece.stop] = False
            kept.append(flats[number][unused])
    return torch.cat(kept)


def _laid_out(kind, world):
    sizes = [weight.numel() for weight in problem()[0]]
    for number, (_, members) in enumerate(PARTS[kind]):
        yield number, members, cut(kind, [sizes[index] for index in members], world)
