"""What travels with a job: the code of this installation, the resolved configuration, and what the user adds.

Never a secret: whoever may list the jobs of a cluster may read what they carry.
"""

import contextlib
import fnmatch
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel
from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, get_excludes_from_ignore_files

from cluster.config.load import ConfigError, save_toml, to_toml
from reward_server.redaction import secrets

PACKAGES = ("reward_server", "actors", "learner", "cluster")
SETTINGS = "submitted.toml"
"""The resolved configuration, in the job's working directory."""
_ROOT = Path(__file__).resolve().parents[2]
_LEFT_OUT = ("__pycache__", "*.pyc", ".*")
_PRIVATE = ("auth_token", "id_rsa", "id_ed25519", "*.pem", "*.key", ".netrc", ".env", ".git-credentials", "credentials")
_KEYS = {
    "a private key": rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File",
    "the key of a service account": rb'"type"\s*:\s*"service_account"|"private_key"\s*:',
    "a kubeconfig": rb"(?s)\A(?=.*\bkind\W{1,5}Config\b)(?=.*\bclusters\W)(?=.*\busers\W)",
}
"""What keys look like, whatever their file is called."""


def contents(include: Sequence[Path]) -> dict[str, Path]:
    """Each file that a job carries, by its name there. What the .gitignore and .rayignore files of an included folder
    name stays behind, and so do bytecode, caches and hidden files.

    Raises ConfigError for an included path that does not exist, has a name that is taken, or holds a secret.
    """
    found = {name: file for package in PACKAGES for name, file in _files(_ROOT / package, package, [])}
    taken = {*PACKAGES, SETTINGS}
    for path in include:
        if not path.exists() or path.name in taken:
            reason = "is taken by rayward's own code" if path.exists() else "does not exist"
            raise ConfigError(f"--include {path}: {path.name!r} {reason}. Remedy: name another file or folder")
        taken.add(path.name)
        added = dict(_files(path, path.name, [])) if path.is_dir() else {path.name: path}
        _refuse_secrets(path, added)
        found |= added
    return found


def sizes(files: dict[str, Path], settings: BaseModel | None) -> dict[str, int]:
    """Bytes of each file of a job. Raises ConfigError for more than Ray's job server takes."""
    found = {name: file.stat().st_size for name, file in files.items()}
    if settings is not None:
        found[SETTINGS] = len(to_toml(settings).encode())
    if (total := sum(found.values())) > GCS_STORAGE_MAX_SIZE:
        biggest = sorted(found, key=lambda name: -found[name])[:5]
        listed = ", ".join(f"{name} ({mebibytes(found[name])})" for name in biggest)
        raise ConfigError(
            f"the job would carry {mebibytes(total)}, and Ray takes {mebibytes(GCS_STORAGE_MAX_SIZE)}. The biggest: "
            f"{listed}. Remedy: put data and models on storage that the cluster's machines see, and name them by "
            "absolute paths; or list what is not needed in a .rayignore file of the folder"
        )
    return found


@contextlib.contextmanager
def working_dir(settings: BaseModel | None, include: Sequence[Path]) -> Iterator[Path]:
    """A folder with the four packages, the settings if there are any, and `include`: the job's working directory.

    Raises ConfigError, as `contents` and `sizes` do.
    """
    sizes(files := contents(include), settings)
    with tempfile.TemporaryDirectory(prefix="rayward-job-") as name:
        for target, source in files.items():
            Path(name, target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, Path(name, target))
        if settings is not None:
            save_toml(settings, Path(name, SETTINGS))
        yield Path(name)


def mebibytes(size: int) -> str:
    """A size for people."""
    return f"{size / 2**20:.1f} MiB"


def _files(folder: Path, name: str, rules: Sequence[Callable[[Path], bool]]) -> Iterator[tuple[str, Path]]:
    """The files below a folder that no rule of it, or of the folders between, leaves out."""
    rules = [*rules, *get_excludes_from_ignore_files(folder, include_gitignore=True)]
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in _LEFT_OUT) or any(rule(path) for rule in rules):
            continue
        if path.is_dir():
            if folder.resolve().is_relative_to(path.resolve()):
                raise ConfigError(f"{path} is a link to a folder that it is in, so it has no end. Remedy: remove it")
            yield from _files(path, f"{name}/{path.name}", rules)
        elif path.is_file():
            yield f"{name}/{path.name}", path


def _refuse_secrets(path: Path, files: dict[str, Path]) -> None:
    known = {where: value.encode() for where, value in secrets().items()}
    for name, file in files.items():
        # a file larger than Ray takes is refused for its size
        data = file.read_bytes() if file.stat().st_size <= GCS_STORAGE_MAX_SIZE else b""
        why = next((f"holds the secret of {where}" for where, value in known.items() if value in data), None)
        why = why or next((f"holds {what}" for what, pattern in _KEYS.items() if re.search(pattern, data)), None)
        if any(fnmatch.fnmatch(one, pattern) for one in (file.name, file.resolve().name) for pattern in _PRIVATE):
            why = "is a file that secrets are kept in"
        if why:
            raise ConfigError(
                f"--include {path}: {name} {why}, and everybody who may list the cluster's jobs could read it. Remedy: "
                "leave it out, with a .rayignore file where it is in a folder, and set secrets in the environment in "
                "which the cluster's machines start Ray"
            )
