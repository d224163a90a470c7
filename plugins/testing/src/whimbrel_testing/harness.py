"""Source and destination as real processes: an app with a StressMachine, told what to do by lines of JSON.

    with Pair(StressConfig(ram=64 << 20)) as pair:
        pair.source.call("boot")
        address = pair.destination.call("incoming", uri="tcp:127.0.0.1:0")["addresses"][0]
        pair.source.call("migrate", uri=address)
        result = pair.source.call("wait")

The app itself is `python -m whimbrel_testing.harness ROLE OPTIONS` (OPTIONS in JSON, see AppOptions). It reads requests
from stdin, {"id": 1, "do": "migrate", "args": {"uri": "tcp:..."}}, and writes to stdout an answer to each,
{"id": 1, "result": ...} or {"id": 1, "error": {"type": ..., "message": ...}}, and in between events,
{"event": "status", "status": "active"}. Requests run side by side. The end of stdin ends it, so that it never outlives
whoever started it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from whimbrel_testing.lease import Lease, violations
from whimbrel_testing.stress import StressConfig, StressMachine

#: Seconds that a request may take unless told otherwise, and that an app may take to end when told to.
PATIENCE, LAST_PATIENCE = 60.0, 5.0


@attrs.frozen(kw_only=True)
class AppOptions:
    """What an app is started with."""

    config: StressConfig
    #: Where the serial log and the lease are; both sides see it.
    directory: str
    lease: bool = True
    #: Whether fence() of the machine claims generations in the directory.
    fence: bool = False
    #: Migration settings by name.
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    profile: str = "today"

    def encode(self) -> str:
        return json.dumps(attrs.asdict(self))

    @classmethod
    def decode(cls, text: str) -> AppOptions:
        members = json.loads(text)
        return cls(**{**members, "config": StressConfig(**members["config"])})


# ---- the app


class App:
    """The process that embeds the machine. Every public method is a request."""

    def __init__(
        self, role: str, options: AppOptions, send: Callable[[dict[str, Any]], None]
    ) -> None:
        from whimbrel import Kernel, RunState

        directory = Path(options.directory)
        self.role = role
        self._send = send
        self._stress = StressMachine(
            options.config,
            log=directory / "serial.log",
            lease=Lease(directory / "lease", role) if options.lease or options.fence else None,
            fence=options.fence,
            run_state=RunState.PRELAUNCH,
            disk=directory / f"disk-{role}.img",
        )
        self._kernel = Kernel(self._stress.machine, profile=options.profile)
        self._kernel.settings.update(options.settings)
        self._kernel.notifiers.add(self._notified)
        self._run: Any = None

    def _notified(self, notification: Any) -> None:
        if notification.new is not None:
            self._send({"event": "status", "status": str(notification.new)})

    # ---- the machine

    def boot(self) -> dict[str, Any]:
        """Fill the RAM and run."""
        self._stress.boot()
        self._stress.machine.vm_start()
        return self.report()

    def start(self) -> None:
        self._stress.machine.vm_start()

    def stop(self) -> None:
        self._stress.machine.vm_stop()

    def report(self) -> dict[str, Any]:
        stress = self._stress
        return {
            "pid": os.getpid(),
            "running": stress.is_running,
            "run_state": str(stress.machine.run_state),
            "generation": stress.machine.generation,
            "writes": stress.writes,
            "disk_writes": stress.disk_writes,
            "disk_refused": stress.disk is not None and stress.disk.device.half_written,
            "ticks": stress.clock.ticks,
            "lines": stress.serial.lines,
            "felt_downtime": stress.felt_downtime,
            "longest_stall": stress.clock.longest_ns / 1e9,
        }

    def ticked(self, timeout: float = 10.0) -> dict[str, Any]:
        """Wait for the first tick after the last start."""
        if not self._stress.wait_for_tick(timeout):
            raise TimeoutError(f"the machine did not tick within {timeout} s")
        return self.report()

    def verify(self) -> dict[str, Any]:
        proof = self._stress.verify()
        return {**attrs.asdict(proof), "holds": proof.holds, "text": str(proof)}

    # ---- migrations

    def set(self, **settings: Any) -> None:
        self._kernel.settings.update(settings)

    def register_fd(self, name: str, fd: int) -> None:
        self._kernel.register_fd(name, fd)

    def migrate(self, uri: str, blk: bool = False, inc: bool = False) -> None:
        self._run = self._kernel.migrate(uri, blk=blk, inc=inc)

    def incoming(self, uri: str, autostart: bool = True) -> dict[str, Any]:
        self._run = self._kernel.incoming(uri, autostart=autostart)
        return {"addresses": self._run.addresses}

    def wait(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait for the end of the migration; how it ended, errors included, is the answer."""
        from whimbrel import MigrationError

        run = self._run
        with contextlib.suppress(MigrationError):
            run.wait(timeout)
        result = run.result
        return {
            "outcome": str(result.outcome),
            "error": None if result.error is None else _described(result.error),
            "acknowledged": result.acknowledged,
            **{
                name: value
                for name, value in attrs.asdict(result.figures).items()
                if name != "acknowledged"
            },
        }

    def query(self) -> dict[str, Any]:
        return self._kernel.query()

    def cancel(self) -> None:
        self._kernel.cancel()

    def resolve(self, run_here: bool) -> None:
        self._kernel.resolve(run_here=run_here)

    def _close(self) -> None:
        from whimbrel import MigrationError

        with contextlib.suppress(MigrationError, TimeoutError):
            self._kernel.cancel()
            if self._run is not None:
                self._run.wait(LAST_PATIENCE / 2)
        self._stress.stop()


