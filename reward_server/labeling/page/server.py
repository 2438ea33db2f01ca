"""The page's server in a thread of this process."""

from pathlib import Path

from reward_server.config import Limits
from reward_server.labeling.config import LabelConfig
from reward_server.labeling.page.app import create_labeling_app
from reward_server.labeling.people import People
from reward_server.labeling.project import Project
from reward_server.listening import Listening, listen

_CONNECTIONS = 1024  # a browser takes up to six


def serve_labeling(project: Project, people: People, config: LabelConfig, audit: Path) -> Listening:
    """Serve the page and return once it listens: `url` says where, `close()` ends it, and leaves the project open.

    `audit` is the file of the audit log. Raises OSError when the port is taken, TimeoutError when it does not listen.
    """
    app = create_labeling_app(project, people, config, audit)
    limits = Limits(max_connections=_CONNECTIONS)
    return listen(app, "the labeling page", config.host, config.port, limits, proxied=config.url is not None)
