"""Prepare data on the machines of a Ray cluster: shards out to workers, records of finished shards back.

Shards in, the files of ``prepare`` out: a worker is an actor that holds codec and encoder and makes one shard
a call, by the same code and the same journal as a single process. A shard whose worker was killed is made by
the worker that takes its place. All machines see source and folder at the same paths. Knows nothing of rows.
"""

import json
import logging
import os
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from omni_adapter.config import Positive
from omni_adapter.data.prepare import JOURNAL_FOLDER, UNFINISHED, Preparation, Record, add_record
from omni_adapter.errors import DataError, MissingDependencyError, OmniError

logger = logging.getLogger(__name__)

OpenWork = Callable[[torch.device], Preparation]
"""Opens the preparation in a worker, with its models on a device; sent there as it is."""

_ATTEMPTS = 4
"""Workers that may die of one shard before the run ends."""

_MARK = f".{{}}.{{}}.attempt{UNFINISHED}"
"""Name of a file that says that a worker is at a shard: its number, and a name for the attempt."""


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Pool:
    """The workers of a run.

    Args:
        workers: how many; None takes what the cluster has room for.
        cpus: CPU cores and threads of each.
        gpus: accelerators of each; a part of one lets several share it. None gives each one where the
            cluster has some.
        address: of the cluster; None takes the one in ``RAY_ADDRESS``, else one that is running here, else
            starts one on this machine.
    """

    workers: Positive | None = None
    cpus: Positive = 1
    gpus: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"gpus must be 0 or more, got {self.gpus}")


def run_on_ray(
    work: Preparation,
    shards: Sequence[int],
    *,
    open_work: OpenWork,
    pool: Pool | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """Make shards on a Ray cluster, as ``Preparation.run`` does here.

    Args:
        work: the preparation as it stands.
        shards: which.
        open_work: opens the same preparation in each worker.
        pool: the workers.
        progress: called after each shard with its rows and seconds of speech.

    Raises:
        MissingDependencyError: if Ray is not installed.
        DataError: if too large a share of rows is bad, the folder cannot be written, or workers die again
            and again over one shard.
    """
    if not shards:
        return
    pool = pool or Pool()
    rejects = work.tally()
    for mark in (work.out / JOURNAL_FOLDER).glob(_MARK.format("*", "*")):  # of runs that were killed
        mark.unlink(missing_ok=True)
    with _cluster(pool.address) as ray:
        for record in _records(ray, shards, open_work=open_work, pool=pool):
            if progress is not None:
                progress(record["rows"] + len(record["rejects"]), sum(record["seconds"].values()))
            add_record(record, rejects)


def import_ray() -> Any:
    """Return the module ``ray`` with ``ray.data``.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            "Ray Data", extra="ray", purpose="preparing data on a cluster"
        ) from error
    return ray


class _Worker:
    """Makes one shard a call; what a restarted actor is made of."""

    def __init__(self, open_work: OpenWork, cpus: int, uses_gpu: bool) -> None:
        torch.set_num_threads(cpus)
        found = torch.accelerator.current_accelerator(check_available=True) if uses_gpu else None
        self._failure: str | None = None
        try:
            self._work = open_work(found or torch.device("cpu"))
            self._reader = self._work.reader()
        except OmniError as error:
            # Raised here it would reach the caller as the death of an actor.
            self._failure = str(error)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return the record of the batch's one shard as JSON, or what went wrong."""
        (shard,) = batch["shard"].tolist()
        answer: dict[str, Any] = {"error": self._failure}
        if self._failure is None:
            try:
                with _attempt(self._work.out / JOURNAL_FOLDER, shard):
                    answer = dict(self._work.make(shard, self._reader))
            except OmniError as error:
                answer = {"error": str(error)}
            except Exception:  # whatever it is, it ends the run with its trace instead of being tried again
                answer = {"error": f"shard {shard} failed:\n{traceback.format_exc()}"}
        return {"record": [json.dumps(answer)]}


@contextmanager
def _attempt(journal: Path, shard: int) -> Iterator[None]:
    """Leave a mark while a shard is being made, so that those who come after a kill can count.

    Raises:
        DataError: if too many workers were killed over this shard.
    """
    number = f"{shard:05d}"
    killed = len(list(journal.glob(_MARK.format(number, "*"))))
    if killed >= _ATTEMPTS:
        raise DataError(
            f"{killed} workers died over shard {shard}, of too little memory perhaps; finished shards are "
            "kept, run the same command again with fewer workers on a machine"
        )
    mark = journal / _MARK.format(number, uuid.uuid4().hex)
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _records(ray: Any, shards: Sequence[int], *, open_work: OpenWork, pool: Pool) -> Iterator[Record]:
    """Journal records of the shards, in the order in which they are done."""
    gpus, workers = _share_out(ray.cluster_resources(), len(shards), pool)
    items = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    # Ray starts workers again as often as they die, and gives them the shard they died of. The pool may
    # shrink, so that what a lost machine leaves undone finds room on the others.
    made = items.map_batches(
        _Worker,
        batch_size=1,
        fn_constructor_args=(open_work, pool.cpus, gpus > 0),
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=1
        ),
        num_cpus=pool.cpus,
        num_gpus=gpus,
    )
    try:
        for row in made.iter_rows():
            record = json.loads(row["record"])
            if "error" in record:
                raise DataError(record["error"])
            yield record
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray gave up: {error}\nFinished shards are kept; run the same command again"
        ) from error


def _share_out(resources: Mapping[str, float], num_shards: int, pool: Pool) -> tuple[float, int]:
    """Accelerators of each worker, and how many workers."""
    found = resources.get("GPU", 0.0)
    gpus = pool.gpus if pool.gpus is not None else float(found >= 1)
    room = resources.get("CPU", 0.0) / pool.cpus
    if gpus:
        room = min(room, found / gpus)
    if room < 1:
        raise DataError(
            f"the cluster has {resources.get('CPU', 0.0):g} CPU cores and {found:g} accelerators, "
            f"a worker needs {pool.cpus} and {gpus:g}; ask for less, or add machines"
        )
    return gpus, min(pool.workers or int(room), num_shards)


@contextmanager
def _cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster; one that was started for this is stopped at the end."""
    ray = import_ray()
    own = not ray.is_initialized()
    if own:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=address, logging_level=logging.WARNING, include_dashboard=False)
        except ConnectionError as error:
            raise DataError(f"no Ray cluster answers at {address or 'RAY_ADDRESS'}: {error}") from error
    try:
        with _settings(ray.data.DataContext.get_current()):
            yield ray
    finally:
        if own:
            ray.shutdown()


@contextmanager
def _settings(context: Any) -> Iterator[None]:
    """Ray Data's settings for this work; the caller's own ones come back."""
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "max_consecutive_actor_init_deaths": _ATTEMPTS,
        "execution_no_progress_timeout_s": -1,  # a shard may take hours
    }
    before = {name: getattr(context, name) for name in wanted}
    ray_logger = logging.getLogger("ray.data")
    level = ray_logger.level
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        ray_logger.setLevel(logging.ERROR)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        ray_logger.setLevel(level)
