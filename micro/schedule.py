"""The order in which runs and evaluations are made, as many at a time as cores are given."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from micro.experiments import Cell, Evaluation, Failed, Place, Probe, Run

Task = Run | Evaluation | Probe


def tasks_for(groups: Iterable[Iterable[Run | Cell | Probe]], place: Place) -> list[Task]:
    """Returns all that these groups take, in an order in which it can be made.

    Cells that are there already are left out. What several groups need comes with the first.
    """
    tasks: dict[Task, None] = {}
    seen: set[Cell] = set()

    def add(run: Run) -> None:
        for before in run.needs:
            add(before)
        if not run.is_shipped:
            tasks.setdefault(run)

    for needs in groups:
        missing = defaultdict(list)
        for need in dict.fromkeys(needs):
            if isinstance(need, Run):
                add(need)
                continue
            for run in need.needs:
                add(run)
            if isinstance(need, Probe):
                tasks.setdefault(need)
            elif need not in seen and not need.done(place):
                missing[need.run, need.options].append(need)
                seen.add(need)
        for cells in missing.values():
            tasks.setdefault(Evaluation(tuple(cells)))
    return list(tasks)


def make_all(
    tasks: Iterable[Task], place: Place, cores: int, on_done: Callable[[], None] = lambda: None
) -> list[str]:
    """Makes what is not there, as many at a time as there are cores.

    on_done() is called after each. Returns what has failed, or waits for what has failed: the rest
    is made all the same.
    """
    waiting = [task for task in tasks if not task.done(place)]
    running: dict[Future, Task] = {}
    failed = []
    with ThreadPoolExecutor(cores) as pool:
        while True:
            # 1. Start, in order, what has what it needs, while cores are free.
            for task in list(waiting):
                free = cores - sum(other.cores for other in running.values())
                if all(need.done(place) for need in task.needs):
                    if min(task.cores, cores) > free:
                        break
                    waiting.remove(task)
                    print(f"{time.strftime('%H:%M')} {task.name}", flush=True)
                    running[pool.submit(task.make, place)] = task
            if not running:
                break
            # 2. Wait for one to end.
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    future.result()
                except (Failed, OSError, ValueError) as error:
                    failed.append(f"{task.name}: {error}")
                    print(f"failed: {failed[-1]}", flush=True)
            on_done()
    return failed + [f"{task.name}: not made, it needs what has failed" for task in waiting]


def print_plan(tasks: list[Task], place: Place, cores: int) -> None:
    """Prints what there is to make, what of it is there, and the minutes that are left."""
    left = 0.0
    for task in tasks:
        done = task.done(place)
        left += 0.0 if done else task.minutes * task.cores
        print(f"{'done' if done else f'{task.minutes:.1f}':>6}  {task.name}")
    runs = [task for task in tasks if isinstance(task, Run)]
    done = sum(task.done(place) for task in runs)
    print(f"\n{done} of {len(runs)} runs are done; about {left / cores:.0f} minutes are left")
    print(f"on {cores} idle cores (left column: minutes of one; a base takes two cores)")
