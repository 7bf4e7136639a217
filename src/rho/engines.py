"""Who scores: several processes of this machine, a Ray cluster, or the tasks of an array job.

An engine only starts workers and minds them. What there is to do lies in the store's folder: a worker goes through all
shards, leaves those that are finished or that another worker holds (a lock that its death gives back), and commits each
by itself. So the bytes of a store don't depend on who did what in which order, and whoever is lost, is lost with one
shard at most.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from rho.errors import ConfigError, RhoError
from rho.progress import say
from rho.runs import refusal

Engine = Literal["local", "ray"]
Work = Callable[[int], None]  # what a worker does, given its number; it is sent to another process
POLL_SECONDS = 0.2
LOST_PER_WORKER = 3  # workers lost for each one asked for, before it is given up


def run_workers(engine: Engine, work: Work, workers: int, poll: Callable[[], None]) -> None:
    """Run `work(0)` ... `work(workers - 1)` to their end, starting another worker where one is lost.

    Args:
        engine: `local`: processes of this machine, which share its CPU threads or have one accelerator each; `ray`:
            tasks of the Ray cluster that is running, or of one started on this machine.
        work: raises what is wrong with the input as `RhoError`; that ends all.
        workers: how many.
        poll: called several times a second.

    Raises:
        RhoError: of a worker; or too many workers were lost.
    """
    (_run_ray if engine == "ray" else _run_local)(work, workers, poll)


def _run_local(work: Work, workers: int, poll: Callable[[], None]) -> None:
    context = multiprocessing.get_context("forkserver")  # a plain fork would share locks and thread pools
    context.set_forkserver_preload(["rho.score"])
    errors = context.SimpleQueue()

    def start(number: int) -> Any:
        process = context.Process(target=_in_process, args=(work, number, workers, errors), daemon=True)
        try:
            process.start()
        except EOFError as error:  # the server that forks them died of it
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
        return process

    running = {number: start(number) for number in range(workers)}
    lost = 0
    try:
        while running:
            time.sleep(POLL_SECONDS)
            poll()
            if not errors.empty():
                raise errors.get()
            for number, process in list(running.items()):
                if process.exitcode is None:
                    continue
                del running[number]
                if process.exitcode != 0 and errors.empty():
                    lost = _count_lost(lost, workers, f"worker {number} ended with {process.exitcode}")
                    running[number] = start(number)
        if not errors.empty():
            raise errors.get()
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _in_process(work: Work, number: int, workers: int, errors: Any) -> None:
    """The life of a local worker; it does not outlive who started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(number % torch.accelerator.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    try:
        work(number)
    except KeyboardInterrupt:
        pass  # the terminal sends it to all; the parent says so
    except Exception as error:
        told = error if isinstance(error, RhoError) else refusal(error)
        if told is None:
            raise
        errors.put(told)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_ray(work: Work, workers: int, poll: Callable[[], None]) -> None:
    try:
        import ray
    except ImportError:
        raise ConfigError("engine ray: needs Ray. Install it with `pip install rho-lm[ray]`.") from None
    started_here = not ray.is_initialized()
    if started_here:
        _join_or_start(ray)
    try:
        # A share of a CPU each: workers are never so many that one waits for another to end.
        share = min(1.0, 0.9 * ray.cluster_resources().get("CPU", 1.0) / workers)
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / workers)

        def score_shards(number: int) -> None:
            work(number)

        task = ray.remote(num_cpus=share, num_gpus=gpus, max_retries=0)(score_shards)
        running = {task.remote(number): number for number in range(workers)}
        lost = 0
        while running:
            done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            poll()
            for result in done:
                number = running.pop(result)
                try:
                    ray.get(result)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, RhoError) else error) from None
                except ray.exceptions.RayError as error:
                    lost = _count_lost(lost, workers, f"worker {number} was lost ({type(error).__name__})")
                    running[task.remote(number)] = number
    finally:
        if started_here:
            ray.shutdown()


def _join_or_start(ray: Any) -> None:
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address="auto", **options)
    except ConnectionError:
        ray.init(include_dashboard=False, **options)


def _count_lost(lost: int, workers: int, what: str) -> int:
    say(f"score: {what}, starting another")
    if lost + 1 > LOST_PER_WORKER * workers:
        raise RhoError(
            f"score: {lost + 1} workers were lost; the last {what}. Is there memory for so many? Start fewer with "
            "--workers; what is finished is kept."
        )
    return lost + 1
