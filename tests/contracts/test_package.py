"""What the package promises as a whole: names, documentation, the wheel."""

from __future__ import annotations

import ast
import doctest
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

import mmsearch
from mmsearch import errors

pytestmark = pytest.mark.slow


def test_the_public_names_are_these():
    """A new one is a promise; a missing one is a breach."""
    assert sorted(mmsearch.__all__) == [
        "Engine", "Filter", "Hit", "IngestReport", "Query", "Term", "__version__",
    ]  # fmt: skip
    assert all(getattr(mmsearch, name) for name in mmsearch.__all__)
    with pytest.raises(AttributeError):
        mmsearch.nonsense  # noqa: B018


def test_every_error_is_drawn_and_has_its_exit_code():
    tree = [
        value for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.MmsearchError)
    ]  # fmt: skip
    assert all(value.__name__ in errors.__doc__ for value in tree)
    codes = {value.exit_code for value in tree} - {1}
    assert codes == {2, 3, 4, 5, 6, 130}
    assert all(f"(exit {code})" in errors.__doc__ for code in codes)


def test_the_example_in_the_readme_runs(tiny, tmp_path, monkeypatch):
    from fakes import paint

    paint(tmp_path / "Pictures" / "red.png", "red")
    (tmp_path / "example.jpg").write_bytes(paint(tmp_path / "x.jpg", "red").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("```python\n")
    code, _, _ = rest.partition("```")
    assert "Engine.open" in code
    exec(compile(code, "README.md", "exec"), {})


def test_the_example_of_the_engine_is_valid_python():
    import mmsearch.engine

    examples = doctest.DocTestParser().get_examples(mmsearch.engine.__doc__)
    assert len(examples) >= 2
    for example in examples:
        compile(example.source, "engine", "exec")


def test_the_command_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/cli_docs.py", "--check"], cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, "run: make docs"


def test_every_command_is_documented_and_tested():
    from mmsearch.cli.app import app

    names = [command.name for command in app.registered_commands]
    for group in app.registered_groups:
        names += [f"{group.name} {c.name}" for c in group.typer_instance.registered_commands]
    reference = (REPOSITORY / "docs" / "cli.md").read_text()
    tests = (REPOSITORY / "tests" / "cli" / "test_cli.py").read_text()
    assert len(names) == 21
    for name in names:
        assert f"## mmsearch {name}" in reference
        assert '"' + name.replace(" ", '", "') + '"' in tests


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(REPOSITORY)], check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mmsearch", f"mmsearch-{mmsearch.__version__}.dist-info"}
    assert "mmsearch/encoders/bundled/tiny/open_clip_model.safetensors" in names
    assert "mmsearch/encoders/bundled/tiny/words.txt" in names
    assert wheel.stat().st_size < 45e6


def test_a_search_runs_from_the_wheel(wheel, tmp_path):
    """In an environment of its own, which sees the libraries of the core but not this checkout."""
    import venv

    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    libraries = Path(sys.modules["numpy"].__file__).parents[1]
    # A .pth line adds the libraries' folder; its own .pth files, one of which leads to the
    # checkout, are not read.
    (site / "libraries.pth").write_text(f"{libraries}\n")
    heavy = ["torch", "open_clip", "torchvision", "transformers", "nncf", "pyarrow", "matplotlib"]
    (site / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({heavy}))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["MMSEARCH_CACHE"] = str(tmp_path / "cache")

    def run(*arguments):
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run("-c", "import mmsearch; print(mmsearch.__file__)")
    run("-m", "mmsearch", "demo", "--out", str(tmp_path / "demo"))
    found = run("-m", "mmsearch", "search", "a cat", "--index", str(tmp_path / "demo" / "index"))
    assert "animal.png" in found


