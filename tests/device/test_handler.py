"""Device handlers against the contract of sections."""

from __future__ import annotations

import copy

import attrs

from whimbrel.savevm import SaveVMHandler
from whimbrel_device import (
    DeviceHandler,
    array,
    bitmap,
    bool_,
    buffer,
    device,
    gbytearray,
    gtree,
    i32,
    i64,
    opaque,
    pointers,
    qtailq,
    struct,
    subsection,
    timer,
    u8,
    u16,
    u32,
    u64,
    unused,
    vmstate,
)
from whimbrel_testing.savevm_suite import SaveVMHandlerSuite


@device("counter")
class Counter:
    ticks: int = u64()


class TestPlainDevice(SaveVMHandlerSuite):
    atomic = True

    def make_source(self) -> SaveVMHandler:
        return DeviceHandler(Counter(ticks=77), instance_id=3)

    def make_destination(self) -> SaveVMHandler:
        return DeviceHandler(Counter(), instance_id=3)

    def state(self, handler: SaveVMHandler) -> object:
        assert isinstance(handler, DeviceHandler)
        return copy.deepcopy(handler.device)


@vmstate("port")
class Port:
    enabled: bool = bool_()
    mode: int = u8(validator=attrs.validators.in_((0, 1, 2)))


@vmstate("request", version_id=2)
class Request:
    tag: int = u32()
    data: bytes = gbytearray(limit=4096)


@vmstate("errors", version_id=2, minimum_version_id=1)
class Errors:
    last: int = i32()
    count: int = u16(since=2)

    def needed(self) -> bool:
        return self.count > 0


@device(
    "disk-controller",
    version_id=4,
    minimum_version_id=2,
    path=lambda self: self.address,
)
class Controller:
    address: str
    regs: list[int] = array(u32, 8)
    config: bytearray = opaque(16, "pci config", default=attrs.Factory(lambda: bytearray(16)))
    ports: list[Port] = array(Port, 4)
    _reserved: None = unused(3)
    queue_len: int = u8()
    queue: list[int] = array(u16, "queue_len", limit=64)
    requests: list[Request] = qtailq(Request, limit=16)
    mappings: dict[int, Port] = gtree(Port, limit=16)
    slots: list[Port | None] = pointers(
        Port, 4, default=attrs.Factory(lambda: [None, Port(), Port(), None])
    )
    irq_timer: int | None = timer()
    clock: int = i64(since=3)
    has_rom: bool = bool_()
    rom: bytes = buffer(8, exists=lambda self: self.has_rom)
    old: int = u8(until=3)
    mask: int = bitmap(70)
    last: Port = struct(Port)
    errors: Errors = subsection(Errors)
    loads: int = 0

    def post_load(self, version_id: int) -> None:
        self.loads += 1
        if self.clock == 13:
            raise ValueError("an unlucky clock")


class TestEverything(SaveVMHandlerSuite):
    atomic = True

    def make_source(self) -> SaveVMHandler:
        return DeviceHandler(
            Controller(
                "0000:00:04.0",
                regs=list(range(8)),
                config=bytearray(b"0123456789abcdef"),
                ports=[Port(enabled=k % 2 == 0, mode=k % 3) for k in range(4)],
                queue_len=3,
                queue=[1, 500, 65535],
                requests=[Request(tag=1, data=b"one"), Request(tag=2)],
                mappings={9: Port(mode=2), 4: Port(enabled=True)},
                slots=[None, Port(mode=1), Port(enabled=True, mode=2), None],
                irq_timer=123456789,
                clock=-5,
                has_rom=True,
                rom=b"\x05\x0fdisk-c",  # looks like the beginning of a subsection
                mask=1 << 69 | 3,
                last=Port(mode=2),
                errors=Errors(last=-5, count=2),
            )
        )

    def make_destination(self) -> SaveVMHandler:
        return DeviceHandler(Controller("0000:00:04.0"))

    def state(self, handler: SaveVMHandler) -> object:
        assert isinstance(handler, DeviceHandler)
        state = attrs.asdict(handler.device)
        del state["loads"], state["old"]
        return copy.deepcopy(state)
