import math
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.config.load import (
    ConfigError,
    as_toml,
    compose,
    nearest,
    read_overrides,
    read_toml,
    save_toml,
    settings,
)
from cluster.config.schema import Config
from reward_server.config import NameOrPath

CANARY = "canary-0123456789abcdef"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Penalty(Section):
    coef: float = Field(default=0.02, ge=0)
    """Price of a nat."""
    rule: Literal["fixed", "adaptive"] = "fixed"
    """How it moves."""


class Optimizer(Section):
    lr: float = Field(gt=0)
    """Peak learning rate."""
    beta: float = 0.9
    """Decay."""


class Part(Section):
    name: str
    """Its name."""
    target: Annotated[str | None, NameOrPath("model")] = None
    """What it is."""
    kind: Literal["model", "regex"] = "model"
    """How it is read."""


class Training(Section):
    penalty: Penalty = Penalty()
    """The penalty."""
    optimizer: Optimizer = Optimizer(lr=1e-5, beta=0.5)
    """Adam."""
    steps: int | None = Field(default=None, ge=1)
    """How many."""
    warmup: int | None = Field(default=None, ge=2)
    """How long."""
    tags: tuple[str, ...] = ("a",)
    """Words."""
    parts: tuple[Part, ...] = ()
    """Parts."""
    folder: Path | None = None
    """A folder."""
    shuffle: bool = True
    """Whether."""
    name: Annotated[str, NameOrPath()] = "x"
    """A name."""
    names: Annotated[tuple[str, ...], NameOrPath()] = ()
    """Names."""
    limit: float = math.inf
    """A limit."""

    @model_validator(mode="after")
    def _thirteen_is_refused(self) -> Self:
        if self.steps == 13:
            raise ValueError("steps is 13: choose another number")
        return self


def given(*pairs: tuple[str, str | None]) -> Training:
    return compose(Training, read_overrides(Training, pairs))


def wrong(*pairs: tuple[str, str | None]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        given(*pairs)
    return str(caught.value).splitlines()


def test_nothing_given_is_the_defaults():
    assert given() == Training()


def test_a_setting_changes_itself_only():
    config = given(("optimizer.lr", "0.1"))
    # beta: 0.5 is the training's default, 0.9 the section class's own
    assert config == Training(optimizer=Optimizer(lr=0.1, beta=0.5))


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("penalty.coef", "0.05", 0.05),
        ("penalty.coef", "-0", 0.0),
        ("penalty.rule", "adaptive", "adaptive"),
        ("steps", "7", 7),
        ("steps", "none", None),
        ("tags", '["b", "c"]', ("b", "c")),
        ("tags", "[]", ()),
        ("parts", '[{name = "p", target = "q"}]', (Part(name="p", target="q"),)),
        ("folder", "/some/where", Path("/some/where")),
        ("shuffle", "false", False),
        ("shuffle", None, True),
        ("name", "123", "123"),
        ("name", "none", "none"),
        ("name", "with space = and # signs", "with space = and # signs"),
        ("limit", "1e3", 1000.0),
    ],
)
def test_values_need_no_quotes_on_the_command_line(key: str, text: str | None, expected: object):
    value: object = given((key, text))
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected


def test_dashes_in_keys_are_underscores():
    class Dashed(Section):
        max_tokens: int = 1

    assert compose(Dashed, read_overrides(Dashed, [("max-tokens", "5")])).max_tokens == 5


def test_later_wins(tmp_path: Path):
    file = tmp_path / "house.toml"
    file.write_text("steps = 2\n[penalty]\ncoef = 0.5\n")
    config = compose(Training, [*read_toml(Training, file), *read_overrides(Training, [("steps", "3")])])
    assert (config.steps, config.penalty.coef) == (3, 0.5)


def test_a_whole_section_can_be_given_and_changed():
    config = given(("penalty", '{coef = 1.0, rule = "adaptive"}'), ("penalty.coef", "2"))
    assert config.penalty == Penalty(coef=2.0, rule="adaptive")


def test_paths_count_from_where_they_are_given_and_names_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there, here, home = (tmp_path / name for name in ("there", "here", "home"))
    for folder in (there / "hub" / "local", here):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    file = there / "my.toml"
    rows = '{name = "a", target = "./rm"}, {name = "b", target = "./.*", kind = "regex"}, {name = "c"}'
    file.write_text(f'folder = "data"\nname = "hub/id"\nparts = [{rows}]\n')
    config = compose(Training, read_toml(Training, Path("../there/my.toml")))
    assert config.folder == here / ".." / "there" / "data"
    assert config.name == "hub/id"
    assert [one.target for one in config.parts] == [f"{here}/../there/rm", "./.*", None]
    names = 'names = ["labeler", "hub/local", "./a"]\n'
    file.write_text(f'folder = "~/data"\nname = "hub/local"\n{names}parts = [{{name = "a", target = "/rm"}}]\n')
    config = compose(Training, read_toml(Training, file))
    assert (config.folder, config.name) == (home / "data", str(there / "hub" / "local"))
    assert config.names == ("labeler", str(there / "hub" / "local"), str(there / "a"))
    assert config.parts[0].target == "/rm"
    config = given(("folder", "data"), ("name", "hub/local"), ("parts", '[{name = "a", target = "~/rm"}]'))
    assert (config.folder, config.name, config.parts[0].target) == (here / "data", "hub/local", str(home / "rm"))
    assert given(("folder", "none")).folder is None
    save_toml(config, here / "saved.toml")
    monkeypatch.chdir(there)
    assert compose(Training, read_toml(Training, here / "saved.toml")) == config


