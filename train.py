"""The program: `python train.py [CONFIG] [options]`. Read it from the top to the bottom and you have seen a run.

From here to the mathematics: make_train_step (mintrain/step.py) -> next_token_loss (loss.py) -> LM (model.py).
On many hosts the same program runs on each (mintrain/hosts.py): all do the same, and the first one prints and writes.
Exit codes: 0 done; 1 crashed or not finite; 2 the config or the data is wrong; 75 told to stop, saved, run again;
130 and 143: Ctrl-C or SIGTERM before there was anything to save.
"""

import os
import signal
import sys
import time

START = time.perf_counter()
STOPS = (signal.SIGINT, signal.SIGTERM)
# Until there is something to save, both end the program at once, also inside a compiler, where no Python runs.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from functools import partial  # noqa: E402

import jax  # noqa: E402

from mintrain import check, generate, hosts, load, metrics, numerics, options, plan, sharding, step  # noqa: E402
from mintrain.checkpoint import Checkpoints  # noqa: E402
from mintrain.config import Config, ConfigError  # noqa: E402
from mintrain.data import Stream, heldout_batches, load_data, train_batch  # noqa: E402
from mintrain.tokenizer import Tokenizer  # noqa: E402

IMPORTED = time.perf_counter()
stop_requested = False


def request_stop(number: int, _) -> None:
    """SIGTERM or Ctrl-C while there is a state: the loop saves at the next step boundary. A second one kills."""
    global stop_requested
    stop_requested = True
    signal.signal(number, signal.SIG_DFL)
    said = "told to stop: what is being compiled or evaluated ends first, then the run saves; a second time ends it now"
    os.write(2, f"{said}\n".encode())  # print may be in the middle of a line


def train(cfg: Config) -> int:
    """Train until `cfg.steps` or until told to stop. Returns the exit code."""
    with hosts.in_turn():  # the first makes the folder and the file of tokens
        folder = metrics.open_run(cfg)
        checkpoints = Checkpoints(folder / "checkpoints", cfg.keep_checkpoints)
        mesh = sharding.make_mesh(cfg.mesh)
        abstract, shapes = step.abstract_state(cfg, mesh), step.abstract_batch(cfg, mesh)
        sharding.validate(cfg.mesh, abstract.model)
        text, heldout, tokenizer = load_data(cfg)
    for number in STOPS:
        signal.signal(number, request_stop)
    if checkpoints.latest is not None:
        state = checkpoints.restore(abstract)
    else:
        state = step.new_state(cfg, mesh, load.initial(cfg, step.abstract_model(cfg, mesh)) if cfg.init_from else None)
    at = int(state.step)
    with hosts.in_turn():
        if jax.process_index() == 0:
            (folder / "config.json").write_text(options.to_json(cfg))
        log = metrics.Log(folder, at, cfg, text.bytes_per_token)
    print(f"{folder}: step {at} of {cfg.steps}, {cfg.batch_size} x {cfg.data.seq_len} tokens a step,", end=" ")
    print(f"mesh {sharding.describe(cfg.mesh)} of {jax.device_count()} {jax.default_backend()} devices")

    steps, told = None, hosts.Told()
    evaluation = partial(evaluate, cfg, step.make_eval_step(cfg, mesh), heldout, shapes, tokenizer, log, told)

    def read(bad: int, result: step.Metrics, nonfinite: int, state: step.State) -> int:
        """Write a step's metrics. The first bad step of a run is run again, to say what made it bad."""
        nonfinite = log.step(bad, result, nonfinite)
        if nonfinite == 1 and not any(folder.glob("nonfinite-*")):
            numerics.investigate(cfg, mesh, state, train_batch(text, shapes, bad - 1, cfg.seed), bad, folder)
            log.restart(bad)  # that took minutes, and no step
        return nonfinite

    nonfinite, pending = 0, None  # the metrics of the last step, read when the next one is running
    while True:
        stop, last = told.late(stop_requested), at == cfg.steps
        saving = stop or last or (at > 0 and at % cfg.checkpoint_every == 0)
        evaluating = (last or (at > 0 and at % cfg.eval_every == 0)) and not log.evaluated(at)
        failed = nonfinite >= cfg.max_nonfinite
        if pending is not None and (saving or evaluating or failed):
            nonfinite, pending = read(*pending, nonfinite, state), None
            failed = failed or nonfinite >= cfg.max_nonfinite
        if saving or failed:
            checkpoints.save(at, state)
        if evaluating and not stop and not failed:
            evaluation(state, at)
            if told.now(stop_requested):
                continue
        if stop or last or failed:
            break
        if steps is None:
            steps = compile_steps(cfg, mesh, abstract, shapes)
        if pending is None:
            log.restart(at)
        at += 1
        watched = cfg.watch_every > 0 and at % cfg.watch_every == 0
        state, result = steps[watched](state, train_batch(text, shapes, at - 1, cfg.seed))
        if pending is not None:
            nonfinite = read(*pending, nonfinite, state)
        pending = (at, result)

    with hosts.together():
        checkpoints.close()
        log.plot()
    if failed:
        print(f"stopped at step {at}: {cfg.max_nonfinite} steps in a row had a loss or gradient that was not finite")
        return 1
    if at < cfg.steps or not log.evaluated(at):
        print(f"told to stop: step {at} is saved, the same command goes on from there")
        return 75
    print(f"done: {folder}; --steps trains on, --run NAME starts another run")
    return 0


