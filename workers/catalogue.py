"""What a worker announces about a target, together with what the configuration says about it."""

import dataclasses

from gateway.config import TargetSection
from gateway.types import Target

_SETTINGS = frozenset({"description", "home_region", "cost", "slots", "timeout_s", "read_only", "idempotent", "max_deliver"})


def merge_target(section: TargetSection | None, announced: Target) -> Target:
    """The announced target with the settings that its section gives; a setting that is only a default of the section does not count."""
    if section is None:
        return announced
    return dataclasses.replace(announced, **{name: getattr(section, name) for name in section.model_fields_set & _SETTINGS})
