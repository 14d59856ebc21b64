"""Which study comes when: a pure function of manifest, seed, epoch and rank."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from webdataset.filters import _shuffle as shuffle_buffer

from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.shards import Shard, read_shard
from medclip_lab.errors import UserError


def rank_shards(
    shards: Sequence[Shard], epoch: int, rank: int, world_size: int, seed: int, shuffle: bool = True
) -> list[Shard]:
    """The shards a rank reads in an epoch: a fresh permutation each epoch, dealt out in turn."""
    order = list(shards)
    if shuffle:
        random.Random(f"shards {seed} {epoch}").shuffle(order)
    return order[rank::world_size]


def samples_per_rank(shards: Sequence[Shard], epoch: int, world_size: int, seed: int, shuffle: bool = True) -> int:
    """How many studies of an epoch every rank reads: the number its poorest rank has.

    With equal numbers no rank waits for another that has run out. What is left over differs from epoch to epoch.

    Raises:
        UserError: fewer shards than ranks, so one rank would have nothing.
    """
    if len(shards) < world_size:
        raise UserError(
            f"{len(shards)} shards cannot be split between {world_size} ranks: prepare with smaller --samples-per-shard"
        )
    return min(
        sum(shard.samples for shard in rank_shards(shards, epoch, rank, world_size, seed, shuffle))
        for rank in range(world_size)
    )


def epoch_of_studies(
    shards: Sequence[Shard],
    epoch: int,
    rank: int,
    world_size: int,
    seed: int,
    quarantine: Quarantine,
    shuffle_size: int,
) -> Iterator[dict[str, Any]]:
    """One rank's studies of one epoch; `shuffle_size` 0 keeps the order of the shards.

    Shards are read one after the other from first to last, which suits disks and object stores; a buffer of
    `shuffle_size` studies mixes them across shards.
    """
    shuffle = shuffle_size > 0
    mine = rank_shards(shards, epoch, rank, world_size, seed, shuffle)
    studies: Iterator[dict[str, Any]] = (study for shard in mine for study in read_shard(shard, quarantine))
    if shuffle:
        chance = random.Random(f"studies {seed} {epoch} {rank}")
        studies = shuffle_buffer(studies, bufsize=shuffle_size, initial=shuffle_size, rng=chance)
    limit = samples_per_rank(shards, epoch, world_size, seed, shuffle)
    for number, study in enumerate(studies):
        if number == limit:
            return
        yield study
