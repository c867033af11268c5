"""What a check finds: each with its reason and the option that mends it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from unet_diffusion.runtime.messages import printable

Severity = Literal["note", "advice", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something that is worth knowing before training.

    Args:
        severity: "note": a fact. "advice": another setting is likely to do better. "warning": the result is likely to
            be useless, or its scores to mislead.
        text: What was found and why it matters: a sentence without its full stop.
        option: What mends it, such as "--data.channels 1"; "" if nothing has to be mended.
    """

    severity: Severity
    text: str
    option: str = ""

    def __str__(self) -> str:
        mend = f" [{self.option}]" if self.option else ""
        return printable(f"{self.severity}: {self.text}{mend}")


@dataclass
class Section:
    """What was found about one thing.

    Args:
        title: What it is about, such as "Data".
        facts: Lines that describe it.
        findings: What was found.
    """

    title: str
    facts: Sequence[str] = ()
    findings: list[Finding] = field(default_factory=list)


def report(sections: Sequence[Section]) -> str:
    """The text of all sections that hold anything, for people."""
    return "\n".join(line for section in sections for line in _lines(section))


def _lines(section: Section) -> Iterator[str]:
    if not section.facts and not section.findings:
        return
    yield section.title
    yield from (f"  {printable(fact)}" for fact in section.facts)
    yield from (f"  {finding}" for finding in section.findings)


def percent(share: float) -> str:
    """A share as a percentage in at most three digits, such as "4.2 %"."""
    return f"{100 * share:.3g} %"
