import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import main as cli
from cluster.cli.commands import COMMANDS, Run
from cluster.config.load import compose, read_toml
from cluster.config.schema import Config
from cluster.pipeline.job import Job
from cluster.plan import check as checks
from cluster.rundir.record import ResumeRefused
from cluster.runtime.health import Monitor
from cluster.status.snapshot import snapshot

Entry = Callable[..., None]


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Entry], None]:
    """Put a function in the place of what a command runs, and what it returns in that of the work that it begins."""

    def replace(name: str, function: Entry) -> None:
        monkeypatch.setitem(COMMANDS, name, dataclasses.replace(COMMANDS[name], work=function))
        monkeypatch.setattr("cluster.pipeline.stage.execute", lambda work, begin: (begin(), work and work()))
        monkeypatch.setattr(checks, "check_config", lambda *_: checks.Diagnostics())  # no model or file is given

    return replace


def rayward(*words: str | Path) -> int:
    return cli.main([*map(str, words), "--tracking.mode", "disabled"])


def test_a_command_runs_in_its_run_directory(tmp_path: Path, entry: Any, capfd: pytest.CaptureFixture[str]):
    jobs: list[Job] = []

    def work(job: Job) -> None:
        jobs.append(job)
        job.tracker.log("sft", 1, {"sft/valid_loss": 2.5})

    entry("sft", work)
    run = tmp_path / "mine"
    (run / "data").mkdir(parents=True)
    (run / "data" / ".aside-completions.jsonl-7").write_text("of a command that was killed")
    assert rayward("sft", "--run", run, "--sft.epochs=3", "--sft.optimizer.lr", "0.5") == 0
    assert not list((run / "data").iterdir())
    (job,) = jobs
    assert job.run_dir == run
    assert (job.config.sft.epochs, job.config.sft.optimizer.lr) == (3, 0.5)
    assert compose(Config, read_toml(Config, run / "config.toml")) == job.config
    environment = json.loads((run / "environment.json").read_text())
    assert environment["command"].startswith(f"rayward sft --run {run} --sft.epochs=3")
    assert {"python", "torch", "ray", "deepspeed"} <= environment["versions"].keys()
    assert environment["machine"]["cores"] >= 1
    assert (run / "metrics.jsonl").is_file()
    assert capfd.readouterr().out.splitlines() == [
        f"rayward sft: everything goes to {run}",
        f"warning: removed {run}/data/.aside-completions.jsonl-7, which was not complete",
        "sft    1  held-out loss  2.500",
    ]


def test_file_preset_and_command_line_are_layered(tmp_path: Path, entry: Any):
    jobs: list[Job] = []
    entry("ppo", jobs.append)
    file = tmp_path / "house.toml"
    file.write_text("[ppo]\niterations = 3\nminibatch_size = 8\n")
    words = ("--preset", "tiny", "--config", file, "--ppo.iterations", "4", "--run", tmp_path / "run")
    assert rayward("ppo", *words) == 0
    config = jobs[0].config
    assert (config.ppo.iterations, config.ppo.minibatch_size) == (4, 8)  # command line, file
    assert config.generator.dtype == "float32"  # preset


def test_a_run_directory_remembers_its_settings(tmp_path: Path, entry: Any):
    jobs: list[Job] = []
    entry("ppo", jobs.append)
    assert rayward("ppo", "--run", tmp_path, "--ppo.iterations", "7") == 0
    assert rayward("ppo", "--run", tmp_path, "--ppo.clip", "0.3") == 0
    assert rayward("ppo", "--run", tmp_path, "--preset", "tiny") == 0
    first, second, fresh = (job.config.ppo for job in jobs)
    assert (first.iterations, second.iterations, second.clip) == (7, 7, 0.3)
    assert fresh.iterations != 7


def test_a_remembered_path_is_the_same_file_from_everywhere(
    tmp_path: Path, entry: Any, monkeypatch: pytest.MonkeyPatch
):
    jobs: list[Job] = []
    entry("sft", jobs.append)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert rayward("sft", "--run", tmp_path / "run", "--data.demonstrations", "d.jsonl", "--models.base=./base") == 0
    monkeypatch.chdir(tmp_path / "other")
    assert rayward("sft", "--run", tmp_path / "run") == 0
    assert [job.config.data.demonstrations for job in jobs] == [tmp_path / "one" / "d.jsonl"] * 2
    assert jobs[1].config.models.base == str(tmp_path / "one" / "base")
    saved = tmp_path / "run" / "config.toml"  # as earlier versions kept it: from wherever one is
    saved.write_text(saved.read_text().replace(f"{tmp_path}/one/", ""))
    assert rayward("sft", "--run", tmp_path / "run", "--resume") == 0
    assert jobs[2].config.data.demonstrations == tmp_path / "other" / "d.jsonl"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert rayward("sft", "--run=~/run") == 0
    assert jobs[3].run_dir == tmp_path / "home" / "run"


