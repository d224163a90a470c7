import ctypes
import mmap
import os

import numpy as np
import pytest

from whimbrel_ram import RAMBlock

MIB = 1 << 20


def test_own_memory_is_a_memfd_that_others_can_map():
    block = RAMBlock("ram", MIB)
    block.buffer[5000] = 77
    assert block.view[5000] == 77
    assert block.fd is not None
    with mmap.mmap(block.fd, MIB) as second:
        assert second[5000] == 77
    assert block.aligned
    assert os.readlink(f"/proc/self/fd/{block.fd}").startswith("/memfd:ram")
    assert block.rows.shape == (256, 4096)


def test_its_memfd_cannot_be_cut_short_under_it():
    block = RAMBlock("ram", MIB)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(block.fd, 0)


def test_the_descriptor_goes_with_the_block():
    block = RAMBlock("ram", MIB)
    fd = block.fd
    del block
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mmap.mmap(-1, 8192),
        lambda: np.zeros((2, 4096), np.uint8),
        lambda: np.zeros(1024, np.float64),
        ctypes.c_uint32 * 2048,
        lambda: bytearray(8192),
        lambda: memoryview(bytearray(8192)),
    ],
    ids=["mmap", "numpy", "float64", "ctypes", "bytearray", "memoryview"],
)
def test_memory_of_the_app(make):
    memory = make()
    block = RAMBlock("vram", 8192, memory=memory)
    block.view[:] = 3
    assert bytes(memoryview(memory).cast("B")) == b"\3" * 8192
    assert block.fd is None
    assert block.address == np.frombuffer(memory, np.uint8).ctypes.data
    assert RAMBlock("vram", memory=memory).size == 8192


def test_memory_that_is_not_aligned_is_accepted_and_says_so():
    space = mmap.mmap(-1, 16384)
    assert not RAMBlock("ram", memory=memoryview(space)[100 : 100 + 8192]).aligned
    assert RAMBlock("ram", memory=memoryview(space)[4096:12288]).aligned


@pytest.mark.parametrize(
    ("memory", "size", "error", "words"),
    [
        (bytes(4096), 4096, ValueError, "read-only"),
        (np.zeros((64, 128), np.uint8)[:, ::2], 4096, ValueError, "not C-contiguous"),
        (bytearray(4097), None, ValueError, "not a multiple"),
        (bytearray(8192), 4096, ValueError, "size=4096"),
        ([1, 2, 3], None, TypeError, "not a buffer"),
    ],
)
def test_memory_that_cannot_be_used(memory, size, error, words):
    with pytest.raises(error, match=words):
        RAMBlock("ram", size, memory=memory)


@pytest.mark.parametrize("size", [0, -4096, 4095, 4097])
def test_the_size_is_a_multiple_of_the_page_size(size):
    with pytest.raises(ValueError, match="not a multiple"):
        RAMBlock("ram", size)


@pytest.mark.parametrize("page_size", [0, 512, 3000, 1 << 25])
def test_page_sizes_that_the_wire_cannot_carry(page_size):
    with pytest.raises(ValueError, match="power of two"):
        RAMBlock("ram", 1 << 26, page_size=page_size)


@pytest.mark.parametrize("idstr", ["", "x" * 256, "räm", "a\0b", "line\n"])
def test_names_that_the_wire_cannot_carry(idstr):
    with pytest.raises(ValueError, match="idstr"):
        RAMBlock(idstr, 4096)
    assert RAMBlock("x" * 255, 4096).wire_idstr == b"x" * 255


def test_marks_are_kept_only_during_a_migration():
    block = RAMBlock("ram", 8 * 4096)
    block.mark_dirty(0, 4096)
    assert block.take_marks() is None
    block.start_marks()
    assert block.take_marks() is None
    block.mark_dirty(4095, 2)
    block.mark_dirty(7 * 4096, 4096)
    block.mark_dirty(3 * 4096, 0)
    assert bytes(block.take_marks()) == bytes([1, 1, 0, 0, 0, 0, 0, 1])
    assert block.take_marks() is None
    block.stop_marks()
    block.mark_dirty(0, 1)
    assert block.take_marks() is None


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 32769), (32768, 1), (0, -1)])
def test_marks_outside_the_block_are_refused(offset, length):
    with pytest.raises(ValueError, match="not inside"):
        RAMBlock("ram", 32768).mark_dirty(offset, length)


@pytest.mark.parametrize("memory", [None, "mmap", "bytearray"])
def test_discard_zeroes_and_marks(memory):
    source = {None: None, "mmap": mmap.mmap(-1, 16384), "bytearray": bytearray(16384)}[memory]
    block = RAMBlock("ram", 16384, memory=source)
    block.view[:] = 1
    block.start_marks()
    block.discard(4096, 8192)
    assert not block.view[4096:12288].any()
    assert block.view[:4096].all()
    assert block.view[12288:].all()
    assert bytes(block.take_marks()) == bytes([0, 1, 1, 0])
    with pytest.raises(ValueError, match="whole pages"):
        block.discard(1, 4096)
    with pytest.raises(ValueError, match="not inside"):
        block.discard(12288, 8192)
