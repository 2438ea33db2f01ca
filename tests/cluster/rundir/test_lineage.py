"""Where things come from: what is recorded, what is noticed, and what survives a command that was killed."""

import hashlib
import json
import logging
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from cluster.config.schema import Config
from cluster.rundir.lineage import (
    FILE,
    Artefact,
    Input,
    code_version,
    digest,
    done,
    latest,
    lineage_json,
    lineage_tree,
    origin,
    read_lineage,
    record,
    state,
)


def made(
    run: Path, path: str, *inputs: str | Path, content: str = "x", kind: str = "data", config: Config | None = None
) -> Artefact:
    file = run / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return record(run, kind, file, inputs, f"rayward {kind}", config or Config())


def shown(run: Path) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(lineage_tree(run))
    return console.export_text()


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_where_something_was_made_is_found_in_this_run_and_in_another(tmp_path):
    ours, theirs, outside = tmp_path / "ours", tmp_path / "theirs", tmp_path / "prompts.jsonl"
    outside.write_text("hello")
    mine = made(ours, "data/a.jsonl")
    deep = made(theirs, "round-1/data/b.jsonl")
    assert origin(ours, "data/a.jsonl") == (ours, mine)
    assert origin(ours, str(theirs / "round-1" / "data" / "b.jsonl")) == (theirs, deep)
    assert origin(ours, str(outside)) is None
    assert origin(ours, "data/c.jsonl") is None


def test_a_record_says_what_was_made_of_what_by_whom(tmp_path):
    outside = tmp_path / "prompts.jsonl"
    outside.write_text("hello")
    run = tmp_path / "run"
    made(run, "data/a.jsonl", content="a")
    found = made(run, "sft/model.bin", run / "data" / "a.jsonl", outside, "org/model", kind="sft")
    assert read_lineage(run)[1] == found
    assert (found.name, found.kind, found.path, found.sha256) == ("model", "sft", "sft/model.bin", sha("x"))
    assert found.inputs == (
        Input(path="data/a.jsonl", sha256=sha("a")),
        Input(path=str(outside), sha256=sha("hello")),
        Input(path="org/model", sha256=None),
    )
    assert found.command == "rayward sft"
    assert found.config == sha(json.dumps(Config().model_dump(mode="json"), sort_keys=True))
    assert found.version == code_version()[0]


def test_the_hash_of_a_folder_is_that_of_its_names_and_contents(tmp_path):
    for name, text in (("b/2", "two"), ("a", "one")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    whole = digest(tmp_path)
    assert whole == sha(f"{sha('one')}  a\n{sha('two')}  b/2\n")
    (tmp_path / "a").rename(tmp_path / "c")
    assert digest(tmp_path) != whole


def test_the_code_is_named_by_its_commit(tmp_path):
    commit = code_version()[1]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert commit is None or commit.removesuffix("-dirty") == head


def test_a_step_is_done_when_its_result_is_recorded_and_there_as_it_was(tmp_path):
    path = tmp_path / "policy" / "model.bin"
    assert not done(tmp_path, path)
    path.parent.mkdir()
    path.write_text("half of it")  # a command was killed here
    assert not done(tmp_path, path)
    made(tmp_path, "policy/model.bin")
    assert done(tmp_path, path)
    path.write_text("something else")
    with pytest.raises(ValueError, match=r"policy/model\.bin has changed since `rayward data` made it.*remove it"):
        done(tmp_path, path)
    path.unlink()
    assert not done(tmp_path, path)


def test_the_last_record_of_a_path_counts(tmp_path):
    made(tmp_path, "a", content="1")
    second = made(tmp_path, "a", content="2")
    assert latest(read_lineage(tmp_path)) == {"a": second}
    assert state(tmp_path, second) == "whole"


def test_a_line_that_a_kill_cut_off_costs_that_record_only(tmp_path):
    first = made(tmp_path, "a")
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"name": "b", "ki')
    assert read_lineage(tmp_path) == [first]
    third = made(tmp_path, "c")
    assert read_lineage(tmp_path) == [first, third]


def test_a_line_that_is_damaged_is_told(tmp_path, caplog):
    first = made(tmp_path, "a")
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"name": "b", "ki\n')
    third = made(tmp_path, "c")
    with caplog.at_level(logging.WARNING):
        assert read_lineage(tmp_path) == [first, third]
    assert f"{FILE}:2 is not a record" in caplog.text


def test_who_reads_while_others_record_sees_whole_records_and_warns_of_nothing(tmp_path, caplog):
    """The feed of W&B looks up inputs while the command goes on; a long line is not written at once."""
    long, seen, per_thread = tmp_path / ("x" * 200), [0], 25
    long.write_text("x")

    def write(first: int) -> None:
        for number in range(per_thread):
            made(tmp_path, f"{first}-{number}", *[long] * 40)

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, first) for first in range(3)]
        while not all(one.done() for one in writing):
            seen.append(len(read_lineage(tmp_path)))
    for one in writing:
        one.result()
    assert seen == sorted(seen)
    assert len(latest(read_lineage(tmp_path))) == 3 * per_thread
    assert caplog.text == ""


