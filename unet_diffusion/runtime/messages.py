"""What is wrong with a command line, in one message, without a page of usage."""

import errno
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

MOST_NAMED = 5  # in a line
# What the system says of a file, by its numbers, and what to do.
OF_FILES = {
    errno.ENOENT: "is not there, or cannot be made there; choose another path",
    errno.EEXIST: "is a file, and must be a folder; choose another path",
    errno.ENOTDIR: "must lie in a folder, and what is above it is a file; choose another path",
    errno.EISDIR: "is a folder, and must be a file; choose another path",
    errno.EACCES: "may not be read or written by this user; change its permissions, or choose another path",
    errno.EPERM: "may not be read or written by this user; change its permissions, or choose another path",
    errno.EROFS: "lies on a disk that is read only; choose another path",
    errno.ENOSPC: "does not fit, the disk is full; make room and run the same command again",
    errno.EDQUOT: "does not fit, the quota of this user is used up; make room and run the same command again",
    errno.ENAMETOOLONG: "has too long a name; choose a shorter one",
    errno.ELOOP: "is a link that leads back to itself; remove it",
    errno.ENOTEMPTY: "must be empty, and is not; choose another path",
}
UNFORESEEN = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, NotImplementedError)


class UsageError(Exception):
    """A command line that cannot be carried out: what was given, what is expected, and what to do."""


def printable(text: str) -> str:
    """The text with what a terminal would obey, such as escapes in the name of a file, spelt out: \\x1b[2J."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_few(names: Sequence[str]) -> str:
    """The first five names, and dots if there are more: a, b, c, d, e, ..."""
    return printable(", ".join([*names[:MOST_NAMED], "..."] if len(names) > MOST_NAMED else names))


def in_words(error: BaseException) -> str:
    """The message of an error: the system's with the name of the file, and of errors of the program that it is one."""
    if worker := re.match(r"Caught (\w+) in DataLoader worker process", str(error)):
        return str(error).rpartition(f"{worker[1]}: ")[2].strip()  # after its traceback
    if isinstance(error, OSError) and error.errno is not None:
        reason = OF_FILES.get(error.errno, error.strerror or "cannot be read or written")
        return f"{error.filename or 'a file'} {reason}"
    if about := re.search(r"Error\(s\) in loading state_dict for (\w+)", str(error)):
        return _of_weights(str(error), about[1])
    if isinstance(error, UNFORESEEN):
        return f"this was not foreseen ({type(error).__name__}: {error}); please report it with what --traceback shows"
    return str(error) or type(error).__name__


def _of_weights(text: str, network: str) -> str:
    """What torch says of weights that do not fit a network, with a few names in place of all."""
    parts = []
    for kind, said in (("Missing", "are missing"), ("Unexpected", "are left over")):
        if found := re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. *(?:\n|$)", text):
            names = found[1].replace('"', "").split(", ")
            parts.append(f"{len(names)} {said}, such as {names[0]}")
    if sizes := re.findall(r"size mismatch for ([\w.]+): .*?Size\((.*?)\).*?Size\((.*?)\)", text):
        name, got, wanted = sizes[0]
        parts.append(f"{len(sizes)} are of another size, such as {name} {got}, here {wanted}")
    return f"the weights must be those of the {network} that is described, and are not: {'; '.join(parts) or text}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known words that look like a misspelt one, as the end of an error message; "" without any."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def similar_paths(path: Path) -> str:
    """The paths beside a missing one whose names look like its own, as the end of an error message; "" without any."""
    beside = [neighbour.name for neighbour in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, beside, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