@pytest.mark.parametrize("option", ["--run", "--data.demonstrations", "--config"])
def test_a_path_that_is_no_text_is_refused(option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert rayward("sft", option, os.fsdecode(bytes(tmp_path) + b"/\xff")) == 2
    assert r"/\udcff' is not UTF-8" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tiny_is_another_preset_and_run_directory(tmp_path: Path, entry: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[Path, bool, int]] = []
    entry(
        "quickstart", lambda job: seen.append((job.run_dir, job.variant == "tiny", job.config.rollout.prompts_per_wave))
    )
    assert rayward("quickstart") == 0
    assert rayward("quickstart", "--tiny") == 0
    (main, main_flag, main_wave), (tiny, tiny_flag, tiny_wave) = seen
    assert (main, main_flag) == (Path("runs/quickstart"), False)
    assert (tiny, tiny_flag) == (Path("runs/tiny"), True)
    assert main_wave != tiny_wave


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pppo"], "there is no command 'pppo'. Did you mean ppo?"),
        (["--run", "mine", "ppo"], "the command stands first. Remedy: rayward --help"),
        (["ppo", "--ppo.kl"], "--ppo.kl is a section. Remedy: --ppo.kl.NAME VALUE; --help ppo.kl lists its settings"),
        (["ppo", "--ppo.kl", "0.1"], "ppo.kl: it is a section. Remedy: --ppo.kl.NAME VALUE"),
        (["ppo", "--ppo.kl.coeff", "1"], "there is no such key. Did you mean ppo.kl.coef?"),
        (
            ["ppo", "--ppo.kl.coef", "-1"],
            "ppo.kl.coef = -1 (command line): input should be greater than or equal",
        ),
        (["ppo", "--ppo.kl.coef"], "--ppo.kl.coef has no value. It takes float >= 0"),
        (["ppo", "ppo.kl.coef=1"], "'ppo.kl.coef=1' stands alone. Remedy: write --KEY VALUE"),
        (["ppo", "--coef", "1"], "there is no such key. Did you mean ppo.kl.coef?"),
        (["ppo", "--cofig", "house.toml"], "there is no option --cofig. Did you mean --config?"),
        (["quickstart", "--tinny"], "there is no option --tinny. Did you mean --tiny?"),
        (["ppo", "--run"], "--run needs a value"),
        (["ppo", "--preset", "slow"], "there is no preset 'slow'. Remedy: one of"),
        (["ppo", "--config", "no.toml"], "no.toml cannot be read (No such file or directory)"),
        (["report", "no/such/run"], "there is no run directory no/such/run"),
        (["report", "--ppo.kl.coef", "1"], "Unrecognized options: --ppo.kl.coef"),
    ],
)
def test_wrong_usage_is_told_in_a_line_and_leaves_nothing_behind(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith(f"rayward {words[0]}: ")
    assert said in line
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("demos.jsonl:3: no response. Add one"), "error: demos.jsonl:3: no response. Add one"),
        (KeyError("x"), "error: KeyError: 'x'"),
        (ValueError("a\x1b[2J"), "error: a\\x1b[2J"),
        (ExceptionGroup("tasks", [RuntimeError("a died"), RuntimeError("a died")]), "error: a died"),
    ],
)
def test_a_failed_run_is_told_in_a_line_and_its_traceback_kept(
    error: Exception, said: str, tmp_path: Path, entry: Any, capfd: pytest.CaptureFixture[str]
):
    def work(job: Job) -> None:
        raise error

    entry("sft", work)
    assert rayward("sft", "--run", tmp_path) == 1
    shown = capfd.readouterr()
    assert shown.err.splitlines() == [said]
    assert "Traceback" not in shown.out
    assert str(tmp_path / "logs" / "error.log") in shown.out
    kept = (tmp_path / "logs" / "error.log").read_text()
    assert "Traceback" in kept
    assert f"rayward sft --run {tmp_path}" in kept


def test_ctrl_c_is_exit_code_130(tmp_path: Path, entry: Any, capfd: pytest.CaptureFixture[str]):
    def work(job: Job) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    entry("sft", lambda job: lambda: work(job))
    assert rayward("sft", "--run", tmp_path) == 130
    (line,) = capfd.readouterr().err.splitlines()
    stopped = f"error: stopped by Ctrl-C; what is done is in {tmp_path}."
    assert line == f"{stopped} Go on with: rayward sft --run {tmp_path} --resume"
    entry("sft", work)  # while it reads its files
    assert rayward("sft", "--run", tmp_path) == 130
    assert capfd.readouterr().err == f"{stopped}\n"
    assert rayward("sft", "--run", tmp_path, "--resume") == 130
    assert "--resume" in capfd.readouterr().err


