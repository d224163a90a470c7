"""Why a destination gave up, from all that can be known of it: how far it got, what it said, what the guest consists of.

Sources, the best first: its own words (a log, its monitor, the end of an exec: command), the last PONG, and what a
comparison with a guest of that QEMU found.
"""

from __future__ import annotations

import attrs

from whimbrel.errors import MigrationError, PeerError
from whimbrel_qemu import advice, pci, words
from whimbrel_qemu.comparing import Comparison, Verdict, config_of
from whimbrel_qemu.guest import Guest
from whimbrel_qemu.milestones import CONFIGURATION, RAM, Milestones, Piece
from whimbrel_qemu.tail import Section
from whimbrel_qemu.words import Reason

#: RAM blocks and differences that a hint names.
_NAMED = 4
_LET_IT_SPEAK = (
    "Its standard error output says why: give its file to --log, and --against names what differs"
)


class Refused(PeerError):
    """The destination gave up before it had the machine; the machine's file is as it was.

    section, instance_id, field and offset say where, as far as it is known: the offset is that of the section in the
    stream. `what` is the reason in our words; `words` are the destination's own, without warnings. `reached` is how far its
    answers came: what it had before it after the last one, None where it gave none.
    """

    def __init__(
        self,
        what: str,
        *,
        section: str | None,
        instance_id: int | None,
        field: str | None,
        offset: int | None,
        at: Piece | None,
        words: tuple[str, ...],
        hint: str,
    ) -> None:
        place = f", field {field}" if field is not None and section != CONFIGURATION else ""
        message = f"the destination refused the guest: {what}{place}"
        super().__init__(message, section=section, offset=offset, hint=hint)
        self.what = what
        self.instance_id = instance_id
        self.field = field
        self.reached = at
        self.words = words


@attrs.frozen(kw_only=True)
class Evidence:
    """What there is to judge by.

    said: the destination's words, "" if none came. asked: it was asked how far it got, and it gave up itself. at: what it
    answered to that; None: it had loaded everything.
    """

    guest: Guest
    error: MigrationError
    said: str = ""
    asked: bool = False
    at: Piece | None = None
    milestones: Milestones | None = None
    comparison: Comparison | None = None


def refused(evidence: Evidence) -> Refused | None:
    """The reason; None when neither words nor answers tell more than the error does."""
    if not evidence.asked:
        evidence = attrs.evolve(evidence, at=None)
    reason = words.explain(evidence.said)
    if reason is None:
        if not evidence.asked:
            return None
        reason = _by_position(evidence)
    else:
        reason = _placed(reason, evidence.at)
    reason = _refined(reason, evidence.guest)
    return Refused(
        reason.what,
        section=reason.section,
        instance_id=reason.instance_id,
        field=reason.field,
        offset=_offset(reason, evidence),
        at=evidence.at,
        words=words.lines(evidence.said),
        hint=_compared(reason, evidence.comparison) or reason.hint or _LET_IT_SPEAK,
    )


def _placed(reason: Reason, at: Piece | None) -> Reason:
    """With what the answers know and the words do not tell."""
    if at is None:
        return reason
    if reason.section is None:
        return attrs.evolve(reason, section=at.section, instance_id=at.instance_id)
    if reason.instance_id is None and reason.section == at.section:
        return attrs.evolve(reason, instance_id=at.instance_id)
    return reason


def _by_position(evidence: Evidence) -> Reason:
    at = evidence.at
    if at is None:
        return Reason(
            what=f"it had loaded everything, and then gave up ({evidence.error.message})",
            hint="Its log says why. Make sure that it does not run the guest before you send it again",
        )
    if at.section == CONFIGURATION:
        machine = evidence.guest.machine_type
        same = f"with -machine {machine}" if machine else "with the machine type of the source"
        return Reason(
            section=CONFIGURATION,
            what="it gave up before the first section: its machine is another one, or its stream another form",
            hint=f"Start the destination {same}; its log says more (--log)",
        )
    what = f"it gave up at the {at.part}" if at.part else "it gave up at this section"
    if evidence.milestones is not None and not evidence.milestones.exact:
        what += ", or behind it"
    hint = _LET_IT_SPEAK
    if at.section == RAM:
        hint = f"The guest has {_blocks(evidence.guest)}. {_LET_IT_SPEAK}"
    elif (where := advice.place(at.section)) is not None:
        hint = f"Has it the device that the guest has {where}, with the same properties? {_LET_IT_SPEAK}"
    return Reason(section=at.section, instance_id=at.instance_id, what=what, hint=hint)


def _blocks(guest: Guest) -> str:
    largest = sorted(guest.blocks, key=lambda b: -b.size)
    named = ", ".join(f"{b.idstr} of {b.size >> 10} KiB" for b in largest[:_NAMED])
    return f"the RAM blocks {named}{' and others' if len(largest) > _NAMED else ''}"


def _refined(reason: Reason, guest: Guest) -> Reason:
    """With what the guest's own section knows of it."""
    if reason.section in advice.CPU and guest.tail is not None:
        n = sum(s.device.name == reason.section for s in guest.tail.split())
        if reason.hint == advice.have(reason.section, reason.instance_id or 0):
            reason = attrs.evolve(reason, hint=advice.have(reason.section, n - 1))
    section = _section(guest, reason)
    if section is None:
        return reason
    if reason.config_byte is not None and (config := config_of(section)) is not None:
        plain, named = pci.name_of(reason.config_byte), pci.name_of(reason.config_byte, config)
        reason = attrs.evolve(reason, what=reason.what.replace(f"({plain})", f"({named})"))
    if reason.what == words.UNKNOWN_SUBSECTION and section.device.vmsd.subsections:
        names = ", ".join(s.name for s in section.device.vmsd.subsections)
        reason = attrs.evolve(reason, what=f"{reason.what}; it has {names}")
    return reason


def _section(guest: Guest, reason: Reason) -> Section | None:
    if guest.tail is None:
        return None
    for section in guest.tail.split():
        device = section.device
        if device.name == reason.section and reason.instance_id in (None, device.instance_id):
            return section
    return None


def _offset(reason: Reason, evidence: Evidence) -> int | None:
    if evidence.at is not None and evidence.at.section == reason.section:
        return evidence.at.offset
    if evidence.milestones is not None and reason.section is not None:
        return evidence.milestones.offset_of(reason.section, reason.instance_id)
    return None


def _compared(reason: Reason, comparison: Comparison | None) -> str | None:
    """What a comparison said of that section."""
    if comparison is None or reason.section is None:
        return None
    found = [
        d
        for d in comparison.about(reason.section, reason.instance_id)
        if d.verdict in (Verdict.REFUSED, Verdict.DOUBTFUL)
    ]
    if not found:
        return None
    told = "; ".join(f"{d.field or 'section'}: {d.what}" for d in found[:_NAMED])
    more = f"; {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    advised = reason.hint or found[0].hint or ""
    return f"Differences in this section: {told}{more}. {advised}".rstrip()
