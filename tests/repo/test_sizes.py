from __future__ import annotations

from tools.dev import size


def test_no_file_and_no_function_is_over_its_cap():
    assert size.problems() == []


def test_a_function_is_measured_with_its_decorators():
    body = "    x = 1\n" * (size.FUNCTION_CAP - 1)
    assert size.long_functions(f"def exact():\n{body}") == []
    assert size.long_functions(f"@property\ndef over(self):\n{body}") == [("over", 1, size.FUNCTION_CAP + 1)]


def test_scripts_without_a_suffix_are_measured():
    assert "check" in {path.name for path in size.files("tools")}
