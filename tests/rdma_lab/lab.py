"""rdmalab: run a command on a machine that has RDMA devices, when yours has none.

Boots an unmodified Debian kernel in qemu (software emulation, no /dev/kvm
needed) with Soft-RoCE (rdma_rxe) loaded.  The machine inside sees THIS
machine's file system (read-only 9p share under a tmpfs overlay: whatever it
writes is lost, except below the folders given with --share).  The command's
output is streamed to standard output and its exit status is this program's.

    lab.py prepare                    fetch kernel, build initramfs (cached)
    lab.py run [options] -- CMD ...   boot, run CMD, power off
    lab.py tests [--out DIR] [PYTEST OPTIONS]
                                      boot, run the tests in inside/ with this Python,
                                      which must be of the version that pyverbs is for

Needs, all from Debian: qemu-system-x86, busybox-static, iproute2 (its `rdma`
tool), and apt-get, apt-cache, dpkg-deb to fetch the kernel package; for verbs programs
inside: libibverbs1 ibverbs-providers librdmacm1 (python3-pyverbs, ibverbs-utils
... as wanted).  No root needed for `run` unless the tree shared is root's.

Options of run
    --share DIR     DIR is shared read-write (results, coverage, junit files);
                    may be given several times
    --root DIR      tree to show as / inside (default /)
    --cwd DIR       directory CMD starts in (default: the caller's)
    --env K=V       set in CMD's environment; --env K passes the caller's K on
    --timeout SEC   limit for CMD itself (default 900); exit status 124
    --mem MB        guest memory (default 2048)      --smp N   (default: cores)
    --quiet         no lines of the lab's own on standard error
    --log FILE      keep the kernel's console there

Environment
    RDMALAB_CACHE     cache folder (default $XDG_CACHE_HOME/rdmalab)
    RDMALAB_KERNEL    Debian kernel package, or a path of an unpacked one
                      (default linux-image-amd64; the -cloud- kernel has no rxe)
    RDMALAB_QEMU      default qemu-system-x86_64
    RDMALAB_ACCEL     default tcg
    RDMALAB_CPU       default Nehalem (x86-64-v2; `max` is slower emulated)
    RDMALAB_PYVERBS   the folder of pyverbs (default that of Debian's package)
    RDMALAB_BUSYBOX   default /bin/busybox (must be static)
    RDMALAB_BOOT_S    seconds allowed for boot-to-command (default 120; a boot that
                      takes longer is thrown away and tried again, 3 in all)
Inside, CMD runs as root and sees RDMALAB=1, RDMALAB_IP0=10.77.0.1 and
RDMALAB_IP1=10.77.1.1 (addresses with an RDMA device), PATH and HOME as outside.
Exit status: CMD's; 124 CMD timed out; 125 the lab itself failed.
"""

# ruff: noqa: SIM115, PLW2901 - one short-lived process

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

from boot_image import prepare, say

QEMU = os.environ.get("RDMALAB_QEMU") or "qemu-system-x86_64"
ACCEL = os.environ.get("RDMALAB_ACCEL") or "tcg"
CPU = os.environ.get("RDMALAB_CPU") or "Nehalem"
PYVERBS = os.environ.get("RDMALAB_PYVERBS") or "/usr/lib/python3/dist-packages/pyverbs"
BOOT_S = float(os.environ.get("RDMALAB_BOOT_S") or 120)

MAIN = r"""
bb=/run/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
$bb hostname rdmalab; ulimit -l unlimited
for p in /sys/class/virtio-ports/*; do
  [ "$(cat $p/name)" = rdmalab ] && port=/dev/${p##*/}; done
(
ip link set lo up
ip link add v0 type dummy; ip addr add 10.77.0.1/24 dev v0
ip addr add 10.77.1.1/24 dev v0; ip link set v0 mtu 4200 up
rdma link add rxe0 type rxe netdev v0
) >/run/rdmalab/setup 2>&1
$bb cat /proc/uptime > /run/rdmalab/up
{ $bb setsid /bin/sh /run/rdmalab/cmd </dev/null 2>&1; echo $? > /run/rdmalab/rc; } | $bb cat > $port
$bb sync
$bb poweroff -f
"""


def esc(s):
    return s.replace(",", ",,")


