"""`rayward doctor`: is this machine, and the cluster if there is one, fit for a run? Each line says what to do."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.config.schema import Config
from cluster.doctor import machine, services
from cluster.doctor.finding import Finding
from reward_server.redaction import visible

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(config: Config, run_dir: Path, command: str, as_data: bool) -> bool:
    """Print the findings, as lines or as JSON; returns whether none of them is a failure."""
    findings = [Finding(**visible(asdict(one))) for one in diagnose(config, run_dir)]
    good = all(finding.state != "fail" for finding in findings)
    if as_data:
        told = {"healthy": good, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return good
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.what) for finding in findings) + 2
    for finding in findings:
        state = (f"{finding.state:<6}", _STYLES[finding.state])
        console.print(Text.assemble(state, f"{finding.what:<{width}}{finding.says}"))
        if finding.remedy:
            console.print(Text(f"{'':<{width + 6}}{finding.remedy}", style="dim"))
    return good


def diagnose(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Run every check; takes a few seconds, and longer where a cluster does not answer."""
    folder = next(path for path in (run_dir.resolve(), *run_dir.resolve().parents) if path.exists())
    yield machine.python()
    yield from machine.packages()
    yield machine.gpus()
    yield machine.compiler()
    yield from machine.disks(folder)
    yield machine.memory()
    yield machine.files()
    yield from services.loopback()
    yield services.wandb(config.tracking.mode)
    yield services.models(config.models.base)
    yield from services.secrets()
    yield from services.ports(config)
    if config.cluster.address == "local":
        yield from machine.session()
    else:
        from cluster.doctor.cluster import cluster  # Ray takes a second to import

        yield from cluster(config.cluster.address, folder)
