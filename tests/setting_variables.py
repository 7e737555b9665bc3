"""The environment variables that the settings understand."""

from pydantic import BaseModel

from api.settings import Settings


def setting_variables(model=Settings, prefix="ABQ_"):
    """All names, group by group."""
    names = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names |= setting_variables(kind, f"{prefix}{name.upper()}__")
        else:
            names.add(f"{prefix}{name.upper()}")
    return names
