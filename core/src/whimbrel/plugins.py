"""Discovery of plugins, in isolation: one that is broken, too new or disabled is listed as such and harms nobody."""

from __future__ import annotations

import difflib
import enum
import importlib.metadata
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import pluggy

from whimbrel import __version__, hookspecs
from whimbrel.channel import Filter, FilterSpec, TransportSpec
from whimbrel.errors import MigrationError, PluginError, UriError
from whimbrel.settings import Setting

log = logging.getLogger("whimbrel.plugins")

GROUPS = {
    "whimbrel.transports": "transport",
    "whimbrel.savevm": "savevm",
    "whimbrel.plugins": "plugin",
}
DISABLE_ENV = "WHIMBREL_DISABLE"


class PluginState(enum.StrEnum):
    """What became of a plugin."""

    READY = "ready"
    NEEDS = "needs"  # works once something is installed: detail says what
    CONFLICT = "conflict"  # claims what another claims as well
    BROKEN = "broken"  # failed to import or to register
    INCOMPATIBLE = "incompatible"  # written for another version of this API
    DISABLED = "disabled"


@attrs.define(kw_only=True)
class PluginInfo:
    """One entry point and what became of it."""

    kind: str
    name: str
    distribution: str
    version: str
    provides: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    state: PluginState = PluginState.READY
    detail: str = ""
    plugin: Any = attrs.field(default=None, repr=False)

    @property
    def source(self) -> str:
        return f"{self.name} of {self.distribution} {self.version}"

    def refuse(self, state: PluginState, detail: str) -> None:
        self.state, self.detail = state, detail
        log.log(
            logging.DEBUG
            if state in (PluginState.DISABLED, PluginState.NEEDS)
            else logging.WARNING,
            "plugin %s is %s: %s",
            self.source,
            state,
            detail,
        )


# ---- does a distribution's requirement on whimbrel-core admit this version?

_CLAUSE = re.compile(r"(~=|==|!=|<=|>=|<|>)\s*([0-9]+(?:\.[0-9]+)*)(\.\*)?")
_REQUIREMENT = re.compile(r"(?i)whimbrel[-_.]+core\s*\(?([^;)]*)\)?")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("."))


def _admits(specifier: str, version: str = __version__) -> bool:
    """Whether release `version` satisfies all clauses. Release numbers only: our versions have no other parts."""
    have = _numbers(version)
    for operator, text, star in _CLAUSE.findall(specifier):
        want = _numbers(text)
        width = max(len(have), len(want))
        a, b = (v + (0,) * (width - len(v)) for v in (have, want))
        prefix = have[: len(want)] == want
        holds = {
            "==": prefix if star else a == b,
            "!=": not prefix if star else a != b,
            "<=": a <= b,
            ">=": a >= b,
            "<": a < b,
            ">": a > b,
            "~=": a >= b and have[: len(want) - 1] == want[:-1],
        }
        if not holds[operator]:
            return False
    return True


def _requirement(entry: importlib.metadata.EntryPoint) -> str | None:
    """The distribution's requirement on whimbrel-core that this version does not meet, or None."""
    for requirement in (entry.dist.requires if entry.dist else None) or ():
        match = _REQUIREMENT.match(requirement)
        if match and not _admits(match[1]):
            return requirement
    return None


class _RunItself:
    """The innermost of wrap_migration: the run."""

    @hookspecs.hookimpl
    def wrap_migration(self, run: Callable[[], Any]) -> Any:
        return run()


def names_from_environment() -> tuple[str, ...]:
    """Names of plugins that WHIMBREL_DISABLE switches off."""
    return tuple(n for n in re.split(r"[,\s]+", os.environ.get(DISABLE_ENV, "")) if n)


