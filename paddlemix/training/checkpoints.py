# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The checkpoints of a training run: folders that are there when they are whole, with all that is needed to go on."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

from paddlemix.models.emu3.hub import checkpoints_of_run
from paddlemix.utils import InputError, read_json, write_atomically

STATE = "training.json"
OPTIMIZER = "optimizer-{:05d}-of-{:05d}.safetensors"


def save_checkpoint(folder, step, job, write_model, optimizer, ranks, limit):
    """Write `checkpoint-STEP` and remove what is older than the last `limit`. Every process calls it.

    Args:
        folder: which all processes see.
        step: steps that are done.
        job: what the run is of, for JSON: another one is not gone on with.
        write_model: writes the model's files into a folder; the first process calls it.
        optimizer: its `save` writes what this process keeps.

    Returns:
        the checkpoint's path
    """
    path, beside = Path(folder) / f"checkpoint-{step}", Path(folder) / f".checkpoint-{step}.part"
    is_first = ranks.rank == 0

    def begin():
        if is_first:
            shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed while it wrote
            beside.mkdir()

    def write():
        if not beside.is_dir():
            raise InputError(f"process {ranks.rank} does not see {folder}: --output_dir must be one folder for all")
        optimizer.save(beside / OPTIMIZER.format(ranks.rank + 1, ranks.count))
        if is_first:
            write_model(beside)
            write_atomically(beside / STATE, json.dumps({"step": step, "job": job}, indent=2) + "\n")

    def end():
        if is_first:
            shutil.rmtree(path, ignore_errors=True)
            beside.rename(path)
            for old in checkpoints_of_run(folder)[:-limit] if limit else []:
                shutil.rmtree(old)

    try:
        for work in (begin, write, end):  # each when all have done the one before
            ranks.together(work)
    except BaseException:
        if is_first:
            shutil.rmtree(beside, ignore_errors=True)
        raise
    return path


def last_checkpoint(folder, job):
    """(path, steps done) of the newest checkpoint, (None, 0) where there is none. InputError: it is of another job."""
    found = checkpoints_of_run(folder)
    if not found:
        return None, 0
    state = _read_state(found[-1])
    for name, value in job.items():
        if state["job"].get(name) != value:
            raise InputError(
                f"{found[-1]} was trained with {name} {state['job'].get(name)!r}, this command gives {value!r}: give "
                "what it was trained with to go on, or another --output_dir"
            )
    return found[-1], state["step"]


def rows_of_step_before(folder):
    """Rows of a step of the run that a folder holds; 0 where it holds none."""
    found = checkpoints_of_run(folder)
    return _read_state(found[-1])["job"]["rows of a step"] if found else 0


def _read_state(checkpoint):
    with going_on(checkpoint):
        state = read_json(checkpoint / STATE)
    job = state.get("job")
    if type(state.get("step")) is not int or not isinstance(job, dict) or type(job.get("rows of a step")) is not int:
        raise InputError(f"{checkpoint / STATE} is not of `emu3 train`: give another --output_dir")
    return state


def load_optimizer(path, optimizer):
    """Let the optimizer take what the processes of a checkpoint have saved, however many they were."""
    with going_on(path):
        optimizer.load(sorted(path.glob("optimizer-*.safetensors")))


@contextmanager
def going_on(checkpoint):
    """Around the reading of a checkpoint of a run, which can be done without: the one before it is there."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"cannot go on from {checkpoint} ({error}): remove it, to go on from the one before, or give another "
            "--output_dir"
        ) from None
