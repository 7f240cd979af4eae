"""The loop: what it learns, what it leaves alone, and that a kill costs it nothing."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fakes import FakeClock
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from toys import Altered, Rows, heads_trainer

from mmsearch.errors import Interrupted, TrainingError, UsageError
from mmsearch.training.losses import ContrastiveLoss, Embeddings
from mmsearch.training.recipe import Schedule
from mmsearch.training.runs import load_checkpoint
from mmsearch.training.trainer import Setting, parameter_groups

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_to_pair(tmp_path):
    trainer = heads_trainer(tmp_path)
    outcome = trainer.fit()
    before = trainer.history[0]
    assert before["t2i_R@10"] < 50
    assert outcome.recall["t2i_R@10"] > 80
    assert outcome.score == pytest.approx(sum(outcome.recall.values()) / 6)


def test_it_logs_and_plots_every_validation(tmp_path):
    clock = FakeClock()

    def three_seconds(_progress):
        clock.now += 3

    trainer = heads_trainer(tmp_path, clock=clock, on_progress=three_seconds)
    trainer.fit()
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    # A step's time is taken before it is told: three of four steps have passed at the first.
    assert [float(row["seconds"]) for row in rows] == [0, 9, 21, 33, 45, 57, 69]
    assert [float(row["epoch"]) for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["loss"]) < float(rows[1]["loss"])
    assert float(rows[-1]["rate"]) < 1e-6  # the cosine has come down
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size == (900, 400)
        assert len(plot.convert("RGB").getcolors(10**6)) > 20


def test_the_best_weights_are_returned_not_the_last(tmp_path):
    """Labels that are shuffled in the middle ruin what was learned before."""
    loss = ContrastiveLoss()

    def ruined(own, *rest):
        text = own.text.roll(1, 0) if trainer.step > 12 else own.text
        return loss(Embeddings(own.image, text), *rest)

    trainer = heads_trainer(tmp_path, setting=Setting(), loss=ruined)
    outcome = trainer.fit()
    scores = [
        sum(entry[f"{way}_R@{k}"] for way in ("t2i", "i2t") for k in (1, 5, 10)) / 6
        for entry in trainer.history
    ]
    assert outcome.score == pytest.approx(max(scores))
    assert scores[-1] < max(scores)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from toys import heads_trainer
from mmsearch.training.trainer import Setting
trainer = heads_trainer(Path({folder!r}), setting=Setting(ema=0.9, checkpoint_seconds=0))
trainer.fit()
"""


