"""What `rayward label` does beside a page that is served: invite, revoke, and hand data to other tools and back."""

import os
import sys
from pathlib import Path

from cluster.config.load import ConfigError
from cluster.config.schema import Config
from cluster.pipeline.job import Job
from cluster.rundir.inputs import data_file
from reward_server.address import own_address
from reward_server.labeling.config import LabelConfig
from reward_server.labeling.log import FILE, read_events
from reward_server.labeling.people import FILE as PEOPLE
from reward_server.labeling.people import People
from reward_server.preferences.labeling import Comparison, read_comparisons


def carry_out(config: Config, run_dir: Path) -> bool:
    """Invite, revoke or export where that is asked for; whether it was. Nothing of it is saved with the settings.

    Raises ConfigError for what cannot be done.
    """
    label, asked = config.label, _asked(config)
    if len(asked) > 1:
        raise ConfigError(f"--{asked[0]} and --{asked[1]} are two commands: give one at a time")
    if label.invite_admin and label.invite is None:
        raise ConfigError("--invite_admin says what --invite NAME makes of NAME: give both")
    if not asked or label.import_from:
        return False
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} does not exist. Remedy: name the run directory, --run DIR")
    try:
        told = _export(config, run_dir) if label.export_to else _people(label, run_dir)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    sys.stdout.write(told)
    return True


def refuse(config: Config) -> None:
    """Raise ConfigError where another command is given what `rayward label` is to do."""
    if asked := _asked(config):
        raise ConfigError(f"label.{asked[0]} is for `rayward label`: give it to that command, with the same --run")


def _asked(config: Config) -> list[str]:
    names = ("invite", "revoke", "export_to", "import_from")
    return [name for name in names if getattr(config.label, name) is not None]


def named(text: str, setting: str) -> tuple[str, Path]:
    """FORMAT:PATH, taken apart. Raises ValueError for a format that there is not."""
    from reward_server.preferences.exchange import FORMATS

    name, _, path = text.partition(":")
    if name not in FORMATS or not path:
        raise ValueError(
            f"label.{setting} = {text!r} is not FORMAT:PATH, such as {FORMATS[0]}:records.jsonl; there are the formats "
            f"{', '.join(FORMATS)}"
        )
    return name, Path(os.path.expanduser(path))


def imported(job: Job) -> list[Comparison]:
    """Rankings that people gave in another tool. Raises ValueError, see its `read`."""
    from reward_server.preferences.exchange import read

    format, path = named(job.config.label.import_from or "", "import_from")
    taken = [one.id for one in People(job.run_dir / "labeling" / PEOPLE).all]
    return read(format, path, read_comparisons(job.file("completions"), job.max_bad_rows), taken)


def _people(config: LabelConfig, run_dir: Path) -> str:
    """Invite or revoke somebody; what is told of it. The link is told once and kept nowhere."""
    people = People(run_dir / "labeling" / PEOPLE)
    if config.revoke is not None:
        gone = people.revoke(config.revoke)
        return f"{gone.name} ({gone.id}) can no longer sign in; what {gone.id} labeled stays\n"
    if not (config.port or config.url):
        raise ValueError("label.port = 0 takes a port that no link can name. Remedy: set label.port, or label.url")
    name, token = people.invite(config.invite or "", admin=config.invite_admin)
    host = (
        own_address(loopback=False) if config.host in ("0.0.0.0", "::") else config.host
    )  # of all, one that leads here
    host = f"[{host}]" if ":" in host else host
    url = (config.url or f"http://{host}:{config.port}").rstrip("/")
    kind, page = ("admin", "/admin") if config.invite_admin else ("labeler", "/")
    return (
        f"{config.invite} is {kind} {name}. The link signs in whoever has it, and is shown this once:\n"
        f"{url}{page}#{token}\n"
    )


def _export(config: Config, run_dir: Path) -> str:
    """Write every ranking so far, and the completions that nobody has ranked, as another tool reads them."""
    from reward_server.labeling.export import exported
    from reward_server.preferences.exchange import item_id, write

    format, path = named(config.label.export_to or "", "export_to")
    log, own = run_dir / "labeling" / FILE, data_file(config, run_dir, "completions")
    ranked = exported(read_events(log), config.label).comparisons if log.is_file() else []
    items = {item_id(one) for one in ranked}
    left = [one for one in read_comparisons(own, config.data.max_bad_rows) if one.id not in items]
    write(format, path, [*ranked, *left])
    return f"{len(ranked)} rankings and {len(left)} comparisons without one are in {path}\n"
