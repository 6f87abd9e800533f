"""The pictures of a shard, decoded ahead of whoever works on them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from . import storage

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")


def decoded(
    dataset: str, shard: str, keys: Sequence[str], batch: int, make: Callable[[Image], T]
) -> Iterator[list[T]]:
    """What `make` makes of each picture, in batches; two are made while one is worked on.

    ValueError when the shard's samples are not `keys`, or one of its pictures does not decode.
    """
    from . import images, shards

    url = storage.join(dataset, "shards", f"{shard}.tar")

    def decode(sample: shards.ShardSample) -> T:
        try:
            picture, _ = images.decode(sample.image, images.STORED)
        except images.Rejected as error:
            raise ValueError(
                f"{url}, sample {sample.key}: the stored picture cannot be decoded "
                f"({error.reason}: {error.detail}); delete the dataset's shard and ingest again"
            ) from None
        return make(picture)

    samples = list(shards.read_shard(url))
    if [sample.key for sample in samples] != list(keys):
        raise ValueError(f"{url}: its samples are not those of its table; ingest again")
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode") as pool:
        ahead: deque[list[Future[T]]] = deque()
        for first in range(0, len(samples) + 2 * batch, batch):
            ahead.append([pool.submit(decode, s) for s in samples[first : first + batch]])
            if len(ahead) > 2 and (now := ahead.popleft()):
                yield [future.result() for future in now]
