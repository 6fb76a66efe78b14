"""What lets a training stage that was killed go on as if it had not been: states on the disk, and the loop over the steps still to be made."""

import itertools
import os
import signal
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import config


@torch.no_grad()
def keep(folder: Path, name: str, step: int, optimizer) -> None:
    """Writes what was learnt in `step` steps, Adam's moments, the lengths of the stage's logs and how many steps in a row were skipped, then
    deletes the state before. No random state is needed: all that is drawn comes from seed, stage, step and prompt. Of sharded weights each
    process writes its part."""
    learning, rank = optimizer.param_groups[0]["params"], config.world()[0]
    sharded = isinstance(learning[0], DTensor)
    for turn in (rank > 0, rank == 0):  # the first process last: last_step looks for its file
        if turn and (sharded or rank == 0):
            logs = {log.name: config.flush(log) for log in folder.glob("*.jsonl")}
            moments = [{key: local(value) for key, value in optimizer.state[p].items()} for p in learning]
            state = {"logs": logs, "learnt": [local(p.detach()) for p in learning], "moments": moments,
                     "skipped": optimizer.param_groups[0].get("skipped", 0)}
            config.write_file(folder / f"{name}.{step}.{rank}.state", lambda stream: torch.save(state, stream))
        config.wait_for_all()
    for file in set(folder.glob(f"{name}.*.{rank}.state")) - {folder / f"{name}.{step}.{rank}.state"}:
        file.unlink()


def last_step(folder: Path, name: str) -> int:
    """The step of the last state that was kept; 0 where there is none."""
    return max((int(file.name.split(".")[-3]) for file in folder.glob(f"{name}.*.0.state")), default=0)


@torch.no_grad()
def restore(folder: Path, name: str, model, optimizer) -> int:
    """Puts back the last state, cuts the logs to what they were then, and returns its step; 0 where there is none."""
    if step := last_step(folder, name):
        learning = optimizer.param_groups[0]["params"]
        rank = config.world()[0] if isinstance(learning[0], DTensor) else 0
        state = torch.load(folder / f"{name}.{step}.{rank}.state", map_location="cpu", weights_only=True, mmap=True)
        optimizer.param_groups[0]["skipped"] = state["skipped"]
        for p, value, moments in zip(learning, state["learnt"], state["moments"]):
            local(p).copy_(value)
            optimizer.state[p] = {key: torch.zeros_like(moment if key == "step" else p) for key, moment in moments.items()}
            for key, moment in moments.items():
                local(optimizer.state[p][key]).copy_(moment)
        for p, copy in zip([p for p in model.parameters() if p.requires_grad], learning):
            p.copy_(copy)  # a bf16 model has fp32 copies that learn
        for log in folder.glob("*.jsonl") if config.is_main() else ():
            os.truncate(log, state["logs"].get(log.name, 0))
        print(f"   {name}: goes on after step {step}", flush=True)
    return step


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of it that is in this process: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def steps_to_go(drawn, steps: int, label: str, folder: Path, model, optimizer, minutes: float):
    """Yields (step, batch of `drawn`) for the steps still to be made. The state is kept at the end; every `minutes`, or as seldom as takes 2% of the
    time (0: after every step); and when the process is told to stop (Ctrl-C, SIGTERM): after the step it is in, or at once if told again."""
    stops, told, saved, wait = (signal.SIGINT, signal.SIGTERM), [], time.time(), 60 * minutes
    first = restore(folder, label, model, optimizer)
    before = [signal.signal(number, lambda *said: signal.default_int_handler(*said) if told else told.append(said)) for number in stops]
    try:
        for step, batch in zip(config.progress(range(first, steps), label), itertools.islice(drawn, first, None)):
            yield step, batch
            stop, due = map(any, zip(*config.gather([(bool(told), time.time() >= saved + wait)])))  # as one for all processes
            if stop or due or step + 1 == steps:
                started = time.time()
                keep(folder, label, step + 1, optimizer)
                saved, wait = time.time(), minutes and max(60 * minutes, 50 * (time.time() - started))
            if stop:
                raise KeyboardInterrupt
        if told:  # while the last state was being written
            raise KeyboardInterrupt
    finally:
        list(map(signal.signal, stops, before))
