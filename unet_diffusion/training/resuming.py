"""Compares the settings of a run that is resumed with those that it was begun with."""

from collections.abc import Collection
from typing import Any

from unet_diffusion.runtime.shareable import is_secret, without_secrets

FREE = ("dropout", "gradient_checkpointing")  # settings of a network that may change: they have no weights


def differences(before: Any, now: Any, name: str = "", but: Collection[str] = ()) -> list[str]:
    """A line for each setting that is not the same, with both values but for secrets.

    User, password and query of an address count for nothing: it may have been signed anew.

    Args:
        before: The settings of the run so far, nested dicts of plain values.
        now: The settings of today.
        name: The name of these settings; names of nested ones are joined by dots.
        but: Names of settings that are not compared.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        lines = [differences(before.get(key), now.get(key), f"{name}.{key}", but)
                 for key in sorted({*before, *now} - {*but})]  # fmt: skip
        return [line for nested in lines for line in nested]
    if without_secrets(before, named=False) == without_secrets(now, named=False):
        return []
    if is_secret(name.rpartition(".")[2]):
        return [f"{name.lstrip('.')} is another"]
    return [f"{name.lstrip('.')} was {without_secrets(before)}, is {without_secrets(now)}"]