def test_a_command_owns_its_run_directory_and_those_that_look_do_not_mind(tmp_path: Path, entry: Any):
    def work() -> None:
        assert rayward("ppo", "--run", tmp_path) == 2
        sys.stderr.flush()
        said = (tmp_path / "logs" / "driver.log").read_text()  # where the first has sent what this process prints
        assert f"rayward ppo: {tmp_path} is at work: `rayward sft`, PID {os.getpid()} on " in said
        assert [cli.main([name, str(tmp_path)]) for name in ("report", "status")] == [0, 0]

    entry("sft", lambda job: work)
    entry("ppo", lambda job: None)
    assert rayward("sft", "--run", tmp_path) == 0
    assert rayward("ppo", "--run", tmp_path) == 0


def test_sigterm_unwinds_the_run(tmp_path: Path, entry: Any):
    stopped: list[bool] = []

    def work(job: Job) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            stopped.append(True)

    entry("sft", work)
    before = signal.getsignal(signal.SIGTERM)
    assert rayward("sft", "--run", tmp_path) == 143
    assert stopped == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_directory_that_cannot_be_written_is_wrong_usage(
    tmp_path: Path, entry: Any, capsys: pytest.CaptureFixture[str]
):
    entry("sft", lambda job: None)
    (tmp_path / "file").write_text("")
    assert rayward("sft", "--run", tmp_path / "file" / "run") == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_run_directory_of_somebody_else_is_wrong_usage(
    tmp_path: Path, entry: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    entry("sft", lambda job: None)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # whoever runs as root may write everywhere
    assert rayward("sft", "--run", tmp_path) == 2
    assert "cannot be written (Permission denied). Remedy: name another --run DIR" in capsys.readouterr().err


def test_report_takes_the_run_directory_alone(tmp_path: Path, entry: Any):
    seen: list[Path] = []

    def work(run: Run = Path("runs/rlhf"), json: bool = False) -> None:
        seen.append(run)

    entry("report", work)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert cli.main(["report", "--run", str(tmp_path)]) == 0
    assert cli.main(["report", f"--run={tmp_path}"]) == 0
    assert seen == [tmp_path, tmp_path, tmp_path]


def test_a_flag_is_given_or_not(tmp_path: Path, entry: Any, capfd: pytest.CaptureFixture[str]):
    seen: list[bool] = []

    def work(run: Run = Path("runs/rlhf"), json: bool = False) -> None:
        seen.append(json)

    entry("lineage", work)
    assert cli.main(["lineage", str(tmp_path)]) == 0
    assert cli.main(["lineage", "--json", str(tmp_path)]) == 0
    assert seen == [False, True]
    assert cli.main(["lineage", "--help"]) == 0
    assert "--json" in capfd.readouterr().out
    assert cli.main(["lineage", "--tiny", str(tmp_path)]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert COMMANDS[name].purpose in text
    assert COMMANDS[name].example in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_right_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = COMMANDS[name].example.partition(" > ")[0].split()
    assert words[:2] == ["rayward", name]
    if COMMANDS[name].sections:
        cli.load(Config, cli.parse(COMMANDS[name], words[2:]))
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").touch()
    cli.bind(COMMANDS[name], words[2:])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["ppo", "--help"], 0),
        (["submit", "--help"], 0),
        (["jobs", "--adress", "x"], 2),
        (["completion", "bash"], 0),
        (["ppo", "--coef", "1"], 2),
        (["ppo", "--ppo.minibatch_size", "0"], 2),
    ],
)
def test_help_and_configuration_errors_need_no_heavy_import(words: list[str], code: int):
    """`ppo --help` once took 7 seconds, as the sections stood beside code that imports torch and Ray."""
    program = (
        f"import sys; from cluster.cli.main import main; code = main({words}); "
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'wandb', 'httpx', 'fastapi'} & "
        "sys.modules.keys(); assert not heavy, heavy; sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == code, ran.stderr


