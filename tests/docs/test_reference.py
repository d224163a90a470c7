"""The reference says what the code says."""

import inspect
import re
import subprocess
import sys

import pytest

import whimbrel.hookspecs
import whimbrel_ram.hookspecs

HOOKS = {
    name: function
    for module in (whimbrel.hookspecs, whimbrel_ram.hookspecs)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and hasattr(function, "whimbrel_spec")
}


def test_the_generated_pages_are_current(root):
    done = subprocess.run(
        [sys.executable, root / "tools" / "reference.py", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_has_a_page_with_its_signature_and_an_example(root, hook):
    text = (root / "docs" / "reference" / "hooks" / f"{hook}.md").read_text()
    parameters = ", ".join(inspect.signature(HOOKS[hook]).parameters)
    assert f"    {hook}({parameters})" in text
    assert "## When it is called" in text
    assert "## What None means" in text
    assert re.search(rf"^```python\n.*def {hook}\(.*^```$", text, re.MULTILINE | re.DOTALL)


def test_no_page_describes_a_hook_that_is_gone(root):
    pages = {p.stem for p in (root / "docs" / "reference" / "hooks").glob("*.md")}
    assert pages - {"README"} == set(HOOKS)