@pytest.fixture(scope="module")
def core(wheel, tmp_path_factory):
    """An environment with the wheel and what it asks for, no extra; runs a module there."""
    top = tmp_path_factory.mktemp("core")
    subprocess.run([sys.executable, "-m", "venv", str(top / "env")], check=True)
    python = top / "env" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", str(wheel)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if "connection" in installed.stderr.lower() or "name resolution" in installed.stderr:
        pytest.skip("needs a package registry")
    assert not installed.returncode, installed.stderr
    hidden = ("PYTHONPATH", "MMSEARCH_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["MMSEARCH_CACHE"] = str(top / "cache")

    def run(*arguments, code=0):
        done = subprocess.run(
            [python, *map(str, arguments)], cwd=top, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return run


def test_the_core_is_small_and_has_no_torch(core):
    listing = """
import importlib.metadata as metadata, pathlib, sys
print(sum(f.lstat().st_size for f in pathlib.Path(sys.prefix).rglob("*")) / 2**20)
print(*(one.name for one in metadata.distributions()))
"""
    size, names = core("-c", listing).splitlines()
    assert float(size) < 540
    assert {"faiss-cpu", "pillow", "typer", "SQLAlchemy", "tqdm"} <= set(names.split())
    assert not {"torch", "open_clip_torch", "nncf", "pyarrow", "matplotlib"} & set(names.split())


def test_the_core_indexes_searches_measures_and_keeps(core, tmp_path):
    index, at = ("-m", "mmsearch"), ("--index", tmp_path / "demo" / "index")
    assert "text -> image" in core(*index, "demo", "--out", tmp_path / "demo")
    assert "animal.png" in core(*index, "search", "a cat", *at)
    assert "unchanged" in core(*index, "index", "--patches", *at)
    assert "animal.png" in core(*index, "search", "a cat", "--rerank", "5", *at)
    example = ("--image", next((tmp_path / "demo" / "gallery").glob("*.png")))
    assert ".png" in core(*index, "search", "but in red", *example, "--compose", "early", *at)
    core(*index, "bench", "--export", tmp_path / "vectors", *at)
    assert (tmp_path / "vectors" / "image.npy").is_file()
    assert "sound" in core(*index, "verify", "--deep", *at)
    core(*index, "backup", tmp_path / "backup", *at)
    core(*index, "restore", tmp_path / "backup", "--index", tmp_path / "again")
    assert "animal.png" in core(*index, "search", "a cat", "--index", tmp_path / "again")


def test_the_core_runs_models_that_come_as_onnx(core, tmp_path):
    import onnx_models
    from fakes import paint

    onnx_models.siglip(tmp_path / "model")
    for colour in ("red", "green", "blue"):
        paint(tmp_path / "photos" / f"{colour}.png", colour)
    index, at = ("-m", "mmsearch"), ("--index", tmp_path / "index")
    model = ("--model", f"onnx:{tmp_path / 'model'}")
    assert "3 added" in core(*index, "index", tmp_path / "photos", *model, *at)
    found = core(*index, "search", "--image", tmp_path / "photos/red.png", "--paths", *at)
    assert found.splitlines()[0].endswith("red.png")
    assert "green.png" in core(*index, "search", "green", *at)
    assert "base" in core(*index, "models", "--available")


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (("export", "vectors"), "pyarrow"),
        (("train", "align", "photos", "--out", "m"), "torch"),
        (("train", "clip", "recipe.toml", "--out", "m"), "torch"),
        (("train", "fusion"), "torch"),
        (("train", "compose"), "torch"),
        (("train", "rerank", "photos"), "torch"),
        (("search", "a cat", "--device", "cuda"), "torch"),
        (("index", "photos", "--model", "ViT-B-32/laion2b_s34b_b79k"), "torch"),
        (("index", "photos", "--precision", "int8"), "nncf"),
    ],
)
def test_what_the_core_lacks_is_named_with_the_command_that_brings_it(
    core, tmp_path, command, package
):
    from fakes import paint

    photos, index = tmp_path / "photos", tmp_path / "index"
    for number in range(8):
        paint(photos / f"{number}.png", "red", mark=number + 1)
    core("-m", "mmsearch", "index", photos, "--index", index)
    words = [str(photos) if word == "photos" else word for word in command]
    at = () if command[:2] in (("train", "align"), ("train", "clip")) else ("--index", index)
    if command[0] == "index":
        at = ("--index", tmp_path / "other")
    told = core("-m", "mmsearch", *words, *at, code=2)
    assert re.search(rf"-m pip install .*'{package}>=", told)
    assert "Traceback" not in told


def test_nothing_speaks_of_another_machine():
    """No path of a developer's machine and no data set in what is committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0")[:-1]:
        path = REPOSITORY / name
        assert path.stat().st_size < 40e6, name
        if path.suffix in (".py", ".md", ".toml", ".json", ".html"):
            text = path.read_text(encoding="utf-8")
            for folder in (REPOSITORY, REPOSITORY.parent):
                if len(folder.parts) > 2:  # not a folder that every machine has
                    assert f"{folder}/" not in text, name


def test_no_code_comes_out_of_a_file():
    """No pickles, and weights only where torch reads them; one place reaches out, for weights."""
    reaching = []
    for path in (REPOSITORY / "mmsearch").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve", "joblib", "dill"} & set(names), path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("eval", "exec"), path
            assert given.get("allow_pickle", "False") == "False", path
            assert given.get("shell", "False") == "False", path
            if called == "torch.load":
                assert given["weights_only"] == "True", path
            if called.endswith(("urlopen", "urlretrieve", "hf_hub_download", "snapshot_download")):
                reaching.append(path.name)
    assert set(reaching) <= {"registry.py", "loading.py", "open_clip.py"}
