"""Which requests come from the server's own page: by Origin and Host, and by what the browser itself says."""

from __future__ import annotations

import pytest
from hotpath.panel.routes import same_origin


@pytest.mark.parametrize(
    ("headers", "ours"),
    [
        ({"Host": "127.0.0.1:8188"}, True),
        ({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8188"}, True),
        ({"Host": "comfy.local", "Origin": "http://comfy.local:80"}, True),
        ({"Host": "comfy.local:443", "Origin": "https://comfy.local"}, True),
        ({"Host": "127.0.0.1:8188", "Origin": "http://127.0.0.1:8189"}, False),
        ({"Host": "127.0.0.1:8188", "Origin": "http://localhost:8188"}, False),
        ({"Host": "a.com", "Origin": "http://a.com.evil.com"}, False),
        ({"Host": "a.com", "Origin": "http://a.com:99999"}, False),
        ({"Host": "", "Origin": "null"}, False),
        ({"Origin": "http://a.com"}, False),
        # A proxy that changes Host; the browser itself says that page and server are the same.
        ({"Host": "upstream:8188", "Origin": "https://a.com", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Host": "a.com", "Origin": "https://a.com", "Sec-Fetch-Site": "cross-site"}, False),
    ],
)
def test_same_origin(headers: dict[str, str], ours: bool) -> None:
    assert same_origin(headers) is ours
