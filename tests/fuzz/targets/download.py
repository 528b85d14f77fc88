"""Downloads: ``download.fetch``, against addresses, answers and a cache that are not what they should be."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from act_pipeline.core.cache_dir import CACHE_VARIABLE
from act_pipeline.core.downloads import fetch, is_url
from tests.fuzz.harness import Target
from tests.fuzz.mutate import raw

_BODY = b"weights" * 100
_DIGEST = hashlib.sha256(_BODY).hexdigest()


def _examples(folder: Path) -> st.SearchStrategy[dict[str, Any]]:
    names = st.one_of(
        st.sampled_from(
            [
                "model.pdparams",
                "..",
                ".",
                "...",
                "%2e%2e",
                "..%2f..%2fx",
                "a" * 300,
                "é" * 200,
                "~",
                "x y",
                "\\..\\x",
                "a;b",
                ".model.pdparams",
                "model.pdparams.sha256",
                "\ud800",
                "a\nb",
                "a\0b",
                "",
            ]
        ),
        st.text(max_size=8),
    )
    hosts = st.sampled_from(
        ["example.org", "[", "[::1", "", "example.org:99999", "example.org:x", "user:pass@example.org", "é" * 300]
    )
    fragments = st.sampled_from(
        [
            "",
            f"#sha256={_DIGEST}",
            f"#sha256={_DIGEST.upper()}",
            f"#sha256={'0' * 64}",
            "#sha256=",
            "#sha256=xyz",
            "#sha265=00",
            "#x",
        ]
    )
    return st.fixed_dictionaries(
        {
            "url": st.builds(
                "{}://{}/models/{}{}".format, st.sampled_from(["http", "https", "HTTP"]), hosts, names, fragments
            ),
            "body": st.one_of(st.just(_BODY), raw([_BODY])),
            "length": st.sampled_from(
                [str(len(_BODY)), None, "", "0", "-1", "x", "9" * 5000, "1e3", str(len(_BODY) + 1)]
            ),
            "encoding": st.sampled_from([None, "gzip", "deflate", "br", "x"]),
            "status": st.sampled_from([200, 200, 200, 404, 500]),
            "seal": st.one_of(
                st.none(),
                raw([f"{_DIGEST} http://example.org/models/model.pdparams\n".encode()]),
            ),
        }
    )


def _answer(example: dict[str, Any]) -> Any:
    """Return what stands for the connection: urllib3's answer below `requests`."""
    from requests.adapters import HTTPAdapter
    from urllib3 import HTTPResponse

    headers = {}
    if example["length"] is not None:
        headers["Content-Length"] = example["length"]
    if example["encoding"] is not None:
        headers["Content-Encoding"] = example["encoding"]

    def send(adapter: HTTPAdapter, request: Any, **options: Any) -> Any:
        body = HTTPResponse(
            body=io.BytesIO(example["body"]), headers=headers, status=example["status"], preload_content=False
        )
        return adapter.build_response(request, body)

    return mock.patch.object(HTTPAdapter, "send", send)


def _read(folder: Path, example: dict[str, Any]) -> None:
    cache = folder / "cache"
    weights = cache / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    for path in weights.iterdir():
        path.unlink()
    if example["seal"] is not None:
        (weights / "model.pdparams").write_bytes(_BODY)
        (weights / "model.pdparams.sha256").write_bytes(example["seal"])
    with mock.patch.dict(os.environ, {CACHE_VARIABLE: str(cache)}), _answer(example):
        if not is_url(example["url"]):
            return
        found = fetch(example["url"], progress=False)
    assert found.parent == weights and found.is_file(), f"{found} lies outside the cache"
    for path in folder.rglob("*"):
        assert path in (cache, weights) or path.parent == weights, f"{path} was written outside the cache"
    asked = example["url"].partition("#sha256=")[2].lower()
    assert not asked or hashlib.sha256(found.read_bytes()).hexdigest() == asked, "not the file of that hash"


DOWNLOAD = Target("download", _examples, _read)
