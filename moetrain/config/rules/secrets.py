"""No secret in a config: it is kept in the run folder, printed, and sent to trackers."""

from __future__ import annotations

from moetrain.errors import UserError
from moetrain.flat import flat
from moetrain.redaction import secret_names


def holds_no_secret(cfg: object, where: str = "") -> None:
    """UserError that names the key, and the variable of the environment whose value it has."""
    for key, value in flat(cfg).items():
        if names := secret_names(f"{key} {value}"):
            raise UserError(
                f"{where}{key} holds the value of the environment variable {names[0]}, which config.yaml and "
                "trackers would keep: take it out; libraries read it from the environment by themselves"
            )
