"""Capabilities and parameters: declared by plugins, kept in one store per kernel. Without the plugin, no setting."""

from __future__ import annotations

import enum
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from whimbrel.errors import PluginError, SettingError, StateError
from whimbrel.wire import dialects
from whimbrel.wire.format import Dialect

if TYPE_CHECKING:
    from whimbrel.kernel import Kernel

MIB = 1 << 20
SIZE_MAX = (1 << 64) - 1


class Side(enum.Enum):
    """Who needs the setting."""

    SOURCE = "source"
    DESTINATION = "destination"
    BOTH = "both"  # and it must be equal on both


class When(enum.Enum):
    """When it may be changed."""

    ALWAYS = "always"
    IDLE = "idle"  # not while a migration runs


class Type(enum.Enum):
    """Of a parameter's value; the unit is told by the parameter."""

    BOOL = "bool"
    INT = "int"
    SIZE = "size"  # bytes; text may carry K, M, G, T (powers of 1024), KiB, MiB/s, ...
    DURATION = "duration"  # whole milliseconds; text may carry ms or s
    STR = "str"
    CHOICE = "choice"


@attrs.frozen(kw_only=True)
class Setting:
    """What capabilities and parameters have in common."""

    name: str
    help: str
    aliases: tuple[str, ...] = ()
    side: Side = Side.SOURCE
    when: When = When.IDLE
    #: Names of capabilities that must be on, or off, while this one is on.
    requires: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    #: Called with the kernel and the new value after a change.
    apply: Callable[[Kernel, Any], object] | None = None


@attrs.frozen(kw_only=True)
class Capability(Setting):
    """A switch."""

    default: bool = False
    #: Sent in the configuration section, for the destination to compare.
    on_wire: bool = False
    #: The source opens further channels: the transport must have room for them.
    opens_channels: bool = False


@attrs.frozen(kw_only=True)
class Parameter(Setting):
    """A value."""

    type: Type
    default: Any
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    power_of_two: bool = False
    #: Name of the parameter that this one is never below.
    not_below: str | None = None
    when: When = When.ALWAYS


@attrs.frozen(kw_only=True)
class Profile:
    """The defaults, in one record: values of settings, and the form of the stream."""

    name: str
    values: Mapping[str, Any]
    #: The form of the stream; None: that of the machine type.
    dialect: Dialect | None
    #: Whether `cancelling` is a state of its own on the way to `cancelled`.
    cancelling: bool


#: Today's QEMU. return-path is on, where QEMU's default is off: our commit lives by it.
TODAY = Profile(
    name="today",
    values={
        "max-bandwidth": 128 * MIB,
        "downtime-limit": 300,
        "xbzrle-cache-size": 64 * MIB,
        "return-path": True,
    },
    dialect=None,
    cancelling=True,
)
#: QEMU 1.7, of 2013.
PROFILE_2013 = Profile(
    name="2013",
    values={
        "max-bandwidth": 32 * MIB,
        "downtime-limit": 30,
        "xbzrle-cache-size": 64 * MIB,
        "return-path": False,
        "zero-blocks": False,
    },
    dialect=dialects.by_name("2013"),
    cancelling=False,
)
PROFILES = {p.name: p for p in (TODAY, PROFILE_2013)}

_UNITS = {"": 0, "B": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_SIZE = re.compile(r"(?i)\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGTPE]?)(i?B)?(/s)?\s*")
_DURATION = re.compile(r"(?i)\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s|min)?\s*")
_SCALE = {"us": 0.001, "ms": 1, "s": 1000, "min": 60000}


def parse_size(text: str) -> int:
    """Bytes from '500MiB/s', '64M', '4096'. Units are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a size such as 4096, 64M or 500MiB/s")
    return (
        int(float(match[1]) * 1024 ** _UNITS[match[2].upper()])
        if match[2]
        else int(float(match[1]))
    )


def parse_duration(text: str) -> int:
    """Milliseconds from '300ms', '0.3s', '300'. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a time such as 300ms or 0.5s")
    return round(float(match[1]) * _SCALE[(match[2] or "ms").lower()])


_BOOL = {
    "on": True,
    "true": True,
    "yes": True,
    "1": True,
    "off": False,
    "false": False,
    "no": False,
    "0": False,
}


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _BOOL:
        return _BOOL[value.lower()]
    raise ValueError("expects on or off")


def convert(setting: Setting, value: Any) -> Any:
    """The value as the setting's own type, checked. Raises SettingError that names what is allowed."""
    try:
        if isinstance(setting, Capability):
            return _to_bool(value)
        assert isinstance(setting, Parameter)
        return _convert(setting, value)
    except (ValueError, TypeError) as error:
        raise SettingError(f"Parameter '{setting.name}' {error}") from None


def _plain(number: float) -> str:
    """Whole numbers digit by digit: a float has 53 bits of them."""
    return f"{number:.0f}" if isinstance(number, float) else str(number)


def _convert(parameter: Parameter, value: Any) -> Any:
    kind = parameter.type
    if kind is Type.BOOL:
        return _to_bool(value)
    if kind is Type.STR:
        return str(value)
    if kind is Type.CHOICE:
        value = str(value)
        if value not in parameter.choices:
            raise ValueError(
                f"does not accept value '{value}' (one of {', '.join(parameter.choices)})"
            )
        return value
    if isinstance(value, str):
        parse = {Type.SIZE: parse_size, Type.DURATION: parse_duration}.get(kind, int)
        try:
            value = parse(value)
        except ValueError as error:
            raise ValueError(f"expects a {kind.value}: {error}") from None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"expects a {kind.value} as a whole number"
            + (f" of {parameter.unit}" if parameter.unit else "")
        )
    low = -math.inf if parameter.minimum is None else parameter.minimum
    high = math.inf if parameter.maximum is None else parameter.maximum
    if not low <= value <= high:
        raise ValueError(
            f"expects a value between {_plain(low)} and {_plain(high)}"
            + (f" {parameter.unit}" if parameter.unit else "")
        )
    if parameter.power_of_two and value & (value - 1):
        raise ValueError("expects a power of two")
    return value


