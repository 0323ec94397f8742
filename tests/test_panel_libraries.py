"""Libraries are looked at in a process of their own, as one that is damaged may kill it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hotpath.panel.libraries import LibraryReport


def test_libraries_are_looked_at_in_another_process(tmp_path: Path) -> None:
    code = f"import os, pathlib; p = pathlib.Path({str(tmp_path / 'n')!r}); p.open('a').write('x'); "
    report = LibraryReport((sys.executable, "-c", code + "print('{\"backends\": [%d]}' % os.getpid())"))
    first = report.read()
    assert first["backends"] != [os.getpid()]
    assert report.read() == first and (tmp_path / "n").read_text() == "x"  # remembered
    assert report.read(again=True) != first


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import os; os._exit(139)", "ended with code 139"),
        ("print('[]')", "ended with code 0"),
        ("import sys; sys.stdout.buffer.write(b'\\xe9')", "ended with code 0"),
    ],
)
def test_a_library_that_kills_its_process(code: str, sentence: str) -> None:
    assert sentence in LibraryReport((sys.executable, "-c", code)).read()["error"]


def test_a_library_that_never_ends() -> None:
    report = LibraryReport((sys.executable, "-c", "import time; time.sleep(60)"), timeout=1.0)
    assert "longer than 1 s" in report.read()["error"]
