"""What `darkroom plan` promises beside what a training does: python -m tests.benchmarks.planned

Small stages of `shapes` on one thread of this machine, by a probe of four seconds a kind (it takes
the best of several, which are few where other work has the machine). The training counts its
processor seconds, which other work hardly touches. The plan wants to be within a factor of three:
it knows matrix products and bandwidth, not how small the products are.
"""

from __future__ import annotations

import os
import tempfile
import time
from unittest import mock

STAGES = ("autoencoder", "clip", "t5")
FACTOR = 3


def measured(stage: str) -> tuple[float, float]:
    """Pictures a second: (planned, trained)."""
    from flows.build_dataset import encode_pixels, ingest_sources
    from flows.line import Line
    from flows.plan import plan
    from flows.recipe import load
    from flows.settings import settings
    from flows.train_stage import make_job
    from training import job

    words = ["data.scenes=600", "executor.kind=local", f"{stage}.training.threads=1"]
    words += [f"{stage}.training.{it}" for it in ("images=1920", "batch=64", "log_images=64")]
    planned = plan("shapes", words, device=None)["stages"][stage]["images_per_second"]
    line = Line(load("shapes", words), settings())
    ingest_sources(line)
    encode_pixels(line, line.manifest())
    spent: list[tuple[int, float]] = []
    job.run(
        make_job(line, stage, line.manifest()),
        on_progress=lambda it: spent.append((it["images_seen"], time.process_time())),
    )
    (first, began), (last, ended) = spent[4], spent[-1]
    return planned, (last - first) / (ended - began)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="darkroom-") as home:
        os.environ["DARKROOM_HOME"] = home
        from training import accelerators

        patient = accelerators.probe(seconds=4)
        with mock.patch.object(accelerators, "probe", return_value=patient):
            for stage in STAGES:
                planned, trained = measured(stage)
                met = "met" if 1 / FACTOR < planned / trained < FACTOR else "MISSED"
                print(
                    f"{stage:12s} planned {planned:7.0f}  trained {trained:7.0f} images/s, "
                    f"{planned / trained:.2f} times (wanted: within {FACTOR}): {met}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
