"""The order of shards is fresh in each epoch, the same on every machine, and dealt out between ranks."""

from pathlib import Path

from medclip_lab.data.order import rank_shards
from medclip_lab.data.shards import Shard

SHARDS = [Shard(Path(f"train-{n:05d}.tar"), "train", 10, 0, "") for n in range(12)]


def names(epoch: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> list[str]:
    return [shard.path.name for shard in rank_shards(SHARDS, epoch, rank, world_size, seed)]


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    orders = [names(epoch, seed=seed) for epoch in range(4) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 12
    assert all(sorted(order) == sorted(names(0)) for order in orders)
    assert names(2, seed=1) == names(2, seed=1)


def test_ranks_share_one_permutation() -> None:
    shares = [names(3, rank, 3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(names(3))
    assert len({len(share) for share in shares}) == 1