def _described(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "message": str(error)}


def main(arguments: Sequence[str]) -> int:
    role, options = arguments
    logging.basicConfig(
        level=os.environ.get("WHIMBREL_LOG", "WARNING"), format=f"{role} %(name)s: %(message)s"
    )
    sys.setswitchinterval(0.0005)  # the machine and the migration share an interpreter
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints must not disturb the conversation
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock, contextlib.suppress(OSError, ValueError):
            out.write(json.dumps(message) + "\n")

    app = App(role, AppOptions.decode(options), send)

    def serve(request: dict[str, Any]) -> None:
        try:
            result = getattr(app, request["do"])(**request.get("args", {}))
            send({"id": request["id"], "result": result})
        except Exception as error:
            send({"id": request["id"], "error": _described(error)})

    send({"event": "ready", "pid": os.getpid()})
    for line in sys.stdin:
        request = json.loads(line)
        threading.Thread(target=serve, args=(request,), daemon=True).start()
    app._close()
    return 0


# ---- who controls it


class AppError(Exception):
    """A request was refused; `type` is the name of the error's class in the app."""

    def __init__(self, type: str, message: str) -> None:  # noqa: A002 -- a member of the answer
        super().__init__(f"{type}: {message}")
        self.type = type
        self.message = message


class AppGone(Exception):
    """The app ended before it answered; the message ends with the last it said on stderr."""


