"""The script that counts what becomes of examples in documents."""

from __future__ import annotations

import pytest

from tests.ctl.convert import shares

pytest.importorskip("yaml")

DOCUMENT = """\
Text with gost -L in it.

```bash
gost -L :8080 \\
     -F http://192.0.2.1:80?foo=bar
$ gost -L :8080 -F http://192.0.2.1:80?foo=bar
gost -L ss://:8388
```
`proxy http -p :80 -z x`  
"""


def test_examples_are_found_once() -> None:
    found = list(shares.examples("gost", [DOCUMENT, DOCUMENT]))
    assert found == ["gost -L :8080 -F http://192.0.2.1:80?foo=bar", "gost -L ss://:8388"]
    assert list(shares.examples("goproxy", [DOCUMENT])) == ["proxy http -p :80 -z x"]


def test_outcomes_are_counted() -> None:
    assert dict(shares.outcomes("gost", "gost -L :8080 -F http://192.0.2.1:80?foo=bar")) == {
        **{"carried": 2, "not needed": 0, "changed": 0, "not carried": 1, "untold": 1}
    }
    assert shares.outcomes("goproxy", "proxy http -p :80 -z x")["untold"] == 0
