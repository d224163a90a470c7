"""abstract does what every transport has to do."""

import uuid

import pytest

import whimbrel_abstract.plugin
from whimbrel_testing.transport_suite import Ends, TransportSuite


class TestAbstract(TransportSuite):
    plugin = whimbrel_abstract.plugin
    scheme = "abstract"
    eof_means_peer_gone = True
    good_texts = ("name", "with/slash", "with:colon,and=comma", "ü", "a" * 107)
    bad_texts = ("", "a" * 108, "a\0b")

    @pytest.fixture
    def ends(self):
        return Ends(f"whimbrel-{uuid.uuid4()}")
