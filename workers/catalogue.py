"""What a worker announces about a target, together with what the configuration says about it."""

import dataclasses

from gateway.config import TargetSection
from gateway.types import Target

_SETTINGS = frozenset({"description", "home_region", "cost", "slots", "timeout_s", "read_only", "idempotent", "max_deliver", "regions"})


def merge_target(section: TargetSection | None, announced: Target) -> Target:
    """The announced target with the settings that its section gives; a setting that is only a default of the section does not count."""
    if section is None:
        return announced
    given = section.model_fields_set & _SETTINGS
    if section.regions:
        given |= {"home_region"}  # the default of the section is known to be one of them, what was announced is not
    return dataclasses.replace(announced, **{name: getattr(section, name) for name in given})
