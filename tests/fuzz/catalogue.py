"""All targets by name."""

from __future__ import annotations

from fuzz import of_checkpoint, of_data, of_hf, of_run
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target for module in (of_checkpoint, of_data, of_run, of_hf) for target in module.TARGETS
}
