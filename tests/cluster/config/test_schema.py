from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.cli.commands import COMMANDS
from cluster.config.load import PRESETS, ConfigError, compose, presets, read_overrides, read_toml, save_toml, settings
from cluster.config.schema import Config


def test_every_default_holds():
    Config()


@pytest.mark.parametrize("preset", presets())
def test_every_preset_composes_and_survives_being_saved(preset: str, tmp_path: Path):
    config = compose(Config, read_toml(Config, PRESETS / f"{preset}.toml"))
    save_toml(config, tmp_path / "config.toml")
    assert compose(Config, read_toml(Config, tmp_path / "config.toml")) == config


def test_the_presets_that_commands_name_are_there():
    named = {c.preset for c in COMMANDS.values() if c.preset} | {v for c in COMMANDS.values() for v in c.variants}
    assert named <= set(presets())


def test_a_dotted_override_reaches_its_section():
    assert compose(Config, read_overrides(Config, [("ppo.kl.coef", "0.05")])).ppo.kl.coef == 0.05


def test_every_setting_is_frozen_strict_and_explained():
    for setting in settings(Config):
        assert setting.doc, f"{setting.key} has no docstring"
        section: type[BaseModel] = setting.section or Config
        assert section.model_config.get("frozen"), section
        assert section.model_config.get("extra") == "forbid", section


def test_commands_name_sections_that_exist():
    for command in COMMANDS.values():
        assert set(command.sections) <= set(Config.model_fields)


def test_every_section_belongs_to_a_command():
    assert {section for c in COMMANDS.values() for section in c.sections} == set(Config.model_fields)


def test_a_chat_template_may_be_a_file_whose_text_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "{% for message in messages %}" + "{{ message['content'] }}" * 40 + "{% endfor %}"
    (tmp_path / "chat.jinja").write_text(text)
    (tmp_path / "run.toml").write_text('[models]\nchat_template = "chat.jinja"\n')
    given = read_toml(Config, tmp_path / "run.toml")  # counts from the file's folder, and the command line from here
    monkeypatch.chdir(tmp_path)
    for one in (given, read_overrides(Config, [("models.chat_template", "chat.jinja")])):
        config = compose(Config, one)
        assert config.models.chat_template == text
        save_toml(config, tmp_path / "config.toml")
        (tmp_path / "chat.jinja").write_text(text + "later")
        assert compose(Config, read_toml(Config, tmp_path / "config.toml")) == config
        (tmp_path / "chat.jinja").write_text(text)
    with pytest.raises(ConfigError, match=r"models\.chat_template = .*absent\.jinja .*: neither Jinja text nor a file"):
        compose(Config, read_overrides(Config, [("models.chat_template", "./absent.jinja")]))