def boot(a, image, initrd, script):
    """One attempt -> exit status, or None when it did not reach the command."""
    box = tempfile.mkdtemp(prefix="rdmalab-")
    try:
        shares = []
        for i, d in enumerate(a.share):
            d = os.path.abspath(d)
            os.makedirs(d, exist_ok=True)
            shares.append((f"s{i}", d))
        for n, t in (
            ("shares", "".join("{} {}\n".format(*s) for s in shares)),
            ("cmd", script),
            ("main", MAIN),
        ):
            with open(os.path.join(box, n), "w") as f:
                f.write(t)
        log = a.log or os.path.join(box, "console")
        out = os.path.join(box, "out")
        open(out, "w").close()

        def fs(tag, path, extra):
            return [
                "-fsdev",
                f"local,id={tag},path={esc(path)},security_model=none{extra}",
                "-device",
                f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
            ]

        argv = [
            QEMU,
            "-accel",
            ACCEL,
            "-M",
            "q35",
            "-cpu",
            CPU,
            "-m",
            str(a.mem),
            "-smp",
            str(a.smp),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-kernel",
            image,
            "-initrd",
            initrd,
            "-append",
            (
                "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on "
                "nokaslr audit=0 tsc=unstable clocksource=hpet nohz=off"
            ),
            "-chardev",
            f"file,id=con,path={esc(log)}",
            "-serial",
            "chardev:con",
            "-device",
            "virtio-rng-pci",
            "-device",
            "virtio-serial-pci",
            "-chardev",
            f"file,id=out,path={esc(out)}",
            "-device",
            "virtserialport,chardev=out,name=rdmalab",
        ]
        argv += fs("root", a.root, ",readonly=on,multidevs=remap") + fs("box", box, "")
        for tag, d in shares:
            argv += fs(tag, d, ",multidevs=remap")
        t0 = time.time()
        p = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=open(os.path.join(box, "qemu"), "w"),
        )
        tail = open(out, "rb")

        def pump():
            b = tail.read()
            if b:
                sys.stdout.buffer.write(b)
                sys.stdout.buffer.flush()

        up, up_at, timed_out = os.path.join(box, "up"), None, False
        try:
            while p.poll() is None:
                time.sleep(0.05)
                pump()
                if up_at is None and os.path.exists(up) and os.path.getsize(up):
                    up_at = time.time()
                    say(a.quiet, "command starts %.1f s after power-on" % (up_at - t0))
                    note = open(os.path.join(box, "setup")).read().strip()
                    if note:
                        say(a.quiet, "set-up said:", note)
                if up_at is None and time.time() - t0 > BOOT_S:
                    break
                if up_at and time.time() - up_at > a.timeout:
                    timed_out = True
                    break
        finally:
            if p.poll() is None:
                p.kill()
            p.wait()
            pump()
        rc = os.path.join(box, "rc")
        if os.path.exists(rc) and open(rc).read().strip():
            say(a.quiet, "powered off %.1f s after power-on" % (time.time() - t0))
            return int(open(rc).read())
        if timed_out:
            say(False, f"command stopped after {a.timeout} s")
            return 124
        say(
            False,
            "machine did not %s; console ends:"
            % ("reach the command" if not up_at else "finish the command"),
        )
        sys.stderr.write(open(os.path.join(box, "qemu")).read()[-2000:])
        sys.stderr.write(open(log, errors="replace").read()[-3000:])
        return 125 if up_at else None
    finally:
        shutil.rmtree(box, ignore_errors=True)


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    verb, rest = sys.argv[1], sys.argv[2:]
    if verb == "prepare":
        print("\n".join(prepare()))
        return 0
    if verb == "tests":
        with tempfile.TemporaryDirectory() as found:
            # Only pyverbs, of all that the system's Python has.
            os.symlink(PYVERBS, os.path.join(found, "pyverbs"))
            return in_the_lab(found, rest)
    if verb != "run":
        print(__doc__, file=sys.stderr)
        return 125
    return run(rest)


def in_the_lab(pythonpath, options):
    """Pytest on inside/ in the lab, by the Python that runs this."""
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(here))
    env = ["PYTHONPATH=" + pythonpath, "PYTHONDONTWRITEBYTECODE=1", "PYTHONFAULTHANDLER=1"]
    share = []
    if "--out" in options:  # a folder for what comes out: junit file, console
        i = options.index("--out")
        out = os.path.abspath(options[i + 1])
        options = [*options[:i], *options[i + 2 :], f"--junitxml={out}/rdma.xml"]
        share = ["--share", out, "--log", f"{out}/console"]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    return run(
        [
            *("--cwd", root, "--timeout", "1800"),
            *(word for each in env for word in ("--env", each)),
            *share,
            *("--", *pytest, os.path.join(here, "inside"), *options),
        ]
    )


def run(rest):
    cmd = []
    if "--" in rest:
        i = rest.index("--")
        rest, cmd = rest[:i], rest[i + 1 :]
    ap = argparse.ArgumentParser(prog="lab.py run", usage="lab.py run [options] -- CMD ...")
    ap.add_argument("--share", action="append", default=[])
    ap.add_argument("--root", default="/")
    ap.add_argument("--cwd", default=os.getcwd())
    ap.add_argument("--env", action="append", default=[])
    ap.add_argument("--timeout", type=float, default=900)
    ap.add_argument("--mem", type=int, default=2048)
    ap.add_argument("--smp", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--quiet", action="store_true")
    ap.add_argument("--log")
    a = ap.parse_args(rest)
    if not cmd:
        ap.error("no command")
    image, initrd = prepare(a.quiet)
    env = {
        "RDMALAB": "1",
        "HOME": os.environ.get("HOME", "/root"),
        "LANG": "C.UTF-8",
        "PATH": os.environ.get("PATH", os.defpath),
    }
    env.update(RDMALAB_IP0="10.77.0.1", RDMALAB_IP1="10.77.1.1")
    for e in a.env:
        k, eq, v = e.partition("=")
        env[k] = v if eq else os.environ.get(k, "")
    script = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in env.items())
    script += "cd {} || exit 125\nexec {}\n".format(
        shlex.quote(a.cwd), " ".join(map(shlex.quote, cmd))
    )
    for n in range(3):
        rc = boot(a, image, initrd, script)
        if rc is not None:
            return rc
        say(False, f"trying again ({n + 2} of 3)" if n < 2 else "giving up")
    return 125


if __name__ == "__main__":
    sys.exit(main())
