"""How large an installation is and how long it takes, here and for rclip, in fresh environments.

    python benchmarks/install.py [--only core full rclip]

For each: seconds of `pip install`, its size as `du` counts it, and seconds from then to the first
hits over a gallery of drawn scenes (rclip fetches its model first; without a network, that fails).
From the package registry that pip is set up for; run it twice, so that a cache before it is warm.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
DEMO = ["mmsearch", "demo", "--out"]
SEARCH = ["mmsearch", "search", "a cat", "--index"]
WHAT = {
    "core": (str(CHECKOUT), DEMO, SEARCH),
    "full": (f"{CHECKOUT}[full]", DEMO, SEARCH),
    "rclip": ("rclip==3.3.*", None, ["rclip", "a cat"]),
}  # fmt: skip


def timed(command, **options):
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    return time.perf_counter() - started, done


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(WHAT), default=list(WHAT))
    args = parser.parse_args()
    print(f"{'':8}{'install, s':>12}{'MB':>8}{'first hits, s':>15}")
    with tempfile.TemporaryDirectory(prefix="mmsearch-install-") as folder:
        top = Path(folder)
        for name in args.only:
            package, prepare, search = WHAT[name]
            env = top / name
            subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
            seconds, done = timed([str(env / "bin/pip"), "install", "-q", package])
            if done.returncode:
                print(f"{name:8}not installed: {done.stderr.strip().splitlines()[-1][:100]}")
                continue
            size = int(subprocess.run(["du", "-sm", str(env)], capture_output=True, text=True,
                                      check=True).stdout.split()[0])  # fmt: skip
            hidden = ("MMSEARCH_CACHE", "PYTHONPATH")
            own = {key: value for key, value in os.environ.items() if key not in hidden}
            own |= {"HOME": str(top / f"{name}-home"), "PATH": f"{env / 'bin'}:{own['PATH']}"}
            spent = 0.0
            if prepare is not None:
                spent, done = timed([*prepare, str(top / f"{name}-demo")], env=own, cwd=top)
                index = top / f"{name}-demo" / "index"
                more, done = timed([*search, str(index)], env=own, cwd=top)
            else:
                drawn = next(top.glob("*-demo/gallery"), top)
                more, done = timed(search, env=own, cwd=drawn)
            hits = f"{spent + more:.1f}" if not done.returncode else "failed: no model"
            print(f"{name:8}{seconds:12.0f}{size:8}{hits:>15}", flush=True)


if __name__ == "__main__":
    main()