def compile_steps(
    cfg: Config, mesh: jax.sharding.Mesh, state: step.State, batch: step.Batch
) -> dict[bool, jax.stages.Compiled]:
    """Trace, which checks every contract, then compile; says where the time since the start went.

    The step, and the one that is watched if there is to be one.
    """
    ready = time.perf_counter()
    forms = (False, True) if cfg.watch_every else (False,)
    traced = {watched: step.make_train_step(cfg, mesh, watched).trace(state, batch) for watched in forms}
    traced_at = time.perf_counter()
    with ThreadPoolExecutor(1) as beside:  # this thread hears signals meanwhile
        compiled = {watched: beside.submit(one.lower().compile).result() for watched, one in traced.items()}
    print(
        f"import {IMPORTED - START:.1f}s  data and state {ready - IMPORTED:.1f}s  "
        f"trace {traced_at - ready:.1f}s  compile {time.perf_counter() - traced_at:.1f}s"
    )
    return compiled


def evaluate(
    cfg: Config,
    eval_step: step.EvalStep,
    heldout: Stream,
    shapes: step.Batch,
    tokenizer: Tokenizer,
    log: metrics.Log,
    told: hosts.Told,
    state: step.State,
    at: int,
) -> None:
    """Held-out loss, a sample of text and the picture. Gives up between batches when told to stop."""
    nll, count = 0.0, 0
    for batch, targets in heldout_batches(heldout, shapes, cfg.eval_batches):
        if told.now(stop_requested):
            return
        nll, count = nll + float(eval_step(state.model, batch)), count + targets
    if cfg.sample_tokens:
        prompt = [tokenizer.bos, *next(tokenizer.encode([cfg.sample_prompt]))]
        how = dict(sampling=generate.Sampling(temperature=0.8), seed=cfg.seed, stop=tokenizer.stop)
        (ids,) = generate.generate(state.model, [prompt], cfg.sample_tokens, **how)
        log.sample(at, tokenizer.decode([*prompt[1:], *ids]))
    log.evaluation(at, nll / count, heldout.bytes_per_token)


def main(argv: list[str]) -> int:
    try:
        cfg, action, tpus = options.load(argv)
        if action == "print":
            print(options.to_json(cfg))
            return 0
        if action == "check":
            print(check.report(cfg))
            return 0
        if action in ("plan", "fit"):
            text, fits = plan.report(cfg, tpus, fit=action == "fit")
            print(text)
            return 0 if fits else 1
        if action == "distributed":
            hosts.join()
        elif jax.process_count() > 1:
            raise ConfigError(f"this is one of {jax.process_count()} hosts; add --distributed to the command on each")
        return train(cfg)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
