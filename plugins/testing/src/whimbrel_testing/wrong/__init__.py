"""Streams that are wrong on purpose, for everything that reads one."""

from whimbrel_testing.wrong.case import Case, Refusal, Side
from whimbrel_testing.wrong.cases import all_cases

__all__ = ["Case", "Refusal", "Side", "all_cases"]
