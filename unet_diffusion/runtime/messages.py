"""The words of errors on the command line: one message, without a traceback and without a page of usage."""

import errno
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

MOST_NAMED = 5  # names in a line
FILE_ERRORS = {  # what is wrong with a file, by the error number of the system, and what to do
    errno.ENOENT: "is not there, or cannot be made there; choose another path",
    errno.EEXIST: "is a file, and must be a folder; choose another path",
    errno.ENOTDIR: "must lie in a folder, and a part of its path is a file; choose another path",
    errno.EISDIR: "is a folder, and must be a file; choose another path",
    errno.EACCES: "may not be read or written by this user; change its permissions, or choose another path",
    errno.EPERM: "may not be read or written by this user; change its permissions, or choose another path",
    errno.EROFS: "lies on a disk that is read only; choose another path",
    errno.ENOSPC: "does not fit because the disk is full; make room and run the same command again",
    errno.EDQUOT: "does not fit because the quota of this user is used up; make room and run the same command again",
    errno.ENAMETOOLONG: "has too long a name; choose a shorter one",
    errno.ELOOP: "is a link that leads back to itself; remove it",
    errno.ENOTEMPTY: "must be empty, and is not; choose another path",
}
UNEXPECTED = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, NotImplementedError)


class UsageError(Exception):
    """A command line that cannot be carried out; its message has the value, the rule and the fix."""


def printable(text: str) -> str:
    """Return the text with the characters that control a terminal spelt out, such as \\x1b[2J in the name of a file."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_few(names: Sequence[str]) -> str:
    """Return the first five names, and dots if there are more: a, b, c, d, e, ..."""
    return printable(", ".join([*names[:MOST_NAMED], "..."] if len(names) > MOST_NAMED else names))


def in_words(error: BaseException) -> str:
    """Return the message of an error for a user, without the traceback of a worker, an error number or a long list."""
    if worker := re.match(r"Caught (\w+) in DataLoader worker process", str(error)):
        return str(error).rpartition(f"{worker[1]}: ")[2].strip()  # the traceback comes before it
    if isinstance(error, OSError) and error.errno is not None:
        reason = FILE_ERRORS.get(error.errno, error.strerror or "cannot be read or written")
        return f"{error.filename or 'a file'} {reason}"
    if network := re.search(r"Error\(s\) in loading state_dict for (\w+)", str(error)):
        return _about_weights(str(error), network[1])
    if isinstance(error, UNEXPECTED):
        return f"this was not foreseen ({type(error).__name__}: {error}); please report it with what --traceback shows"
    return str(error) or type(error).__name__


def _about_weights(text: str, network: str) -> str:
    """Shorten torch's list of all weights that do not fit a network to their numbers and an example of each kind."""
    parts = []
    for kind, problem in (("Missing", "are missing"), ("Unexpected", "are left over")):
        if match := re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. *(?:\n|$)", text):
            names = match[1].replace('"', "").split(", ")
            parts.append(f"{len(names)} {problem}, such as {names[0]}")
    if sizes := re.findall(r"size mismatch for ([\w.]+): .*?Size\((.*?)\).*?Size\((.*?)\)", text):
        name, got, wanted = sizes[0]
        parts.append(f"{len(sizes)} have another size, such as {name} {got}, here {wanted}")
    return f"the weights do not fit the {network} that its settings describe: {'; '.join(parts) or text}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that names the known words most like a misspelt one, or ""."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def similar_paths(path: Path) -> str:
    """Return the end of an error message that names the paths in the same folder most like a missing one, or ""."""
    beside = [neighbour.name for neighbour in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, beside, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