class Plugins:
    """The plugins of a process, or of a test. Make one with load()."""

    _shared: Plugins | None = None
    _shared_lock = threading.Lock()

    def __init__(self, prefer: Mapping[str, str] | None = None) -> None:
        self._pm = pluggy.PluginManager("whimbrel")
        self._pm.add_hookspecs(hookspecs)
        self._pm.register(_RunItself(), name="whimbrel")
        self._infos: list[PluginInfo] = []
        self._prefer = dict(prefer or {})
        self._transports: dict[str, tuple[TransportSpec, PluginInfo]] = {}
        self._filters: dict[str, tuple[FilterSpec, PluginInfo]] = {}
        self._refused: dict[str, list[PluginInfo]] = {}

    # ---- loading

    @classmethod
    def shared(cls) -> Plugins:
        """The plugins installed in this environment, loaded once per process."""
        with cls._shared_lock:
            if cls._shared is None:
                cls._shared = cls.load()
            return cls._shared

    @classmethod
    def share(cls, plugins: Plugins) -> None:
        """Make these what shared() gives: for a front end that lets its user choose among the plugins."""
        with cls._shared_lock:
            cls._shared = plugins

    @classmethod
    def load(
        cls,
        disabled: Iterable[str] = (),
        prefer: Mapping[str, str] | None = None,
        entry_points: Iterable[importlib.metadata.EntryPoint] | None = None,
    ) -> Plugins:
        """Discover and register. Never raises for a plugin's fault.

        disabled: names of plugins to skip, besides those in WHIMBREL_DISABLE.
        prefer: scheme, filter or section → distribution (or plugin) that wins where two claim it.
        entry_points: instead of the installed ones.
        """
        self = cls(prefer)
        off = {*disabled, *names_from_environment()}
        if entry_points is None:
            installed = importlib.metadata.entry_points()
            entry_points = [e for group in GROUPS for e in installed.select(group=group)]
        found = [
            (
                entry,
                PluginInfo(
                    kind=GROUPS[entry.group],
                    name=entry.name,
                    distribution=entry.dist.name if entry.dist else "(unknown)",
                    version=entry.dist.version if entry.dist else "",
                ),
            )
            for entry in entry_points
        ]
        self._infos = [info for _, info in found]
        for entry, info in found:
            if info.name in off:
                info.refuse(PluginState.DISABLED, "on request")
            else:
                self._import(entry, info)
        loaded = [i for i in self._infos if i.state is PluginState.READY]
        for info in loaded:
            self._add_hookspecs(info)
        for info in loaded:
            self._register(info)
        self._refuse_unknown_hooks()
        self._collect()
        return self

    def register(self, plugin: object, name: str) -> PluginInfo:
        """Add a plugin by hand (an application's own, a test's)."""
        info = PluginInfo(kind="plugin", name=name, distribution="(registered)", version="")
        info.plugin = plugin
        self._infos.append(info)
        self._add_hookspecs(info)
        self._register(info)
        self._refuse_unknown_hooks()
        self._collect()
        return info

    def _import(self, entry: importlib.metadata.EntryPoint, info: PluginInfo) -> None:
        unmet = _requirement(entry)
        if unmet is not None:
            info.refuse(PluginState.INCOMPATIBLE, f"requires {unmet}; this is {__version__}")
            return
        try:
            info.plugin = entry.load()
        except (Exception, SystemExit) as error:
            info.refuse(PluginState.BROKEN, f"import failed: {type(error).__name__}: {error}")
            return
        api = getattr(info.plugin, "whimbrel_api", None)
        if not (isinstance(api, tuple) and len(api) == 2):
            info.refuse(PluginState.BROKEN, "does not say `whimbrel_api = (MAJOR, MINOR)`")
        elif api[0] != hookspecs.API[0] or api[1] > hookspecs.API[1]:
            have = ".".join(map(str, hookspecs.API))
            info.refuse(
                PluginState.INCOMPATIBLE,
                f"written for plugin API {'.'.join(map(str, api))}; this is {have}",
            )

    def _add_hookspecs(self, info: PluginInfo) -> None:
        for module in getattr(info.plugin, "whimbrel_hookspecs", ()):
            try:
                self._pm.add_hookspecs(module)
            except Exception as error:
                info.refuse(PluginState.BROKEN, f"its hook specifications are refused: {error}")

    def _register(self, info: PluginInfo) -> None:
        if info.state is not PluginState.READY:
            return
        try:
            self._pm.register(info.plugin, name=f"{info.distribution}:{info.kind}:{info.name}")
        except Exception as error:
            info.refuse(PluginState.BROKEN, f"its hooks are refused: {error}")
            if self._pm.is_registered(info.plugin):
                self._pm.unregister(info.plugin)

    def _refuse_unknown_hooks(self) -> None:
        for info in self._infos:
            callers = (info.plugin and self._pm.get_hookcallers(info.plugin)) or ()
            unknown = [
                caller.name
                for caller in callers
                if not caller.has_spec()
                and any(
                    impl.plugin is info.plugin and not impl.optionalhook
                    for impl in caller.get_hookimpls()
                )
            ]
            if unknown:
                self._pm.unregister(info.plugin)
                info.refuse(PluginState.BROKEN, f"there is no hook '{unknown[0]}': misspelt?")

    # ---- what they offer

    def each(self, hook: str, **arguments: Any) -> Iterator[tuple[PluginInfo, Any]]:
        """Call every plugin's implementation of a hook; an exception is the iteration's, with the plugin named."""
        for info, function in self._implementations(hook):
            try:
                yield info, function(arguments)
            except MigrationError:
                raise
            except Exception as error:
                raise PluginError(
                    f"plugin {info.source} failed in {hook}: {type(error).__name__}: {error}",
                    hint=f"Disable it with {DISABLE_ENV}={info.name}",
                ) from error

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call every plugin's implementation; an exception is logged and harmless."""
        for _ in self.collect(hook, **arguments):
            pass

    def collect(self, hook: str, **arguments: Any) -> Iterator[tuple[PluginInfo, Any]]:
        """Call every plugin's implementation; one that raises is logged and left out."""
        for info, result, error in self.attempt(hook, **arguments):
            if error is not None:
                log.error("plugin %s failed in %s", info.source, hook, exc_info=error)
            else:
                yield info, result

    def attempt(
        self, hook: str, **arguments: Any
    ) -> Iterator[tuple[PluginInfo, Any, Exception | None]]:
        """Call every plugin's implementation; what it returns, or what it raises."""
        for info, function in self._implementations(hook):
            try:
                result = function(arguments)
            except Exception as error:
                yield info, None, error
            else:
                yield info, result, None

    def _implementations(
        self, hook: str
    ) -> list[tuple[PluginInfo, Callable[[Mapping[str, Any]], Any]]]:
        caller = getattr(self._pm.hook, hook, None)
        result: list[tuple[PluginInfo, Callable[[Mapping[str, Any]], Any]]] = []
        for impl in caller.get_hookimpls() if caller is not None else ():
            info = next((i for i in self._infos if i.plugin is impl.plugin), None)
            if info is not None and not (impl.wrapper or impl.hookwrapper):

                def call(arguments: Mapping[str, Any], impl: Any = impl) -> Any:
                    return impl.function(*(arguments[name] for name in impl.argnames))

                result.append((info, call))
        return result

    def wrap_migration(self, kernel: Any, run: Callable[[], None]) -> None:
        """Run inside the wrappers. Their own failures are logged and change nothing: what this raises is the run's."""
        failures: list[BaseException | None] = []

        def once() -> None:
            failures.append(None)
            try:
                run()
            except BaseException as error:
                failures[0] = error
                raise

        try:
            self._pm.hook.wrap_migration(kernel=kernel, run=once)
        except Exception:
            if not failures or failures[0] is None:
                log.exception(
                    "a wrap_migration hook failed; the migration is as it would be without it"
                )
        if not failures:
            run()
        elif failures[0] is not None:
            raise failures[0]

    def _collect(self) -> None:
        self._transports.clear()
        self._filters.clear()
        self._refused.clear()
        for info in self._infos:
            info.provides = ()
        claims: dict[str, list[tuple[PluginInfo, TransportSpec | FilterSpec]]] = {}
        for hook in ("transports", "filters"):
            for info, function in self._implementations(hook):
                if info.state is PluginState.BROKEN:
                    continue
                try:
                    specs: Sequence[Any] = function({}) or ()
                    for spec in specs:
                        names = (
                            spec.schemes if isinstance(spec, TransportSpec) else (f"{spec.name}::",)
                        )
                        info.provides += names
                        for name in names:
                            claims.setdefault(name, []).append((info, spec))
                        missing = spec.needs()
                        if missing:
                            info.refuse(PluginState.NEEDS, missing)
                except Exception as error:
                    info.refuse(PluginState.BROKEN, f"{hook}: {type(error).__name__}: {error}")
        for info in self._infos:
            sections = tuple(getattr(info.plugin, "whimbrel_sections", ()))
            if info.state is PluginState.READY:
                info.provides += sections
                for idstr in sections:
                    if idstr != "*":
                        claims.setdefault(f"section {idstr}", []).append((info, None))  # type: ignore[arg-type]
        for name, who in claims.items():
            self._settle(name, who)
        self._list_settings()

    def _settle(self, name: str, who: Sequence[tuple[PluginInfo, Any]]) -> None:
        who = [(i, s) for i, s in who if i.state is not PluginState.BROKEN]
        if len(who) > 1:
            wanted = self._prefer.get(name.removesuffix("::").removeprefix("section "))
            chosen = [(i, s) for i, s in who if wanted in (i.distribution, i.name)]
            if len(chosen) != 1:
                self._refused[name] = [i for i, _ in who]
                everybody = " and ".join(i.source for i, _ in who)
                for info, _ in who:
                    info.refuse(PluginState.CONFLICT, f"'{name}' is claimed by {everybody}")
                return
            who = chosen
        for info, spec in who:
            if isinstance(spec, TransportSpec):
                self._transports[name] = (spec, info)
            elif isinstance(spec, FilterSpec):
                self._filters[spec.name] = (spec, info)

    def _list_settings(self) -> None:
        for info, function in self._implementations("settings"):
            try:
                info.settings = tuple(s.name for s in function({}) or ())
            except Exception as error:
                info.refuse(PluginState.BROKEN, f"settings: {type(error).__name__}: {error}")

    def settings(self) -> Iterator[tuple[PluginInfo, Sequence[Setting]]]:
        """The settings that each sound plugin declares."""
        for info, function in self._implementations("settings"):
            if info.state is PluginState.BROKEN:
                continue
            try:
                yield info, function({}) or ()
            except Exception as error:
                info.refuse(PluginState.BROKEN, f"settings: {type(error).__name__}: {error}")

    def infos(self) -> tuple[PluginInfo, ...]:
        """Every plugin that was found, whatever became of it, by kind and name."""
        order = list(GROUPS.values())
        return tuple(sorted(self._infos, key=lambda i: (order.index(i.kind), i.name)))

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(sorted(self._transports))

    @property
    def filter_names(self) -> frozenset[str]:
        return frozenset(self._filters)

    def transports(self) -> tuple[TransportSpec, ...]:
        """Each transport once, by its first scheme."""
        return tuple(s for n, (s, _) in sorted(self._transports.items()) if n == s.schemes[0])

    def transport(self, scheme: str) -> TransportSpec:
        """The transport of a scheme. Raises UriError or PluginError saying which there are and what to install."""
        if scheme in self._refused:
            raise PluginError(
                f"scheme '{scheme}' is claimed by "
                + " and ".join(i.source for i in self._refused[scheme]),
                hint=f"Choose one with -p {scheme}=DISTRIBUTION, or disable the other",
            )
        if scheme not in self._transports:
            raise UriError(
                f"unknown migration protocol '{scheme}'; known are {', '.join(self.schemes) or 'none'}",
                hint=self._remedy(scheme),
            )
        spec, info = self._transports[scheme]
        missing = spec.needs()
        if missing:
            raise PluginError(f"{info.source} is not ready", hint=missing)
        return spec

    def _remedy(self, scheme: str) -> str:
        for info in self._infos:
            if info.name == scheme and info.state is not PluginState.READY:
                return f"Plugin {info.source} is {info.state}: {info.detail}"
        if not re.fullmatch(r"[a-z][a-z0-9+-]*", scheme):  # an address, as it seems
            return "Write for instance tcp:HOST:PORT or unix:PATH"
        near = difflib.get_close_matches(scheme, self.schemes, 1)
        return (
            f"Write {near[0]}:, if that was meant; or install the distribution that provides it,"
            if near
            else "Install the distribution that provides it,"
        ) + f" by convention whimbrel-{scheme}"

    def filter(self, name: str) -> Filter:
        return self._filters[name][0].create()
