"""Kills, power cuts and failing disks: `python benchmarks/faults.py [kill] [power] [errors]`.

Every command that writes is killed before and after chosen calls (fsync, rename, write, unlink,
truncate, mkdir) and at random moments; its calls are replayed up to each one as a power cut would
leave them; and each of them fails, once or from then on. After each the index has to be sound and
complete, and the same command has to end it as an undisturbed one. Needs a C compiler; the first
that does not hold ends the script.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "crash"))

import faults

from mmsearch import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["kill", "power", "errors"])
    parser.add_argument("--count", type=int, default=500, help="kills, and failing calls")
    parser.add_argument("--every", type=int, default=1, help="power cuts: at every so-manieth call")
    parser.add_argument("--only", nargs="*", help="scenarios")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if faults.compiler() is None:
        parser.error("no C compiler: install gcc or clang")
    with tempfile.TemporaryDirectory(prefix="mmsearch-faults-") as scratch:
        top = Path(scratch)
        os.environ["MMSEARCH_HOME"] = str(top / "home")
        bench = faults.Bench(faults.build(top), top)
        made = faults.prepare(top / "made")
        chosen = [one for one in made if not args.only or one.name in args.only]
        for name in args.what:
            started, counts = time.monotonic(), DO[name](chosen, bench, args)
            total = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
            print(f"{name}: {sum(counts.values())} held ({total}); "
                  f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip


def kill(scenarios, bench, args):
    counts = Counter()

    def one(trial):
        scenario, fault = trial
        try:
            bench.settle(scenario, bench.run(scenario, **fault))
        except BaseException:
            print(f"kill: {scenario.name} {fault}", file=sys.stderr, flush=True)
            raise
        return scenario.name

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in pool.map(one, faults.kills(scenarios, bench, args.count, args.seed)):
            counts[name] += 1
    return counts


def power(scenarios, bench, args):
    counts = Counter()
    for scenario in scenarios:
        is_sound = scenario.is_sound_before
        for place, told, known in faults.power_cuts(scenario, bench, every=args.every):
            faults.check_after_cut(place, told, known, must_be_sound=is_sound)
            if not is_sound:
                with Engine.open(place, notify=lambda line: None) as engine:
                    engine.repair()
                faults.check_whole(place)
            counts[scenario.name] += 1
        print(f"power: {scenario.name} {counts[scenario.name]}", flush=True)
    return counts


def errors(scenarios, bench, args):
    """Each call fails, once or with all after it, as on a full or dying disk."""
    counts, rng = Counter(), random.Random(args.seed)
    trials = [
        (scenario, {"do": "fail", "at": number, "errno": error, **how})
        for scenario in scenarios
        for number in range(1, bench.calls(scenario) + 1)
        for error in faults.ERRORS
        for how in ({}, {"sticky": 1})
    ]
    rng.shuffle(trials)

    def one(trial):
        scenario, fault = trial
        try:
            done = bench.run(scenario, **fault)
            faults.check_message(done)
            bench.settle(scenario, done)
        except BaseException:
            print(f"errors: {scenario.name} {fault}", file=sys.stderr, flush=True)
            raise
        return scenario.name

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in pool.map(one, trials[: args.count]):
            counts[name] += 1
    return counts


DO = {"kill": kill, "power": power, "errors": errors}

if __name__ == "__main__":
    main()
