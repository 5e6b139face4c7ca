"""What `--watch_every 10` costs: the default run's steps in pairs of tens, with and without one that is watched.

`python docs/measure_watch.py`, some four minutes on two cores. The order within a pair alternates. What it says is the
median of the pairs' ratios and an interval in which the true median lies with 95 %, by the sign test. The watched step
is compiled beside the plain one; that time is said apart. Writing the numbers to metrics.jsonl is measured too.
"""

import dataclasses
import tempfile
import time
from math import comb
from pathlib import Path

import numpy as np

from mintrain import options, sharding, step
from mintrain.data import load_data, train_batch
from mintrain.metrics import Log

PAIRS, STEPS = 24, 10


def main() -> None:
    cfg, *_ = options.load([])
    cfg = dataclasses.replace(cfg, watch_every=STEPS, steps=2 * PAIRS * STEPS)
    mesh = sharding.make_mesh(cfg.mesh)
    text, _, _ = load_data(cfg)
    abstract, shapes = step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh)
    compiled = {}
    for watched in (False, True):
        start = time.perf_counter()
        compiled[watched] = step.make_train_step(cfg, mesh, watched).trace(abstract, shapes).lower().compile()
        print(f"{'watched' if watched else 'plain'} step: compiled in {time.perf_counter() - start:.1f} s", flush=True)
    state, at = step.new_state(cfg, mesh), 0
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder), 0, cfg, text.bytes_per_token)

        def ten(watched: bool) -> float:
            nonlocal state, at
            start = time.perf_counter()
            for i in range(STEPS):
                state, result = compiled[watched and i == 0](state, train_batch(text, shapes, at, cfg.seed))
                at += 1
                log.step(at, result, 0)
            return time.perf_counter() - start

        for watched in (False, True):  # once, so that nothing is new
            ten(watched)
        ratios = []
        for i in range(PAIRS):
            times = {watched: ten(watched) for watched in ((False, True) if i % 2 else (True, False))}
            ratios.append(times[True] / times[False])
            print(f"{times[False]:.2f} s plain, {times[True]:.2f} s watched: {ratios[-1]:.4f}", flush=True)
    ratios = np.sort(ratios)
    outside = [sum(comb(PAIRS, j) for j in range(k)) / 2**PAIRS for k in range(PAIRS // 2)]
    k = max(k for k, p in enumerate(outside) if 2 * p < 0.05)
    print(
        f"watching one step of {STEPS} takes {100 * (np.median(ratios) - 1):+.2f} % "
        f"({100 * (ratios[k - 1] - 1):+.2f} to {100 * (ratios[-k] - 1):+.2f}), {PAIRS} pairs"
    )


if __name__ == "__main__":
    main()
