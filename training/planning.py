"""What a training takes, before anything is spent: an update carried out on tensors of no content.

FakeTensorMode runs the stage's own code, its optimizer and averages on shapes alone. So parameters,
bytes and FLOPs are counted, not modelled, and a network of full size costs seconds. It plays a CPU,
where bf16's attention is taken in float32: a GPU holds a little less, and so does compiled code.
Time is a roofline: each kernel takes its FLOPs or its bytes, whichever takes longer. What workers
tell each other, waiting for data and the encoding of pictures are not in it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.schema import PICTURE_EMBEDDING

from .accelerators import Accelerator
from .config import TrainingConfig
from .denoising import filled
from .ema import Ema, PowerAverages
from .encoders.shapes import Shape, class_names, foreseen, patch_width
from .encoders.sources import Source, here
from .optimizer import Optimizer, gradient_norm
from .sharding import blocks
from .stage import Batch, Stage, distinct_tensors, trainable
from .stages import create

CAPTION = "words"
CPU = torch.device("cpu")


class Kernel(NamedTuple):
    """One operation on the device."""

    flops: float
    """Of products and convolutions; 0 for all else."""
    moved: float
    """Bytes it reads and writes."""


class Tally(TorchDispatchMode):
    """Lists the kernels that run in it, and follows the bytes of what they made and is still held.

    `peak` is the most at any time, without what was handed to `leave_out`.
    """

    def __init__(self):
        super().__init__()
        self.kernels: list[Kernel] = []
        self.now = self.peak = 0
        self._held: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in read}
        written = [x for x in made if x.untyped_storage()._cdata not in storages]
        if written or func._schema.is_mutable:  # a view is no work
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            touched = (*read, *(written or made))
            self.kernels.append(Kernel(float(flops), float(sum(x.nbytes for x in touched))))
        for x in written:
            self._hold(x.untyped_storage())
        return out

    def leave_out(self, tensor: Tensor) -> None:
        self._drop(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())

    def _hold(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._held:
            self._held.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        if place in self._held:
            self._held.remove(place)
            self.now -= size


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker. All but the activations are there all the time."""

    weights: int
    """float32, buffers included."""
    gradients: int
    optimizer: int
    averages: int
    activations: int
    """The most that is held at once of all else that an update computes."""
    gathered: int = 0
    """FSDP: parameters that are whole for a while."""
    unsharded: int = 0
    """FSDP: all that is held while there is a whole stage on a worker. Each starts with one, makes
    its first weights and counts its FLOPs, gradients and all, before it is dealt; the first one
    measures and draws with one, beside its share."""

    @property
    def kept(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages + self.gathered

    @property
    def total(self) -> int:
        return max(self.kept + self.activations, self.unsharded)


@dataclass(frozen=True)
class Update:
    """One worker's share of an update: what it holds and what it computes."""

    rows: int
    parameters: int
    trained: int
    forward_flops: float
    """Of all rows."""
    kernels: tuple[Kernel, ...]
    """Forward and backward of all rows."""
    applied: tuple[Kernel, ...]
    """Clipping, optimizer, averages: once per update."""
    replicated: Memory
    """Every worker holds all (DDP, or a single worker)."""
    sharded: Memory
    """FSDP: every worker holds its share."""
    checkpoint: int
    """Bytes of a checkpoint: weights, averages, optimizer state."""

    @property
    def flops_per_image(self) -> float:
        """Forward and backward as they run: what is computed again counts again."""
        return sum(kernel.flops for kernel in self.kernels) / self.rows

    def seconds(
        self, device: Accelerator, precision: str, compiled: bool, micro_batches: int = 1
    ) -> float:
        """The roofline of an update. Compiled, elementwise work rides along with the products."""
        rate = device.matmul[precision] * device.utilisation

        def taken(kernels: Iterable[Kernel]) -> float:
            return sum(max(k.flops / rate, k.moved / device.bandwidth) for k in kernels)

        work = (k for k in self.kernels if k.flops or not compiled)
        return micro_batches * taken(work) + taken(self.applied)


def count(
    kind: str,
    config: Any,
    training: TrainingConfig,
    batch: Callable[[], Batch],
    workers: int = 1,
    clip: Any = None,
) -> Update:
    """An update of a stage that exists in shape alone; `batch()` makes a worker's rows. `clip` is
    the CLIP that it may look through: the config of one that is trained first, or where a
    pretrained one is. ValueError where it looks through a network that is not here."""
    if hasattr(config, "text"):
        # Words are read where tensors have content, and then remembered.
        from .contrastive import tokenizer

        tokenizer(config.text.vocabulary, config.text.context)([CAPTION])
    named = clip if isinstance(clip, str) else ""
    opened = {
        name: _opened(name, it, tower)
        for name, it in _looking(config).items()
        if (tower := it.tower or named)
    }
    maps = getattr(config, "map", None)
    segmenter = _segmenter(maps.segmenter) if maps and maps.segmenter else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        stage = create(config.kind, config)
        if segmenter:
            cast(Any, stage).mapper.opened[CPU] = segmenter
        for name, it in _looking(stage).items():
            if name in opened:
                it.opened[CPU] = opened[name]
            elif clip is not None:
                it.tower = Source("clip", "clip", False, create("clip", clip))
        return carry_out(stage, training, batch(), workers)


def _looking(owner: Any) -> dict[str, Any]:
    """What, in a stage or its config, looks at pictures through a frozen network."""
    named = {name: getattr(owner, name, None) for name in ("perceptual", "alignment")}
    return {name: it for name, it in named.items() if it is not None}


def _opened(name: str, config: Any, tower: str) -> Any:
    """The network that a recipe names, from this machine's disk."""
    from .encoders import perceptual

    if (found := here(tower)) is None:
        raise ValueError(
            f"{name}.tower: {tower} is not here, so what it computes is not known: fetch it "
            "first, or plan without it"
        )
    if name == "alignment":
        return perceptual.patches(str(found), CPU, config.side)
    return perceptual.load(str(found), CPU)


def _segmenter(where: str) -> Any:
    """What makes label maps, from this machine's disk."""
    from .encoders import segmenter

    if (found := here(where)) is None:
        raise ValueError(
            f"map.segmenter: {where} is not here, so what it computes is not known: fetch it "
            "first, or plan without it"
        )
    return segmenter.load(str(found), CPU)


def carry_out(stage: Stage, training: TrainingConfig, batch: Batch, workers: int = 1) -> Update:
    """An update of a stage on the CPU, tallied. The optimizer is tallied at its second step: the
    first one makes its state.
    """
    optimizer = Optimizer(training.optimizer, stage.train())
    averages = Ema(stage, training.ema_halflife_images, training.ema_ramp)
    powers = PowerAverages(stage, training.ema_sigma_rel)
    computing, applying = Tally(), Tally()
    for parameter in trainable(stage).values():
        parameter.register_post_accumulate_grad_hook(lambda p: computing.leave_out(p.grad))
    with computing:
        with torch.autocast("cpu", torch.bfloat16, enabled=training.precision_on("cpu") == "bf16"):
            losses = _losses(stage, batch)
        forward = sum(kernel.flops for kernel in computing.kernels)
        (losses.sum() / training.batch).backward()
    for tally in (Tally(), applying):
        with tally:
            norm, skip = gradient_norm(optimizer.parameters), torch.tensor(False)
            optimizer.step(training.learning_rate, norm, training.max_grad_norm, skip)
            averages.update(training.batch)
            powers.update(training.batch)
    peak, state = max(computing.peak, applying.peak), optimizer.tensors()
    averaged = [*averages.tensors().values(), *powers.tensors().values()]
    saved = [*distinct_tensors(stage).values(), *averaged, *state.values()]
    return Update(
        rows=len(batch["position"]),
        parameters=sum(p.numel() for p in stage.parameters()),
        trained=sum(p.numel() for p in optimizer.parameters.values()),
        forward_flops=forward,
        kernels=tuple(computing.kernels),
        applied=tuple(applying.kernels),
        replicated=_memory(stage, state, averaged, peak, 1),
        sharded=_memory(stage, state, averaged, peak, workers),
        checkpoint=_bytes(saved, 1),
    )


def _memory(
    stage: Stage,
    state: Mapping[str, Tensor],
    averaged: Iterable[Tensor],
    activations: int,
    workers: int,
) -> Memory:
    """What is trained, its gradients, averages and state, cut along the first dimension as
    FSDP2 does; the largest share. Frozen parameters and buffers are whole everywhere.
    """
    trained = list(trainable(stage).values())
    ours = _bytes(trained, workers)
    others = [*stage.buffers(), *(p for p in stage.parameters() if not p.requires_grad)]
    entire = [*trained, *others]
    for it in _looking(stage).values():
        others += [p for opened in it.opened.values() for p in opened.network.parameters()]
    weights, optimizer = ours + _bytes(others, 1), _bytes(state.values(), workers)
    averages = _bytes(averaged, workers)
    starting = 2 * _bytes(trained, 1) + _bytes(others, 1)
    measuring = weights + optimizer + averages + _bytes(entire, 1)
    return Memory(
        weights=weights,
        gradients=ours,
        optimizer=optimizer,
        averages=averages,
        activations=activations,
        gathered=_gathered(stage) if workers > 1 else 0,
        unsharded=max(starting, measuring) if workers > 1 else 0,
    )


def _bytes(tensors: Iterable[Tensor], workers: int) -> int:
    total = 0
    for x in tensors:
        rows = x.shape[0] if x.ndim else 1
        total += -(-rows // workers) * (x.numel() // rows if rows else 0) * x.element_size()
    return total


def _gathered(stage: Stage) -> int:
    """Whole parameters under FSDP: those of no block all the time; of the blocks, the largest with
    its gradient, and the next one, which is fetched ahead.
    """
    sizes = [_bytes(trainable(block).values(), 1) for block in blocks(stage)]
    root = _bytes(trainable(stage).values(), 1) - sum(sizes)
    return root + 3 * max(sizes, default=0)


def _losses(stage: Stage, batch: Batch) -> Tensor:
    if stage.kind != "t5":
        return stage(batch)["loss"].float()
    # Which spans are cut out depends on content; how many tokens are left does not.
    read, written = batch["lengths"]
    rows = len(batch["position"])
    model: Any = getattr(stage, "model")  # noqa: B009
    ids, labels = (torch.zeros(rows, n, dtype=torch.int64) for n in (read, written))
    logits = model(input_ids=ids, decoder_input_ids=labels, use_cache=False).logits.float()
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(1)


@dataclass(frozen=True)
class Captions:
    """How long captions are taken to be. Alt texts of the web have some 10 words, what models write
    about a picture 50 to 150."""

    words: int = 20

    def tokens(self, shape: Shape, words: int | None = None) -> int:
        """1.3 byte pairs a word and two marks, 1.4 sentence pieces or 6 bytes a word and one mark:
        English prose. At most what is read."""
        each, marks = {"pairs": (1.3, 2), "pieces": (1.4, 1), "bytes": (6.0, 1)}[shape.tokens]
        return min(shape.limit, round(each * (self.words if words is None else words)) + marks)

    def longest(self, shape: Shape) -> int:
        """To which a batch is padded: a caption of twice as many words."""
        return self.tokens(shape, 2 * self.words)

    def stored_bytes(self, shape: Shape) -> int:
        """Of one caption: its tokens, unpadded, and the pooled vector, float16; an offset. Where a
        part of a token repeats with its word: which word it is, and not the words themselves, which
        all captions of a shard share."""
        each = 2 * (shape.width - shape.repeats) + (4 if shape.repeats else 0)
        return self.tokens(shape) * each + 2 * shape.pooled + 8


def informed(config: Any, shapes: Mapping[str, Shape]) -> Any:
    """A base's config with the channels and contexts that it leaves to its inputs, as
    denoising.resolved fills them in once these are there."""
    if config.kind != "base":
        return config
    texts = {name: (it.width, it.pooled) for name, it in shapes.items() if name != "autoencoder"}
    channels = shapes["autoencoder"].width if "autoencoder" in shapes else None
    embedding, patches = None, None
    if "clip" in shapes:
        embedding, patches = shapes["clip"].pooled, shapes["clip"].patches
    if config.alignment and (tower := config.alignment.tower):
        patches = config.alignment.width or (here(tower) and patch_width(tower))
    classes = ()
    if config.map and not config.map.names and (found := here(config.map.segmenter)):
        classes = class_names(str(found))
    return filled(config, channels, texts, embedding, patches, classes)


def batch_of(
    config: Any,
    rows: int,
    size: tuple[int, int],
    captions: Captions,
    shapes: Mapping[str, Shape] | None = None,
) -> Batch:
    """A batch of zeros for a stage. `size` is (height, width) in pixels; `shapes` are those of the
    encoders that a base's batch comes from.
    """
    shapes = shapes or {}
    height, width = size
    batch: Batch = {
        "position": torch.arange(rows),
        "pixels": torch.zeros(rows, 3, height, width, dtype=torch.uint8),
        "caption": [CAPTION] * rows,
        "label": [None] * rows,
    }
    if config.kind == "t5":
        length = captions.longest(foreseen("t5", config, None))
        lost = max(1, round((length - 1) * config.corrupted))
        spans = max(1, round(lost / config.mean_span))
        batch["lengths"] = (length - lost + spans, lost + spans + 1)
    if config.kind != "base":
        return batch
    if config.data == "moments":
        f = shapes["autoencoder"].factor
        channels = (1 + shapes["autoencoder"].posterior) * config.network.in_channels
        batch["moments"] = torch.zeros(rows, channels, height // f, width // f)
    embedding = f"{PICTURE_EMBEDDING}_pooled"
    if config.data == "embedding":
        batch[embedding] = torch.ones(rows, config.channels)
    for context in config.network.contexts:
        name = context.name
        if name == PICTURE_EMBEDDING:
            batch[embedding] = torch.ones(rows, context.pooled_width)
            continue
        length = captions.longest(shapes[name])
        batch[f"{name}_tokens"] = torch.zeros(rows, length, context.width)
        batch[f"{name}_mask"] = torch.ones(rows, length, dtype=torch.bool)
        batch[f"{name}_pooled"] = torch.zeros(rows, context.pooled_width)
    return batch


@dataclass(frozen=True)
class Estimate:
    """A stage's training on a number of workers."""

    update: Update
    """Of one micro-batch, and what follows the last of them."""
    micro_batches: int
    """Of a worker, one after the other."""
    workers: int
    batch: int
    images: int
    seconds: float
    """Of one update."""
    fitting_rows: int
    """Rows at once that fit a worker as configured; 0: not even one."""
    fitting_rows_sharded: int

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds

    @property
    def hours(self) -> float:
        return self.images / self.images_per_second / 3600

    @property
    def device_hours(self) -> float:
        return self.hours * self.workers

    thrifty_rows: int | None
    """Rows that would fit with blocks computed again; None where that is so, or cannot be."""
    divides: bool
    """Whether the configuration knows micro-batches."""
    fsdp: bool = False
    """Whether the workers hold their shares, as configured."""

    @property
    def memory(self) -> Memory:
        """On each worker as configured."""
        return self.update.sharded if self.fsdp else self.update.replicated

    def fits(self, device: Accelerator) -> bool:
        return self.memory.total <= device.usable

    def advice(self, device: Accelerator) -> str:
        """What would help a training that does not fit; empty for one that does."""
        if self.fits(device):
            return ""
        update, free = self.update, device.usable / 1e9
        lines = [
            f"{self.memory.total / 1e9:.3g} GB a worker do not fit {device.name} "
            f"({free:.3g} GB usable)"
        ]
        if self.fitting_rows:
            key = f"training.micro_batch={self.fitting_rows}" if self.divides else "smaller batches"
            lines.append(f"{self.fitting_rows} rows at once would, not {update.rows} ({key})")
        if self.thrifty_rows and self.thrifty_rows > self.fitting_rows:
            lines.append(f"{self.thrifty_rows} rows with config.network.recompute=true")
        if self.fitting_rows_sharded > self.fitting_rows:
            sharded = f"FSDP over {self.workers} workers (training.fsdp=true)"
            lines.append(f"{self.fitting_rows_sharded} rows with {sharded}")
        if self.fitting_rows and (more := -(-self.batch // self.fitting_rows)) > self.workers:
            lines.append(f"{more} workers would share the batch in rows that fit")
        if self.memory.unsharded > device.usable:
            lines.append(
                f"each worker starts with the whole model and its gradients, and the first one "
                f"measures with one, which takes {self.memory.unsharded / 1e9:.3g} GB: take a "
                "device with more memory"
            )
        if len(lines) == 1:
            kept = self.memory.kept / 1e9
            lines.append(
                f"{kept:.3g} GB of it are there whatever the rows: take a device with more memory, "
                "or more workers and FSDP"
            )
        return "; ".join(lines)


def estimate(
    kind: str,
    config: Any,
    training: TrainingConfig,
    make_batch: Callable[[Any, int], Batch],
    device: Accelerator,
    workers: int,
    clip: Any = None,
) -> Estimate:
    """Of a stage whose global batch is dealt to `workers`; `make_batch(config, rows)` makes what
    `count` asks for, `clip` is handed to it."""
    if training.precision == "auto":
        training = replace(training, precision=device.precision)
    micro = getattr(training, "micro_batch", 0)
    parts = -(-training.batch // micro) if micro else workers
    rows, few = -(-training.batch // parts), 2  # a batch norm has no deviation of one row

    def counted(config: Any, rows: int) -> Update:
        return count(kind, config, training, lambda: make_batch(config, rows), workers, clip)

    def fitting(memory: Memory, least: Memory) -> int:
        """Activations grow by the row."""
        if memory.total <= device.usable:
            return rows
        if memory.unsharded > device.usable:
            return 0
        each = (memory.activations - least.activations) / max(rows - few, 1)
        more = (device.usable - memory.kept - least.activations) / max(each, 1)
        return max(0, min(rows - 1, few + math.floor(more)))

    fsdp = training.fsdp and workers > 1

    def held(update: Update) -> Memory:
        return update.sharded if fsdp else update.replicated

    update = counted(config, rows)
    fits = held(update).total <= device.usable
    least = update if fits else counted(config, few)
    thrifty = None if fits else thriftier(config)
    each = -(-parts // workers)
    return Estimate(
        update=update,
        micro_batches=each,
        workers=workers,
        batch=training.batch,
        images=training.steps * training.batch,
        seconds=update.seconds(device, training.precision, training.compile, each),
        divides=hasattr(training, "micro_batch"),
        fsdp=fsdp,
        fitting_rows=fitting(held(update), held(least)),
        fitting_rows_sharded=fitting(update.sharded, least.sharded),
        thrifty_rows=thrifty and fitting(held(counted(thrifty, rows)), held(counted(thrifty, few))),
    )


def thriftier(config: Any) -> Any | None:
    """A stage's config with its network's blocks computed again rather than kept; None where it is
    so already, or the network cannot."""
    network = getattr(config, "network", None)
    if network is None or getattr(network, "recompute", True):
        return None
    return replace(config, network=replace(network, recompute=True))