@pytest.mark.parametrize("killed_at", [1, 17])
def test_a_run_that_was_killed_comes_to_the_same_weights(tmp_path, killed_at):
    """SIGKILL in the middle, then the same command: bit for bit what an undisturbed run gives."""
    undisturbed = heads_trainer(
        tmp_path / "a", setting=Setting(ema=0.9, checkpoint_seconds=0)
    ).fit()
    folder = tmp_path / "b"
    command = [sys.executable, "-c", SCRIPT.format(here=str(HERE), folder=str(folder))]
    process = subprocess.Popen(command)
    try:
        reached = _wait_for(folder / "checkpoint.pt", killed_at, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    told = []
    setting = Setting(ema=0.9, checkpoint_seconds=0)
    resumed = heads_trainer(folder, setting=setting, notify=told.append)
    outcome = resumed.fit()
    assert reached >= killed_at
    assert any("going on at step" in line for line in told)
    assert equal(outcome.state, undisturbed.state)
    last = load_checkpoint(folder / "checkpoint.pt")
    first = load_checkpoint(tmp_path / "a" / "checkpoint.pt")
    assert equal(last["network"], first["network"])
    without_time = [
        [{k: v for k, v in e.items() if k != "seconds" and not _is_nan(v)} for e in c["history"]]
        for c in (last, first)
    ]
    assert without_time[0] == without_time[1]


def _is_nan(value):
    return isinstance(value, float) and math.isnan(value)


def _wait_for(path, step, process):
    """Stops the child at a step, so that it cannot finish while we look."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)
        state = load_checkpoint(path)
        if state is not None and state["step"] >= step:
            return state["step"]
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError("the run ended before it could be killed")


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    def stop(progress):
        if progress.done == 7:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"at step 7 of 24: .* from step 4"):
        heads_trainer(tmp_path / "a", on_progress=stop).fit()
    resumed = heads_trainer(tmp_path / "a").fit()
    assert equal(resumed.state, heads_trainer(tmp_path / "b").fit().state)


@pytest.mark.parametrize("place", ["step", "weights", "validation", "checkpoint"])
def test_ctrl_c_at_any_point_changes_nothing(tmp_path, place):
    """In the middle of a step, once weights have changed, while it validates, before it saves."""
    calls = []

    def reached(one):
        if one == place:
            calls.append(one)
            if trainer.step >= 8:
                raise KeyboardInterrupt

    def lost(loss, _step):
        reached("step")
        return loss

    class HeldOut(Rows):
        def load(self, place, seed):
            if place == 7:
                reached("validation")
            return super().load(place, seed)

    setting = Setting(ema=0.9, checkpoint_seconds=0)
    trainer = heads_trainer(
        tmp_path / "a", setting=setting, loss=Altered(lost), held_out=HeldOut,
        notify=lambda line: reached("checkpoint"),  # what was validated is told before it is saved
    )  # fmt: skip
    hook = register_optimizer_step_post_hook(lambda *_: reached("weights"))
    try:
        with pytest.raises(Interrupted, match="at step 8 "):
            trainer.fit()
    finally:
        hook.remove()
    assert len(calls) > 1
    undisturbed = heads_trainer(tmp_path / "b", setting=setting)
    resumed = heads_trainer(tmp_path / "a", setting=setting)
    assert equal(resumed.fit().state, undisturbed.fit().state)
    epochs = [[entry["epoch"] for entry in t.history] for t in (resumed, undisturbed)]
    assert epochs[0] == epochs[1]
    last, first = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "ab")
    assert equal(last["network"], first["network"])


def test_checkpoints_between_validations_are_made_when_they_are_due(tmp_path):
    clock, saved = FakeClock(), []

    def learned(_progress):
        saved.append(load_checkpoint(tmp_path / "checkpoint.pt")["step"])
        clock.now += 25

    schedule = Schedule(epochs=6, validate_every=6, batch=16, rate=3e-2, warmup=2)
    setting = Setting(checkpoint_seconds=60)
    trainer = heads_trainer(
        tmp_path, schedule=schedule, setting=setting, clock=clock, on_progress=learned
    )
    trainer.fit()
    assert saved == [3 * (step // 3) for step in range(24)]  # the third step ends 75 s after


def test_another_run_s_checkpoint_is_refused(tmp_path):
    heads_trainer(tmp_path, run="one").fit()
    with pytest.raises(TrainingError, match="--restart"):
        heads_trainer(tmp_path, run="two").fit()


@pytest.mark.parametrize("content", [b"\x80\x04cos\nsystem\n(S'false'\ntR.", b"hello\n", b".", b""])
def test_a_damaged_checkpoint_is_named_and_runs_nothing(tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(TrainingError, match="damaged"):
        heads_trainer(tmp_path).fit()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(tmp_path, bad):
    spoiled = Altered(lambda loss, step: loss * (bad if step == 9 else 1.0))
    trainer = heads_trainer(tmp_path, loss=spoiled)
    with pytest.raises(TrainingError, match=r"not a finite number at step 10 .*\(step 8\)"):
        trainer.fit()
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept["step"] == 8
    assert all(value.isfinite().all() for value in kept["network"].values())
    assert heads_trainer(tmp_path).fit().score > 40  # without the spoiling it goes on from there


def test_a_loss_that_grows_beyond_its_beginning_stops(tmp_path):
    schedule = Schedule(epochs=30, batch=16, rate=1e-3, warmup=2)
    rising = Altered(lambda loss, step: loss + 0.4 * step)
    trainer = heads_trainer(tmp_path, schedule=schedule, loss=rising)
    with pytest.raises(TrainingError, match=r"diverges to .* where it began with"):
        trainer.fit()


def test_a_good_start_that_collapses_is_stopped(tmp_path):
    """Into what guessing costs, which for a start from nothing would be no bad loss."""
    schedule = Schedule(epochs=60, batch=16, rate=1e-3, warmup=2)
    collapsing = Altered(lambda loss, step: loss * 0.0 + min(0.3 + 0.2 * step, 3.2))
    trainer = heads_trainer(tmp_path, schedule=schedule, loss=collapsing)
    with pytest.raises(TrainingError, match=r"diverges to 2\..*where it began with 0.30"):
        trainer.fit()


def test_a_loss_that_settles_higher_than_it_began_is_saved(tmp_path):
    """A trained start under stronger augmentation, say."""
    schedule = Schedule(epochs=60, batch=16, rate=1e-3, warmup=2)
    higher = Altered(lambda loss, step: loss * 0.0 + (1.0 if step else 0.3))
    setting = Setting(checkpoint_seconds=0)
    trainer = heads_trainer(tmp_path, schedule=schedule, setting=setting, loss=higher)
    trainer.fit()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == trainer.total


def test_a_rising_loss_does_not_replace_the_last_good_checkpoint(tmp_path):
    schedule = Schedule(epochs=30, batch=16, rate=1e-3, warmup=2)
    rising = Altered(lambda loss, step: loss + max(0, step - 10))
    setting = Setting(checkpoint_seconds=0)
    trainer = heads_trainer(tmp_path, schedule=schedule, setting=setting, loss=rising)
    with pytest.raises(TrainingError, match="diverges") as caught:
        trainer.fit()
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert f"(step {kept['step']})" in str(caught.value)
    assert 10 <= kept["step"] < trainer.step - 1
    _, mean, lowest = kept["losses"]
    assert mean <= lowest + 0.5


def test_a_loss_that_is_no_number_at_once_leaves_where_it_began(tmp_path):
    trainer = heads_trainer(tmp_path, loss=Altered(lambda loss, step: loss * math.nan))
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    with pytest.raises(TrainingError, match=r"at step 1 .*\(step 0\)"):
        trainer.fit()
    assert equal(load_checkpoint(tmp_path / "checkpoint.pt")["network"], before)


def test_a_start_that_nothing_beats_is_kept_and_said(tmp_path):
    def apart(own, *_):  # not together
        return (own.image * own.text).sum()

    told = []
    trainer = heads_trainer(tmp_path, setting=Setting(), loss=apart, notify=told.append)
    trained = heads_trainer(tmp_path / "first").fit()
    trainer.network.load_state_dict(trained.state)
    outcome = trainer.fit()
    assert outcome.step == 0
    assert equal(outcome.state, trained.state)
    assert any("than the start" in line for line in told)


@pytest.mark.parametrize(
    ("field", "value"),
    [("freeze", ("imge",)), ("keep_eval", ("imge",)), ("rates", {"imge": 0.1}),
     ("input_dropout", {"imge": 0.1})],
)  # fmt: skip
def test_a_module_that_there_is_not_is_named(tmp_path, field, value):
    with pytest.raises(UsageError, match=f"{field}: .* no module 'imge'; 'image' perhaps"):
        heads_trainer(tmp_path, schedule=Schedule(batch=16, **{field: value}))


def test_frozen_modules_stay_as_they_are(tmp_path):
    schedule = Schedule(epochs=2, batch=16, rate=1e-2, freeze=("image", "text.residual"))
    trainer = heads_trainer(tmp_path, schedule=schedule, setting=Setting())
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.fit()
    for name, value in trainer.network.state_dict().items():
        frozen = name.startswith(("image.", "text.residual."))
        assert torch.equal(value, before[name]) == frozen, name


def test_modules_have_the_rates_and_the_decay_that_are_set():
    network = nn.ModuleDict({
        "trunk": nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)),
        "head": nn.Linear(3, 2),
        "token_embedding": nn.Embedding(5, 3),
    })  # fmt: skip
    schedule = Schedule(rate=1.0, rates={"trunk": 0.1, "trunk.1": 0.01}, decay=0.5)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(network, schedule)
        for parameter in group["params"]
    }
    assert found == {
        "trunk.0.weight": (0.1, 0.5), "trunk.0.bias": (0.1, 0.0), "trunk.1.weight": (0.01, 0.0),
        "trunk.1.bias": (0.01, 0.0), "head.weight": (1.0, 0.5), "head.bias": (1.0, 0.0),
        "token_embedding.weight": (1.0, 0.0),
    }  # fmt: skip


def test_kept_in_eval_mode_means_that_statistics_stay(tmp_path):
    """A batch norm that is folded into an identity would be destroyed by training mode."""
    trainer = heads_trainer(tmp_path, schedule=Schedule(keep_eval=("image",), batch=16))
    modes = []
    trainer.network.image.register_forward_hook(
        lambda image, *_: modes.append((image.training, trainer.network.text.training))
    )
    trainer.fit()  # what is validated is the average, which has no hook
    assert set(modes) == {(False, True)}


def test_the_average_follows_the_weights_as_its_decay_says(tmp_path):
    """Against the recurrence, written out."""
    clock, seen = FakeClock(), []

    def look(_progress=None):
        state = load_checkpoint(tmp_path / "checkpoint.pt")
        assert state["step"] == len(seen)
        seen.append((state["network"]["text.projection.weight"],
                     state["average"]["module.text.projection.weight"]))  # fmt: skip
        clock.now += 1  # so that a checkpoint of every step is due

    setting = Setting(ema=0.5, checkpoint_seconds=0)
    heads_trainer(tmp_path, setting=setting, clock=clock, on_progress=look).fit()
    look()
    _, (expected, _), *later = seen  # torch starts the average at the first weights that it sees
    assert len(later) == 23
    for count, (weights, average) in enumerate(later, 1):
        decay = min(0.5, (1 + count) / (10 + count))  # it forgets the start sooner
        expected = decay * expected + (1 - decay) * weights
        torch.testing.assert_close(average, expected)


def test_chunks_learn_what_whole_batches_learn(tmp_path):
    plain = Schedule(epochs=2, batch=16, rate=1e-2, warmup=2)
    chunked = Schedule(epochs=2, batch=16, rate=1e-2, warmup=2, chunk=5)
    one = heads_trainer(tmp_path / "a", head="linear", schedule=plain).fit()
    other = heads_trainer(tmp_path / "b", head="linear", schedule=chunked).fit()
    for name in one.state:
        torch.testing.assert_close(one.state[name], other.state[name], atol=1e-4, rtol=1e-3)


def test_chunks_go_with_a_frozen_tower(tmp_path):
    plain = Schedule(epochs=2, batch=16, rate=1e-2, warmup=2, freeze=("image",))
    chunked = Schedule(epochs=2, batch=16, rate=1e-2, warmup=2, freeze=("image",), chunk=5)
    one = heads_trainer(tmp_path / "a", head="linear", schedule=plain).fit()
    other = heads_trainer(tmp_path / "b", head="linear", schedule=chunked).fit()
    for name in one.state:
        torch.testing.assert_close(one.state[name], other.state[name], atol=1e-4, rtol=1e-3)


def test_inputs_drop_out_in_training_alone(tmp_path):
    """Of the share that is set; the rest is scaled up, as torch's dropout does."""
    schedule = Schedule(batch=16, input_dropout={"text.projection": 0.25})
    trainer = heads_trainer(tmp_path, head="linear", schedule=schedule)
    head = trainer.network.text.projection
    seen = []
    head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    trainer.fit()  # what is validated is the average, a copy that the hook does not see
    learned = torch.cat(seen)
    assert (learned == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    whole = learned[learned.all(dim=1)].norm(dim=1)  # texts are vectors of length 1
    assert whole.tolist() == pytest.approx([1 / 0.75] * len(whole), abs=1e-5)
    assert len(whole) > 0
    trainer.network.eval()
    rows = torch.ones(1000, 8)
    head(rows)
    assert torch.equal(seen[-1], rows)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
              RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)  # fmt: skip
def test_too_little_memory_is_one_clear_line(tmp_path, error):
    def full(*_):
        raise error

    trainer = heads_trainer(tmp_path, loss=full)
    with pytest.raises(
        TrainingError, match=r"^stage 'train': the memory is full, with 16 pairs.*chunk"
    ):
        trainer.fit()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_disk_that_fills_keeps_the_last_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    schedule = Schedule(epochs=6, batch=16, rate=3e-2, warmup=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress):
        if progress.done == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))

    trainer = heads_trainer(tmp_path, schedule=schedule, on_progress=fill)
    try:
        with pytest.raises(TrainingError, match=r"checkpoint.pt: cannot be written .* resumes$"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    assert not list(tmp_path.glob(".checkpoint*"))
    undisturbed = heads_trainer(tmp_path / "b", schedule=schedule).fit()
    assert equal(heads_trainer(tmp_path, schedule=schedule).fit().state, undisturbed.state)


def test_an_earlier_stage_s_checkpoint_and_log_are_gone_on_from(tmp_path):
    first = heads_trainer(tmp_path, run="one", schedule=Schedule(name="a", epochs=1, batch=16))
    first.fit()
    second = heads_trainer(tmp_path, run="two", before=["one"], history=first.history,
                           schedule=Schedule(name="b", epochs=1, batch=16))  # fmt: skip
    second.fit()
    assert [entry["stage"] for entry in second.history] == ["a", "a", "b", "b"]


def test_nothing_left_to_learn_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="freezes everything"):
        heads_trainer(tmp_path, schedule=Schedule(batch=8, freeze=("image", "text", "logit_scale")))


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    with pytest.raises(UsageError, match="evenly between 3 processes"):
        heads_trainer(tmp_path, setting=Setting(world=3))


