"""Vectors of a codebook that nobody chooses begin anew, at places of the batch."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from pipeline.plan import dealt
from training import stages
from training.checkpoint import TrainState
from training.config import TrainingConfig
from training.loop import train
from training.networks import Codebook, CodebookConfig

SIDE, BATCH = 16, 8
NETWORK: dict[str, Any] = {"channels": 8, "channel_mult": [1, 2], "latent_channels": 3}
CONFIG = TrainingConfig(images=BATCH * 12, batch=BATCH, learning_rate=3e-3)


def stage_of(revive_images: int) -> Any:
    """Its vectors lie where no place is, but for one: that takes all of them."""
    torch.manual_seed(0)
    codebook = {"codes": 16, "revive_images": revive_images}
    stage = stages.create("autoencoder", {"network": {**NETWORK, "codebook": codebook}})
    with torch.no_grad():
        stage.network.codebook.vectors[1:] += 100
    return stage


class Scenes:
    """Batches of the drawn scenes, in `parts` micro-batches."""

    def __init__(self, scenes, parts: int = 1):
        self.pixels, self.parts = scenes[0], parts

    def rows(self, step: int, own: slice) -> dict[str, np.ndarray]:
        position = np.arange(BATCH * step, BATCH * (step + 1))[own]
        return {"pixels": self.pixels[position % len(self.pixels)], "position": position}

    def batches(self, start_step: int = 0, prefetch: int = 2):
        for step in range(start_step, 10**6):
            for part in dealt(self.parts, 0, 1):
                first, stop = (BATCH * n // self.parts for n in (part, part + 1))
                yield self.rows(step, slice(first, stop))


def used(stage: Any, scenes) -> int:
    codebook = stage.network.codebook
    with torch.no_grad():
        z = stage.encode(torch.from_numpy(scenes[0]))
    return int((codebook.counts(codebook.nearest(z)) > 0).sum())


def test_who_is_idle_for_long_enough_begins_anew_and_nobody_else():
    codebook = Codebook(CodebookConfig(codes=6, revive_images=8), 3)
    before = codebook.vectors.detach().clone()
    places = torch.arange(12.0).view(4, 3)
    for chosen, idle in (([0, 1], [0, 0, 4, 4, 4, 4]), ([1, 2], [4, 0, 0, 8, 8, 8])):
        hit = torch.zeros(6, dtype=torch.bool)
        hit[chosen] = True
        again, otherwise = copy.deepcopy(codebook), copy.deepcopy(codebook)
        dead, anew = codebook.revived(hit, places, seed=3)
        assert codebook.idle.tolist() == idle
    assert dead.tolist() == [False] * 3 + [True] * 3
    near = torch.cdist(anew[dead], places).argmin(1)
    assert len(set(near.tolist())) == 3, "not one place for all"
    assert torch.cdist(anew[dead], places).amin(1).max() < 0.3
    assert anew.equal(again.revived(hit, places, seed=3)[1])
    assert not anew.equal(otherwise.revived(hit, places, seed=4)[1])
    assert codebook.vectors.equal(before)


def test_dead_vectors_come_to_be_used(scenes):
    plain, revived = stage_of(0), stage_of(BATCH * 2)
    for stage in (plain, revived):
        assert used(stage, scenes) == 1
        list(train(stage, Scenes(scenes), CONFIG))
    assert used(plain, scenes) == 1
    assert used(revived, scenes) > 4
    assert "network.codebook.idle" in revived.state_dict()
    assert revived.exported().keys() == plain.exported().keys()


def test_the_same_are_revived_in_micro_batches(scenes):
    whole, cut = stage_of(BATCH * 2), stage_of(BATCH * 2)
    short = replace(CONFIG, images=BATCH * 5)
    list(train(whole, Scenes(scenes), short))
    list(train(cut, Scenes(scenes, 4), replace(short, micro_batch=2)))
    assert whole.network.codebook.idle.equal(cut.network.codebook.idle)
    one, other = (it.network.codebook.vectors for it in (whole, cut))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_workers_revive_what_one_alone_does(scenes):
    """Two that each saw half of the batch; in a thread each, they wait for each other's sums."""
    alone, loader = stage_of(BATCH), Scenes(scenes)
    workers = [copy.deepcopy(alone) for _ in range(2)]
    barrier, brought = threading.Barrier(2), [torch.empty(0)] * 2

    def look(stage, own, total):
        batch = {n: torch.from_numpy(it) for n, it in loader.rows(0, own).items()}
        stage.train()(batch)
        stage.renew(0, BATCH, total, torch.tensor(False))

    def work(rank: int) -> None:
        def total(tensor):
            brought[rank] = tensor
            barrier.wait(60)
            return brought[0] + brought[1]

        look(workers[rank], slice(4 * rank, 4 * rank + 4), total)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    look(alone, slice(None), lambda tensor: tensor)
    vectors = [it.network.codebook.vectors for it in (alone, *workers)]
    assert vectors[1].equal(vectors[2])
    torch.testing.assert_close(vectors[0], vectors[1])
    assert vectors[0].abs().max() < 50, "not all of the dead were revived"


def test_resumed_it_is_the_same_bit_for_bit(scenes):
    """Stopped between two revivals: how long each was idle is in the state."""
    whole = stage_of(BATCH * 3)
    reference = [float(p.loss) for p in train(whole, Scenes(scenes), CONFIG)]
    first, states = stage_of(BATCH * 3), []
    for progress in train(first, Scenes(scenes), CONFIG):
        if progress.step == 5:
            state = progress.state
            tensors = load(save({n: t.contiguous() for n, t in state.tensors.items()}))
            states = [TrainState(tensors, state.step, state.images_seen, state.numbers)]
            break
    resumed = stage_of(BATCH * 3)
    rest = [float(p.loss) for p in train(resumed, Scenes(scenes), CONFIG, state=states[0])]
    assert rest == reference[5:]
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(resumed.state_dict()[name]), name


def test_what_was_skipped_revives_nobody(scenes):
    stage = stage_of(BATCH)
    batch = {n: torch.from_numpy(it) for n, it in Scenes(scenes).rows(0, slice(None)).items()}
    before = stage.network.codebook.vectors.detach().clone()
    stage.train()(batch)
    stage.renew(0, BATCH, lambda tensor: tensor, torch.tensor(True))
    assert stage.network.codebook.vectors.equal(before)
    assert not stage.network.codebook.idle.any()


def test_a_negative_wait_is_refused():
    with pytest.raises(ValueError, match="revive_images not negative"):
        CodebookConfig(revive_images=-1)
