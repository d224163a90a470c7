"""Two machines, device by device."""

from whimbrel_qemu import Guest


def differing_devices(one: Guest, other: Guest) -> list[str]:
    """The names of those that are not the same, of two that have the same devices."""
    assert one.tail is not None
    assert other.tail is not None
    a, b = one.tail.payloads(), other.tail.payloads()
    assert [(d.name, d.instance_id) for d, _ in a] == [(d.name, d.instance_id) for d, _ in b]
    return [d.name for (d, x), (_, y) in zip(a, b, strict=True) if x != y]
