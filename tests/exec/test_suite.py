"""exec does what every transport has to do, as far as a pipe can."""

from __future__ import annotations

import os

import pytest

import whimbrel_exec.plugin
from whimbrel_testing.transport_suite import Ends, TransportSuite


class TestExec(TransportSuite):
    """Two commands with a FIFO between them."""

    plugin = whimbrel_exec.plugin
    scheme = "exec"
    has_return_path = False
    many_channels = False
    accept_waits = False
    good_texts = ("cat", "a::b", "nc -l 4444 | tee 'x y'", "  spaces  ", "two\nlines")
    bad_texts = ("", "   ", "a\0b")

    @pytest.fixture
    def ends(self, tmp_path):
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        return Ends(f"exec cat < {fifo}", f"exec cat > {fifo}")
