"""A library leaves its host as it found it."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading

import pytest
from conftest import REPOSITORY

from mmsearch.encoders.telemetry import without_telemetry

pytestmark = pytest.mark.slow

#: What a process has for all of its modules.
STATE = """
import csv, locale, logging, os, random, signal, sys, warnings
import numpy, torch, torch.jit, PIL.Image, openvino, openvino.tools.ovc, faiss, open_clip
import transformers
import matplotlib.pyplot, pyarrow.parquet, torch.utils.data, torch._dynamo
def state():
    return {
        "warnings": set(map(str, warnings.filters)),
        "csv": csv.field_size_limit(),
        "absent modules": sorted(name for name, module in sys.modules.items() if module is None),
        "logging": (logging.root.level, *logging.root.handlers, *logging.root.filters),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "environment": dict(os.environ),
        "locale": locale.setlocale(locale.LC_ALL),
        "threads": (torch.get_num_threads(), faiss.omp_get_max_threads()),
        "random": (random.getstate(), torch.initial_seed()),
        "errors": numpy.geterr(),
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
    }
for item in (*logging.root.handlers, *logging.root.filters):  # OpenVINO's, of its import
    logging.root.removeHandler(item)
    logging.root.removeFilter(item)
logging.root.addHandler(logging.NullHandler())
before = state()
"""
IMPORTS = """
import importlib, pkgutil
import mmsearch
for found in pkgutil.walk_packages(mmsearch.__path__, "mmsearch."):
    if found.name not in ("mmsearch.__main__", "mmsearch.media.image"):  # it is for the sandbox
        importlib.import_module(found.name)
"""
USE = """
import pathlib, tempfile
from mmsearch import Engine
from PIL import Image
top = pathlib.Path(tempfile.mkdtemp())
(top / "p").mkdir()
Image.new("RGB", (9, 9), "red").save(top / "p" / "a.png")
(top / "c.csv").write_text("image,caption\\na.png,red\\n")
with Engine.open(top / "i", model="tiny") as engine:
    engine.index([top / "p"], captions=top / "c.csv")
    engine.search("red", image=top / "p" / "a.png", rerank=0)
    engine.bench()
"""
COMPARE = """
after = state()
for name in before:
    if isinstance(before[name], set):
        assert not before[name] ^ after[name], (name, before[name] ^ after[name])
    assert before[name] == after[name], (name, before[name], after[name])
"""


@pytest.mark.parametrize("what", [IMPORTS, USE], ids=["imports", "use"])
def test_nothing_of_a_process_changes(what):
    done = subprocess.run(
        [sys.executable, "-c", STATE + what + COMPARE], capture_output=True, text=True,
        cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_model_loads_that_overlap_leave_the_root_logger_as_it_was():
    from mmsearch.encoders.open_clip import quiet_open_clip

    root = logging.getLogger()
    before = root.level, list(root.handlers), list(root.filters)
    told: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    kept = Kept()
    root.addHandler(kept)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with quiet_open_clip():
            first_in.set()
            second_in.wait(20)
            root.error("of the first load")
        first_out.set()

    def second():
        first_in.wait(20)
        with quiet_open_clip():
            second_in.set()
            first_out.wait(20)
            root.error("of the second load")

    threads = [threading.Thread(target=one) for one in (first, second)]
    for thread in threads:
        thread.start()
    second_in.wait(20)
    root.error("of the host")
    for thread in threads:
        thread.join()
    root.error("of the host, later")
    root.removeHandler(kept)
    assert told == ["of the host", "of the host, later"]
    assert (root.level, root.handlers, root.filters) == before


@pytest.mark.parametrize("module", [None, sys])
def test_a_host_keeps_its_telemetry(monkeypatch, module):
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    if module is not None:
        monkeypatch.setitem(sys.modules, "openvino_telemetry", module)
    with without_telemetry(), pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401
    assert sys.modules.get("openvino_telemetry") is module
