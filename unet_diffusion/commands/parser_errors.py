"""Shortens the errors of jsonargparse to a sentence; its own have a line for each type that it tried."""

import re
from collections.abc import Iterable

import unet_diffusion.data
from unet_diffusion.runtime.messages import did_you_mean

TRIED_ALL = "Does not validate against any of the Union subtypes"
MAX_MESSAGE = 500  # characters
KINDS = {  # of values, by the classes that were tried
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "tuple": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
    "dict": "settings with names",
    "NoneType": "null",
}
TRIED = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[(.*)\])(?:\. Got value: (.*))?")
NOISE = re.compile(r"Subtypes: |Errors:|Given value type: |Given value: |Expected a path but")


def in_short(message: str, known: Iterable[str]) -> str:
    """A sentence that says which value or name is wrong, what it must be, and which name may have been meant.

    Args:
        message: The text of jsonargparse's error.
        known: The options of the command.
    """
    line = " ".join(message.split())
    short = _of_names(line, known) or _of_values(message)
    if len(short) <= MAX_MESSAGE:
        return short
    return f"{short[: MAX_MESSAGE // 2]} ... {short[-MAX_MESSAGE // 2 :]}"  # the value stands at the end


def _of_names(line: str, known: Iterable[str]) -> str | None:
    """The sentence for an option or class that does not exist or may not be named; None for other errors."""
    if unknown := re.search(r"unrecognized arguments: --([^\s=]+)|does not accept option '([^']+)'", line):
        name = unknown[1] or unknown[2]
        similar = did_you_mean(name, (option.removeprefix("--") for option in known)) or "; --help lists the options"
        return f"there is no option {name}{similar}"
    if no_class := re.search(r'key "([^"]+)".*Expected a dot import path string: (\w+)', line):
        return f"{no_class[1]}: there is no class {no_class[2]}{did_you_mean(no_class[2], unet_diffusion.data.__all__)}"
    if denied := re.search(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)' entry", line):
        refused = f"a configuration may not name {denied[1]}"
        module = denied[1].rpartition(".")[0]
        return f"{refused}; if you trust it, add --allow {module} to the command line" if denied[2] == "*" else refused
    if no_name := re.search(r"Problem with given class_path '([\w.]+)': module '[\w.]+' has no attribute", line):
        return f"there is no class {no_name[1]}; check its spelling"
    return None


def _of_values(message: str) -> str:
    """The sentence for a value of the wrong type, or one that a class refuses."""
    keys, kinds, reasons, value = list[str](), list[str](), list[str](), None
    for text in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if key := re.match(r'Parser key "([^"]+)":\s*', text):
            keys.append(key[1])
            text = text[key.end() :].removeprefix("- ")
        if tried := TRIED.fullmatch(text):
            kinds.append(_kind(tried[1], tried[2]))
            value = tried[3] or value
        elif given := re.match(r"Given value: (?!Namespace|NestedArg)(.*)", text):
            value = given[1]
        elif text and text != TRIED_ALL and not NOISE.match(text):
            reasons.append(text)
    name = ".".join(keys)
    if reasons:
        said = " ".join(" ".join(reasons).split())
        said = f"{said}, got {value}" if value is not None and ", got " not in said else said
        return f"{name}: {said}" if name and not said.startswith(name) else said
    if not kinds:
        return " ".join(message.split())
    got = "" if value is None else f", got {value}"
    return f"{name or 'the value'} must be {' or '.join(dict.fromkeys(kinds))}{got}"


def _kind(class_path: str | None, choices: str | None) -> str:
    if choices is not None:
        return f"one of {choices}".replace("'", "")
    name = str(class_path).rpartition(".")[2]
    return KINDS.get(name, f"a {name}")