TWO = """
import os, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from toys import heads_trainer
from mmsearch.training.distributed import processes
from mmsearch.training.losses import ContrastiveLoss
from mmsearch.training.losses import Embeddings
from mmsearch.training.recipe import Schedule
from mmsearch.training.trainer import Setting
with processes("cpu") as own:
    trainer = heads_trainer(
        Path({folder!r}) / str(own.world), head="linear",
        schedule=Schedule(epochs=2, batch=16, rate=1e-2, warmup=2),
        setting=Setting(rank=own.rank, world=own.world), bias={bias},
        loss=ContrastiveLoss({loss!r}, rank=own.rank, world=own.world),
    )
    trainer.fit()
"""


@pytest.mark.parametrize(("loss", "bias"), [("clip", None), ("siglip", -10.0)])
def test_two_processes_learn_what_one_learns(tmp_path, loss, bias):
    """Through torchrun and gloo: the same global batches, so nearly the same weights."""
    script = tmp_path / "two.py"
    script.write_text(TWO.format(here=str(HERE), folder=str(tmp_path), loss=loss, bias=bias))
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for count in (1, 2):
        done = subprocess.run(
            [*run, f"--nproc-per-node={count}", str(script)], env=environment, check=False,
            capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, two = (load_checkpoint(tmp_path / str(n) / "checkpoint.pt") for n in (1, 2))
    for name in one["network"]:
        torch.testing.assert_close(one["network"][name], two["network"][name], atol=1e-4, rtol=1e-3)


NORMED = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
import torch
from toys import heads_trainer
from mmsearch.training.distributed import processes
from mmsearch.training.losses import ContrastiveLoss
from mmsearch.training.recipe import Schedule
from mmsearch.training.trainer import Setting

class Normed(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = torch.nn.BatchNorm1d(6), inner
        self.unused = torch.nn.Linear(2, 2)
    def forward(self, rows):
        return self.inner(self.norm(rows))

with processes("cpu") as own:
    trainer = heads_trainer(
        Path({folder!r}), head="linear", wrap=Normed,
        schedule=Schedule(epochs=2, batch=16, rate=1e-2, warmup=2),
        setting=Setting(rank=own.rank, world=own.world),
        loss=ContrastiveLoss(rank=own.rank, world=own.world),
    )
    unused = trainer.network.image.unused.weight.clone()
    if own.rank:  # as if the processes had not begun alike
        with torch.no_grad():
            trainer.network.image.norm.weight.add_(0.5)
    outcome = trainer.fit()
    assert torch.equal(trainer.network.image.unused.weight, unused)
    torch.save(vars(outcome), f"{folder}/outcome-{{own.rank}}.pt")
"""


DIFFERENT = """
import sys
from mmsearch.training.distributed import from_first, processes, require_same
with processes("cpu") as own:
    require_same("x", "names")
    assert from_first(own.rank, "cpu") == 0
    try:
        require_same(str(own.rank), "names")
    except Exception as error:
        print(error)
"""


def test_processes_that_see_other_data_all_stop(tmp_path):
    """Or they would wait for each other's next step."""
    script = tmp_path / "different.py"
    script.write_text(DIFFERENT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node=2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout.count(b"the processes see different names") == 2


def test_processes_go_on_from_the_same_best_weights(tmp_path):
    """Each process has its own batch statistics; the next stage needs one network."""
    script = tmp_path / "normed.py"
    script.write_text(NORMED.format(here=str(HERE), folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node=2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, two = (torch.load(tmp_path / f"outcome-{n}.pt", weights_only=True) for n in (0, 1))
    assert one["score"] == two["score"]
    assert equal(one["state"], two["state"])