class AppProcess:
    """An app in a process of its own session, so that a Ctrl-C at the terminal reaches only who controls it."""

    def __init__(self, role: str, options: AppOptions, *, pass_fds: Sequence[int] = ()) -> None:
        self.role = role
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "whimbrel_testing.harness", role, options.encode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}
        self._next_id = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self.events: list[dict[str, Any]] = []
        self._gone = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(self, do: str, *, patience: float = PATIENCE, **args: Any) -> Any:
        """Ask, and wait for the answer. Raises AppError, AppGone, TimeoutError."""
        return self.ask(do, **args)(patience)

    def ask(self, do: str, **args: Any) -> Callable[[float], Any]:
        """Ask; the answer is waited for by calling what this returns, with a patience in seconds."""
        answer: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        with self._lock:
            self._next_id += 1
            number = self._next_id
            self._answers[number] = answer
            if self._gone:
                answer.put(None)
        line = json.dumps({"id": number, "do": do, "args": args}).encode() + b"\n"
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # gone: its reader says so
            self._process.stdin.write(line)
            self._process.stdin.flush()

        def wait(patience: float = PATIENCE) -> Any:
            try:
                message = answer.get(timeout=patience)
            except queue.Empty:
                raise TimeoutError(f"{self.role} did not answer {do} within {patience} s") from None
            if message is None:
                raise AppGone(f"{self.role} ended before it answered {do}. {self.last_words()}")
            if "error" in message:
                raise AppError(**message["error"])
            return message["result"]

        return wait

    def wait_event(
        self, wanted: Callable[[dict[str, Any]], bool], patience: float = PATIENCE
    ) -> dict[str, Any]:
        """The first event, of all so far and to come, that is wanted. Raises TimeoutError, AppGone."""
        seen = 0
        deadline = time.monotonic() + patience
        with self._lock:
            while True:
                for event in self.events[seen:]:
                    if wanted(event):
                        return event
                seen = len(self.events)
                if self._gone:
                    break
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"{self.role}: what was waited for did not happen")
        raise AppGone(f"{self.role} ended. {self.last_words()}")

    def wait_status(self, *statuses: str, patience: float = PATIENCE) -> str:
        """Wait until the migration was in one of these states."""
        event = self.wait_event(
            lambda e: e["event"] == "status" and e["status"] in statuses, patience
        )
        return str(event["status"])

    def kill(self) -> None:
        """Send SIGKILL, and reap it."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def close(self) -> None:
        """Tell it to end, or kill it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(LAST_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._stderr.close()

    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        if self._stderr.closed:
            return ""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), 4096, max(0, size - 4096)).decode(errors="replace")

    def __enter__(self) -> AppProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            with self._lock:
                if "event" in message:
                    self.events.append(message)
                    self._changed.notify_all()
                    continue
                answer = self._answers.pop(message["id"])
            answer.put(message)
        with self._lock:
            self._gone = True
            waiting, self._answers = list(self._answers.values()), {}
            self._changed.notify_all()
        for answer in waiting:
            answer.put(None)


def _is_ready(event: dict[str, Any]) -> bool:
    return bool(event["event"] == "ready")


class Pair:
    """A source and a destination of one config, in a directory of their own that goes with them."""

    def __init__(
        self,
        config: StressConfig,
        *,
        fence: bool = False,
        settings: Mapping[str, Any] | None = None,
        source_fds: Sequence[int] = (),
        destination_fds: Sequence[int] = (),
    ) -> None:
        memory = Path("/dev/shm")  # flock and rename work there, and nothing waits for a disk
        where = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
        self.directory = tempfile.mkdtemp(prefix="whimbrel-", dir=where)
        self._options = AppOptions(
            config=config, directory=self.directory, fence=fence, settings=settings or {}
        )
        self._started: list[AppProcess] = []
        try:
            self.source = self._start("source", source_fds)
            self.destination = self._start("destination", destination_fds)
            for app in self._started:
                app.wait_event(_is_ready)
        except BaseException:
            self.close()
            raise

    def _start(self, role: str, fds: Sequence[int] = ()) -> AppProcess:
        app = AppProcess(role, self._options, pass_fds=fds)
        self._started.append(app)
        return app

    def renew_destination(self) -> AppProcess:
        """Another destination, in the place of one that was killed."""
        self.destination = self._start("destination")
        self.destination.wait_event(_is_ready)
        return self.destination

    def running(self) -> list[str]:
        """The roles whose machine runs now."""
        return [a.role for a in self._started if a.alive and a.call("report")["running"]]

    def violations(self) -> list[str]:
        """Signs that two copies ran at once."""
        return violations(Path(self.directory) / "lease")

    def close(self) -> None:
        for app in self._started:
            with contextlib.suppress(Exception):
                app.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