#: What the kernel itself is set by.
KERNEL_SETTINGS: tuple[Setting, ...] = (
    Capability(
        name="return-path",
        help="Let the destination answer, where the transport has a way back: without it, completed means that every"
        " byte was accepted, not that the destination runs",
    ),
    Capability(
        name="pause-before-switchover",
        help="Wait in pre-switchover, the machine standing still, until told to continue",
    ),
    Parameter(
        name="max-bandwidth",
        type=Type.SIZE,
        unit="bytes/s",
        default=128 * MIB,
        minimum=0,
        maximum=SIZE_MAX,
        help="Most that the stream may take; 0 is unlimited",
    ),
    Parameter(
        name="downtime-limit",
        type=Type.DURATION,
        unit="ms",
        default=300,
        minimum=0,
        maximum=2_000_000,
        help="Longest time that the machine may stand still at switchover",
    ),
    Parameter(
        name="commit-timeout",
        type=Type.DURATION,
        unit="ms",
        default=30_000,
        minimum=100,
        maximum=86_400_000,
        help="How long the source waits for each answer of the destination at switchover",
    ),
)


class Settings:
    """The declared settings of one kernel and their values. Thread-safe; a change is all or nothing."""

    def __init__(self, profile: Profile, is_running: Callable[[], bool] = lambda: False) -> None:
        self.profile = profile
        self._is_running = is_running
        self._lock = threading.RLock()
        self._declared: dict[str, Setting] = {}
        self._names: dict[str, str] = {}  # aliases included
        self._values: dict[str, Any] = {}
        self._kernel: Kernel | None = None

    def declare(self, settings: Iterable[Setting], by: str = "the kernel") -> None:
        """Add settings. Raises PluginError for a name that is taken."""
        settings = tuple(settings)
        with self._lock:
            for setting in settings:
                for name in (setting.name, *setting.aliases):
                    if name in self._names:
                        raise PluginError(f"{by} declares setting '{name}', which exists already")
            for setting in settings:
                self._declared[setting.name] = setting
                self._names.update(dict.fromkeys((setting.name, *setting.aliases), setting.name))
                default = self.profile.values.get(setting.name, setting.default)  # type: ignore[attr-defined]
                self._values[setting.name] = convert(setting, default)

    def attach(self, kernel: Kernel) -> None:
        """The kernel that `apply` callbacks are given."""
        self._kernel = kernel

    def declared(self) -> tuple[Setting, ...]:
        return tuple(self._declared.values())

    def on_wire(self) -> tuple[str, ...]:
        """Names of the capabilities that are on and go into the configuration section."""
        return tuple(
            s.name
            for s in self.declared()
            if isinstance(s, Capability) and s.on_wire and self[s.name]
        )

    def opens_channels(self) -> bool:
        """Whether a capability is on that opens further channels."""
        return any(
            isinstance(s, Capability) and s.opens_channels and self[s.name] for s in self.declared()
        )

    def find(self, name: str) -> Setting:
        with self._lock:
            if name not in self._names:
                known = ", ".join(sorted(self._declared))
                raise SettingError(f"there is no setting '{name}'", hint=f"There are: {known}")
            return self._declared[self._names[name]]

    def __getitem__(self, name: str) -> Any:
        return self._values[self.find(name).name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or default where no plugin declares the setting."""
        with self._lock:
            return self._values[self._names[name]] if name in self._names else default

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, changes: Mapping[str, Any]) -> None:
        """Set several at once, or none. Raises SettingError, or StateError for what a running migration forbids."""
        with self._lock:
            new = {(s := self.find(n)).name: convert(s, v) for n, v in changes.items()}
            if self._is_running():
                fixed = [n for n in new if self._declared[n].when is When.IDLE]
                if fixed:
                    raise StateError(
                        f"migration process in progress: {', '.join(fixed)} cannot be changed now",
                        hint="Cancel the migration or wait for its end",
                    )
            self._check_combination({**self._values, **new})
            changed = {n: v for n, v in new.items() if self._values[n] != v}
            self._values.update(new)
        for name, value in changed.items():
            apply = self._declared[name].apply
            if apply is not None and self._kernel is not None:
                apply(self._kernel, value)

    def _check_combination(self, values: Mapping[str, Any]) -> None:
        for setting in self._declared.values():
            if isinstance(setting, Parameter):
                self._check_order(setting, values)
            if not isinstance(setting, Capability) or not values[setting.name]:
                continue
            for other in setting.requires:
                if not values.get(other):
                    raise SettingError(
                        f"capability '{setting.name}' requires '{other}'",
                        hint=f"Set {other} on as well",
                    )
            for other in setting.conflicts:
                if values.get(other):
                    raise SettingError(
                        f"capabilities '{setting.name}' and '{other}' exclude each other",
                        hint=f"Set {other} off first",
                    )

    def _check_order(self, parameter: Parameter, values: Mapping[str, Any]) -> None:
        """Whichever of the two was set: both can be set at once."""
        other, value = parameter.not_below, values[parameter.name]
        if other is None or other not in values or value >= values[other]:
            return
        raise SettingError(
            f"Parameter '{parameter.name}' expects no less than {other}: {value} is below {values[other]}",
            hint="Set both together",
        )

    def as_dict(self) -> dict[str, Any]:
        with self._lock:
            return dict(self._values)
