"""The kernel and the initramfs that the lab boots: a stock Debian kernel, its modules for Soft-RoCE, and busybox.

Standard library only; fetched and built once, then kept in the cache folder. Variables: see lab.py.
"""

# ruff: noqa: SIM115 - one short-lived process

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time

CACHE = os.environ.get("RDMALAB_CACHE") or os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rdmalab"
)
KERNEL = os.environ.get("RDMALAB_KERNEL") or "linux-image-amd64"
BUSYBOX = os.environ.get("RDMALAB_BUSYBOX") or "/bin/busybox"

MODULES = [
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "crc32_generic",
    "dummy",
    "rdma_rxe",
    "rdma_cm",
    "rdma_ucm",
    "ib_uverbs",
]

INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for m in $(cat /modules.list); do insmod /m/$m.ko || echo "rdmalab: insmod $m failed"; done
o=trans=virtio,version=9p2000.L,msize=1048576
mkdir -p /lower /rw /new
mount -t 9p -o $o,ro,cache=loose root /lower || { echo no root share; poweroff -f; }
mount -t tmpfs -o size=90% tmpfs /rw; mkdir /rw/up /rw/work
mount -t overlay -o lowerdir=/lower,upperdir=/rw/up,workdir=/rw/work overlay /new
mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp
mount --move /proc /new/proc; mount --move /sys /new/sys; mount --move /dev /new/dev
mount -t tmpfs tmpfs /new/run
mkdir -p /new/dev/pts /new/dev/shm /new/run/rdmalab
mount -t devpts devpts /new/dev/pts; mount -t tmpfs tmpfs /new/dev/shm
ln -sf /proc/self/fd /new/dev/fd; for n in 0:stdin 1:stdout 2:stderr; do
  ln -sf /proc/self/fd/${n%%:*} /new/dev/${n##*:}; done
mount -t 9p -o $o,cache=none box /new/run/rdmalab
while read -r tag dir; do mkdir -p "/new$dir"
  mount -t 9p -o $o,cache=mmap "$tag" "/new$dir" || echo "rdmalab: share $dir failed"
done < /new/run/rdmalab/shares
cp /bin/busybox /new/run/busybox
exec switch_root /new /bin/sh /run/rdmalab/main
"""


def say(quiet, *a):
    if not quiet:
        print("rdmalab:", *a, file=sys.stderr, flush=True)


def sh(*argv, **kw):
    return subprocess.run(argv, check=True, **kw)


def kernel_tree():
    """-> folder holding boot/vmlinuz-* and lib/modules/*; fetched once."""
    if os.path.isdir(KERNEL):
        return KERNEL
    name = KERNEL
    for _ in range(2):  # the meta package names the real one
        deps = subprocess.run(
            ["apt-cache", "depends", name], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        real = re.findall(r"Depends: (linux-image-\d\S*)", deps)
        if not real:
            break
        name = real[0]
    if not re.match(r"linux-image-\d", name):
        raise SystemExit(f"rdmalab: no kernel package for {KERNEL} (run apt-get update?)")
    tree = os.path.join(CACHE, name)
    if not os.path.isdir(tree):
        os.makedirs(CACHE, exist_ok=True)
        tmp = tempfile.mkdtemp(dir=CACHE)
        sh(
            "apt-get",
            "download",
            name,
            cwd=tmp,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deb = next(f for f in os.listdir(tmp) if f.endswith(".deb"))
        sh("dpkg-deb", "-x", os.path.join(tmp, deb), os.path.join(tmp, "x"))
        os.rename(os.path.join(tmp, "x"), tree)
        shutil.rmtree(tmp)
    return tree


def module_closure(tree):
    """-> [(name, path)] in load order, from the modules' own 'depends='."""
    files = {}
    for d, _, fs in os.walk(os.path.join(tree, "lib/modules")):
        for f in fs:
            m = re.match(r"(.+)\.ko(\.xz|\.zst|\.gz)?$", f)
            if m:
                files[m.group(1).replace("-", "_")] = os.path.join(d, f)
    order = []

    def blob(path):
        if path.endswith(".xz"):
            import lzma

            return lzma.open(path).read()
        if path.endswith(".gz"):
            return gzip.open(path).read()
        if path.endswith(".zst"):
            return subprocess.run(["zstd", "-dc", path], check=True, stdout=subprocess.PIPE).stdout
        return open(path, "rb").read()

    def add(name, must):
        if name in [n for n, _ in order]:
            return
        if name not in files:
            if must == 1:
                raise SystemExit(f"rdmalab: kernel {tree} has no module {name}")
            return  # built in, or an optional one absent
        data = blob(files[name])
        dep = re.search(rb"\0depends=([^\0]*)\0", data)
        for n in dep.group(1).decode().split(",") if dep else []:
            if n:
                add(n.replace("-", "_"), 0)
        order.append((name, data))

    for n in MODULES:
        add(n, n == "rdma_rxe")
    return order


def newc(entries):
    """Cpio newc archive; entries are (path, mode, data)."""
    out = []
    for ino, (path, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        name = path.encode() + b"\0"
        hdr = "070701" + "".join(
            f"{v:08X}" for v in (ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        )
        rec = hdr.encode() + name
        rec += b"\0" * (-len(rec) % 4) + data
        out.append(rec + b"\0" * (-len(data) % 4))
    return b"".join(out)


def prepare(quiet=False):
    """-> (kernel image, initramfs)"""
    t = time.time()
    tree = kernel_tree()
    image = max(
        os.path.join(tree, "boot", f)
        for f in os.listdir(os.path.join(tree, "boot"))
        if f.startswith("vmlinuz")
    )
    busybox = os.stat(BUSYBOX)
    key = hashlib.sha256(
        (INIT + image + repr(MODULES) + repr((busybox.st_size, busybox.st_mtime))).encode()
    ).hexdigest()[:12]
    initrd = os.path.join(CACHE, f"initrd-{key}.gz")
    if not os.path.exists(initrd):
        os.makedirs(CACHE, exist_ok=True)
        mods = module_closure(tree)
        d, x = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
        ents = [(p, d, b"") for p in ("bin", "m", "proc", "sys", "dev")]
        ents += [
            ("bin/busybox", x, open(BUSYBOX, "rb").read()),
            ("init", x, INIT.encode()),
            ("modules.list", x, "\n".join(n for n, _ in mods).encode() + b"\n"),
        ]
        ents += [(f"m/{n}.ko", x, data) for n, data in mods]
        tmp = f"{initrd}.{os.getpid()}"
        with open(tmp, "wb") as f:
            f.write(gzip.compress(newc(ents), 1))
        os.rename(tmp, initrd)
        say(quiet, f"prepared {os.path.basename(tree)} in {time.time() - t:.1f} s")
    return image, initrd