def test_an_input_that_changed_since_it_was_made_is_told(tmp_path, caplog):
    made(tmp_path, "a", content="1")
    (tmp_path / "a").write_text("2")
    with caplog.at_level(logging.WARNING):
        made(tmp_path, "b", tmp_path / "a")
    assert "a has changed since `rayward data` made it" in caplog.text


def test_the_tree_goes_from_results_to_sources_and_tells_changes(tmp_path):
    made(tmp_path, "data", content="1")
    made(tmp_path, "sft", tmp_path / "data", kind="sft")
    made(tmp_path, "reward", tmp_path / "sft", tmp_path / "data", kind="reward")
    made(tmp_path, "policy", tmp_path / "sft", tmp_path / "reward", kind="policy")
    lines = shown(tmp_path).splitlines()
    assert [line.strip("│├└─ ").split()[0] for line in lines[1:]] == ["policy", "sft", "data", "reward", "sft", "data"]
    assert "(see above)" in lines[5]
    assert "changed" not in shown(tmp_path)
    made(tmp_path, "sft", kind="sft", content="y")  # trained once more: what was made of the old one says so
    (tmp_path / "reward").write_text("z")
    (tmp_path / "data").unlink()
    told = shown(tmp_path)
    assert f"made again since, now {sha('y')[:12]}" in told
    assert "changed since it was made" in told
    assert "no longer there" in told


def test_json_has_each_path_once_with_its_state(tmp_path):
    made(tmp_path, "a")
    made(tmp_path, "b", tmp_path / "a")
    (tmp_path / "a").write_text("other")
    assert [(row["path"], row["state"]) for row in json.loads(lineage_json(tmp_path))] == [
        ("a", "changed"),
        ("b", "whole"),
    ]


def test_a_directory_without_records_says_who_writes_them(tmp_path):
    with pytest.raises(ValueError, match=r"has no lineage\.jsonl: it is written by the commands"):
        lineage_tree(tmp_path)


def test_a_narrow_terminal_cuts_nothing_off(tmp_path):
    made(tmp_path, "round-1/data/comparisons.jsonl", kind="comparisons")
    (tmp_path / "round-1" / "data" / "comparisons.jsonl").write_text("other")
    console = Console(width=50, record=True, soft_wrap=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(lineage_tree(tmp_path))
    told = " ".join(console.export_text().split())
    assert "changed since it was made" in told
    assert told.endswith("rayward comparisons")


def test_what_was_made_with_code_of_a_folder_is_marked(tmp_path: Path) -> None:
    trusting = Config.model_validate({"models": {"trust_remote_code": True}})
    assert made(tmp_path, "sft", config=trusting).trust_remote_code
    assert not made(tmp_path, "reward", "sft").trust_remote_code
    line = next(line for line in shown(tmp_path).splitlines() if "sft" in line)
    assert "made with code that a model's folder brought along" in line
