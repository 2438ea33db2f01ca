import re
from pathlib import Path

import pytest

from cluster.config.load import ConfigError
from cluster.config.schema import Config
from cluster.jobs import package as module
from cluster.jobs.package import SETTINGS, contents, sizes, working_dir

CANARY = "canary-0123456789abcdef"


def test_a_working_directory_is_the_code_the_settings_and_what_is_included(tmp_path: Path):
    (tmp_path / "mine.py").write_text("x = 1")
    (tmp_path / "data" / "__pycache__").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    with working_dir(Config(), [tmp_path / "mine.py", tmp_path / "data"]) as folder:
        names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        assert {"cluster/cli/main.py", "cluster/config/presets/tiny.toml", "learner/ppo.py", SETTINGS} <= names.keys()
        assert {"mine.py", "data/a.jsonl"} <= names.keys()
        assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
        assert {Path(name).parts[0] for name in names} == {
            *("actors", "cluster", "learner", "reward_server"),
            *(SETTINGS, "mine.py", "data"),
        }
        told = sizes(contents([tmp_path / "mine.py", tmp_path / "data"]), Config())
        assert told == {name: path.stat().st_size for name, path in names.items()}
    assert not folder.exists()


@pytest.mark.parametrize(("name", "reason"), [("absent.py", "does not exist"), ("learner", "is taken")])
def test_what_cannot_be_included_is_refused(tmp_path: Path, name: str, reason: str):
    (tmp_path / "learner").mkdir()
    with pytest.raises(ConfigError, match=reason):
        contents([tmp_path / name])


def test_the_ignore_files_of_an_included_folder_are_respected_at_every_depth(tmp_path: Path):
    for name in (
        "mine/a.py",
        "mine/big.bin",
        "mine/deep/b.py",
        "mine/deep/c.bin",
        "mine/deep/out/d.py",
        "mine/.x/e.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "mine" / ".gitignore").write_text("*.bin\n")
    (tmp_path / "mine" / "deep" / ".rayignore").write_text("out/\n")
    found = {name for name in contents([tmp_path / "mine"]) if name.startswith("mine/")}
    assert found == {"mine/a.py", "mine/deep/b.py"}


def test_more_than_ray_takes_is_refused_with_the_biggest_files_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "GCS_STORAGE_MAX_SIZE", 3 * 2**20)
    monkeypatch.setattr("shutil.copy2", lambda *_: pytest.fail("nothing may be copied"))
    (tmp_path / "data").mkdir()
    for name, size in (("small", 1), ("large", 2**21), ("larger", 3 * 2**20)):
        with (tmp_path / "data" / name).open("wb") as file:
            file.truncate(size)
    with pytest.raises(ConfigError) as error, working_dir(None, [tmp_path / "data"]):
        pass
    text = str(error.value)
    assert re.search(r"the job would carry \d\.\d MiB, and Ray takes 3\.0 MiB", text)
    assert "data/larger (3.0 MiB), data/large (2.0 MiB)" in text
    assert "Remedy: put data and models on storage" in text


@pytest.mark.parametrize("name", [".env", ".netrc", "auth_token", "server.pem", "id_rsa"])
def test_a_file_that_secrets_are_kept_in_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_text("nothing")
    with pytest.raises(ConfigError, match=r"is a file that secrets are kept in.*Remedy: leave it out"):
        contents([tmp_path / name])


def test_a_file_with_a_secret_of_this_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notebook.ipynb").write_text(f"wandb.login({CANARY!r})")
    assert "mine/notebook.ipynb" in contents([tmp_path / "mine"])
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    with pytest.raises(ConfigError, match=r"mine/notebook\.ipynb holds the secret of WANDB_API_KEY") as error:
        contents([tmp_path / "mine"])
    assert CANARY not in str(error.value)
    (tmp_path / "mine" / ".rayignore").write_text("*.ipynb\n")
    assert "mine/notebook.ipynb" not in contents([tmp_path / "mine"])


KUBECONFIG = "apiVersion: v1\nkind: Config\nclusters:\n- name: a\nusers:\n- name: me\n  user:\n    token: x\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("# mine\n-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n", "a private key"),
        ("-----BEGIN PRIVATE KEY-----\n", "a private key"),
        ('{"project_id": "x",\n "type": "service_account"}', "the key of a service account"),
        (KUBECONFIG, "a kubeconfig"),
        ('{"users": [], "clusters": [], "kind": "Config"}', "a kubeconfig"),
    ],
)
def test_keys_are_known_by_what_they_hold_and_through_links(tmp_path: Path, text: str, what: str):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes").write_text(text)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.txt").symlink_to(tmp_path / "elsewhere" / "notes")
    (tmp_path / "mine" / "more").symlink_to(tmp_path / "elsewhere")
    for include in ("elsewhere", "mine", "mine/data.txt", "mine/more"):
        with pytest.raises(ConfigError, match=f"holds {what}, and everybody who may list"):
            contents([tmp_path / include])


def test_a_link_says_what_it_is_by_the_name_of_its_target_and_must_have_an_end(tmp_path: Path):
    (tmp_path / ".env").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings").symlink_to(tmp_path / ".env")
    with pytest.raises(ConfigError, match="mine/settings is a file that secrets are kept in"):
        contents([tmp_path / "mine"])
    (tmp_path / "mine" / "settings").unlink()
    (tmp_path / "mine" / "again").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="is a link to a folder that it is in"):
        contents([tmp_path / "mine"])


def test_what_only_speaks_of_keys_and_clusters_travels(tmp_path: Path):
    (tmp_path / "notes.md").write_text("kind: Deployment\nclusters: two\nusers: many\nA PRIVATE KEY is secret.")
    assert "notes.md" in contents([tmp_path / "notes.md"])