def test_no_command_at_all_shows_the_overview_and_is_wrong(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    assert "rayward COMMAND" in capsys.readouterr().out


# --- going on


def test_resume_and_restart_reach_the_job_and_only_resume_goes_on_with_the_saved_settings(tmp_path: Path, entry: Any):
    jobs: list[Job] = []
    entry("ppo", jobs.append)
    run = ("--run", tmp_path, "--preset", "tiny")
    assert rayward("ppo", *run, "--ppo.clip", "0.3") == 0
    assert rayward("ppo", *run, "--resume") == 0
    assert rayward("ppo", *run, "--restart") == 0
    assert [job.start for job in jobs] == ["new", "resume", "restart"]
    assert [job.config.ppo.clip for job in jobs] == [0.3, 0.3, 0.2]  # the second as the run directory has it
    assert rayward("ppo", *run, "--resume", "--restart") == 2


def test_a_file_that_is_named_again_is_read_over_the_saved_settings(tmp_path: Path, entry: Any):
    jobs: list[Job] = []
    entry("ppo", jobs.append)
    file = tmp_path / "house.toml"
    file.write_text("[ppo]\niterations = 3\nclip = 0.3\n")
    words = ("--config", file, "--run", tmp_path / "run")
    assert rayward("ppo", *words, "--ppo.minibatch_size", "8") == 0
    file.write_text("[ppo]\niterations = 5\nclip = 0.3\n")
    assert rayward("ppo", *words, "--resume") == 0
    assert (jobs[1].config.ppo.iterations, jobs[1].config.ppo.minibatch_size) == (5, 8)


def test_damaged_bookkeeping_does_not_stop_a_resume(tmp_path: Path, entry: Any, capfd: pytest.CaptureFixture[str]):
    entry("sft", lambda job: lambda: job.tracker.log("sft", 2, {"sft/valid_loss": 2.5}))
    damage = {"wandb-runs.json": b"{", "metrics.jsonl": b"\xff\n", "phases.jsonl": b"\0", "summary.json": b"["}
    for name, content in damage.items():
        (tmp_path / name).write_bytes(content)
    assert cli.main(["sft", "--run", str(tmp_path), "--resume"]) == 0  # with W&B
    assert f"warning: {tmp_path}/wandb-runs.json is damaged" in capfd.readouterr().out


def test_settings_that_are_refused_do_not_replace_those_of_the_run(
    tmp_path: Path, entry: Any, capfd: pytest.CaptureFixture[str]
):
    def refuse(job: Job) -> None:
        raise ResumeRefused("the stage 'ppo' was made of something else")

    entry("ppo", lambda job: None)
    assert rayward("ppo", "--run", tmp_path, "--ppo.clip", "0.3") == 0
    before = (tmp_path / "config.toml").read_bytes()
    entry("ppo", refuse)
    assert rayward("ppo", "--run", tmp_path, "--resume", "--ppo.clip", "0.1") == 2
    assert (tmp_path / "config.toml").read_bytes() == before
    assert capfd.readouterr().err.splitlines() == ["error: the stage 'ppo' was made of something else"]
    assert not (tmp_path / "logs" / "error.log").exists()


def test_a_stopped_command_says_how_to_go_on(tmp_path: Path, entry: Any, capfd: pytest.CaptureFixture[str]):
    def work(job: Job) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    entry("quickstart", lambda job: lambda: work(job))
    assert rayward("quickstart", "--tiny", "--run", tmp_path) == 130
    assert capfd.readouterr().err.endswith(f"Go on with: rayward quickstart --tiny --run {tmp_path} --resume\n")


def test_the_exit_code_of_a_check_is_what_it_found(tmp_path: Path, entry: Any):
    def work(run: Run = Path("runs/rlhf"), json: bool = False) -> int:
        return 1 if json else 0

    entry("audit", work)
    assert cli.main(["audit", str(tmp_path)]) == 0
    assert cli.main(["audit", str(tmp_path), "--json"]) == 1


def test_a_jobs_id_stands_for_its_run_directory_where_that_can_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    jobs = {
        "here": SimpleNamespace(status="RUNNING", run=str(tmp_path)),
        "away": SimpleNamespace(status="RUNNING", run="/x"),
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.jobs.submit.connect", lambda address: None)
    monkeypatch.setattr("cluster.jobs.submit.job", lambda client, name: jobs[name])
    (tmp_path / "status.json").write_text(json.dumps(snapshot("ppo", Monitor()) | {"started": 0.0, "ended": "done"}))
    assert cli.main(["status", "here"]) == 0
    assert "done" in capfd.readouterr().out
    assert cli.main(["status", "away"]) == 2
    assert "Remedy: rayward submit status --run /x" in capfd.readouterr().err


def test_what_is_neither_a_run_nor_a_job_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert cli.main(["status", "no_such_run"]) == 1
    assert "no_such_run is no run directory here, and as a job: no Ray job server answers" in capfd.readouterr().err
    assert cli.main(["top", "no/such/run"]) == 1
    assert "no command has run in no/such/run" in capfd.readouterr().err