def test_every_error_names_key_value_origin_and_what_is_allowed():
    assert wrong(("penalty.coef", "-1"), ("penalty.rule", "fixt"), ("warmup", "1")) == [
        "penalty.coef = -1 (command line): input should be greater than or equal to 0. "
        "It takes float >= 0, default 0.02: Price of a nat.",
        "penalty.rule = fixt (command line): input should be 'fixed' or 'adaptive'. "
        "It takes Literal['fixed', 'adaptive'], default \"fixed\": How it moves.",
        "warmup = 1 (command line): input should be greater than or equal to 2. "
        'It takes int >= 2 | None, default "none": How long.',
    ]


def test_an_error_in_a_file_names_its_line(tmp_path: Path):
    file = tmp_path / "house.toml"
    file.write_text('# comment\nname = "n"\n\n[optimizer]\nbeta = 1\nlr = 0\n')
    with pytest.raises(ConfigError, match=r"^optimizer\.lr = 0 \(.*house\.toml, line 6\): .*greater than 0"):
        compose(Training, read_toml(Training, file))


def test_an_error_inside_a_list_says_where():
    (line,) = wrong(("parts", '[{name = "p"}, {name = 3}]'))
    assert line.startswith('parts = [{name = "p"}, {name = 3}] (command line), at 1.name: ')


def test_an_error_of_a_section_gives_its_own_text():
    assert wrong(("steps", "13")) == ["configuration: steps is 13: choose another number"]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("penalty.coeff", "penalty.coef"),
        ("coef", "penalty.coef"),
        ("penality.coef", "penalty.coef"),
        ("step", "steps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, near: str):
    assert wrong((key, "1")) == [f"{key} = 1 (command line): there is no such key. Did you mean {near}?"]


def test_an_unknown_key_far_from_all_points_to_the_help():
    assert "--help" in wrong(("zzzzzz", "1"))[0]


def test_an_unknown_table_in_a_file_is_refused_with_its_line(tmp_path: Path):
    file = tmp_path / "house.toml"
    file.write_text("[penalti]\ncoef = 1\n")
    with pytest.raises(ConfigError, match=r"line 2\): there is no such key\. Did you mean penalty\.coef\?"):
        compose(Training, read_toml(Training, file))


def test_a_key_without_value_is_refused_unless_it_is_a_switch():
    assert wrong(("steps", None)) == ["--steps has no value. It takes int >= 1 | None: How many."]


def test_unreadable_files_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read"):
        read_toml(Training, tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("steps = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml is not a TOML file: .*line 1"):
        read_toml(Training, tmp_path / "bad.toml")


@pytest.mark.parametrize(
    "config",
    [
        Training(),
        Training(
            penalty=Penalty(coef=1e-7, rule="adaptive"),
            steps=5,
            tags=('quo"te', "new\nline"),
            parts=(Part(name="p"), Part(name="q", target="t")),
            folder=Path("/a b"),
            name="none",
            limit=0.1 + 0.2,
        ),
    ],
)
def test_what_is_saved_reads_back_equal(config: Training, tmp_path: Path):
    save_toml(config, tmp_path / "config.toml")
    assert compose(Training, read_toml(Training, tmp_path / "config.toml")) == config


def test_settings_are_told_with_type_default_and_doc():
    told = {s.key: (s.type, s.default_text, s.doc) for s in settings(Training) if not s.section}
    assert told["penalty.coef"] == ("float >= 0", "default 0.02", "Price of a nat.")
    assert told["optimizer.lr"] == ("float > 0", "default 1e-05", "Peak learning rate.")
    assert told["warmup"] == ("int >= 2 | None", 'default "none"', "How long.")
    assert told["tags"] == ("tuple[str, ...]", 'default ["a"]', "Words.")
    assert told["shuffle"] == ("bool", "default true", "Whether.")
    assert told["folder"][0] == "Path | None"


def test_nearest_takes_the_end_of_a_dotted_key_first():
    assert nearest("lr", ["l", "optimizer.lr"]) == "optimizer.lr"
    assert nearest("quikstart", ["quickstart", "sft"]) == "quickstart"
    assert nearest("qqqq", ["quickstart", "sft"]) is None


def test_as_toml_is_what_toml_reads():
    assert as_toml({"a": [1, 2.5, "x"], "b": True}) == '{a = [1, 2.5, "x"], b = true}'


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tracking.entity", CANARY, "tracking.entity (command line) holds the value of WANDB_API_KEY"),
        ("tracking.api_key", "something-else-entirely", "tracking.api_key = [hidden] (command line)"),
        (
            "scoring.parts",
            '[{name = "a", kind = "url", target = "http://me:something-else-entirely@host/"}]',
            "scoring.parts (command line) holds a user and password in a URL",
        ),
    ],
)
def test_a_secret_in_a_setting_is_refused_and_not_shown(
    key: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    with pytest.raises(ConfigError) as error:
        compose(Config, read_overrides(Config, [(key, value)]))
    text = str(error.value)
    assert said in text
    assert "Remedy: set it in the environment or in a file of mode 0600" in text
    assert CANARY not in text
    assert "something-else" not in text
    section, _, name = key.partition(".")
    file = tmp_path / "mine.toml"
    file.write_text(f"[{section}]\n{name} = {value if value.startswith('[') else repr(value)}\n")
    with pytest.raises(ConfigError) as error:
        compose(Config, read_toml(Config, file))
    assert CANARY not in str(error.value)
    assert "something-else" not in str(error.value)
