"""A configuration with a few settings of its own."""

from typing import Any

from cluster.config.schema import Config


def settings(values: dict[str, Any]) -> Config:
    """The defaults, with other values at dotted keys."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        table = fields
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
    return Config.model_validate(fields)
