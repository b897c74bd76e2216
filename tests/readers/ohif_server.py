"""OHIF on loopback: its built files, a configuration for one archive, and the archive under the same origin."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

ARCHIVE = "/o/"  # what follows is Orthanc's own path
KEPT = {"Cache-Control": "max-age=86400"}  # the built files: the browser reads 40 MB of script once, not for each page
SENT_ON = ("Accept", "Content-Type")
NO_MORE: Mapping[str, str] = {}
ARCHIVE_TIMEOUT_S = 120
DICOMWEB = f"{ARCHIVE}dicom-web"
CONFIG = {
    "routerBasename": "/",
    "extensions": [],
    "modes": [],
    "showStudyList": False,
    "maxNumberOfWebWorkers": 2,
    "investigationalUseDialog": {"option": "never"},
    "defaultDataSourceName": "archive",
    "dataSources": [
        {
            "namespace": "@ohif/extension-default.dataSourcesModule.dicomweb",
            "sourceName": "archive",
            "configuration": {
                "friendlyName": "archive",
                "name": "archive",
                "qidoRoot": DICOMWEB,
                "wadoRoot": DICOMWEB,
                "wadoUriRoot": DICOMWEB,
                "qidoSupportsIncludeField": False,
                "imageRendering": "wadors",
                "thumbnailRendering": "wadors",
                "enableStudyLazyLoad": True,
                "supportsFuzzyMatching": False,
                "supportsWildcard": True,
                "omitQuotationForMultipartRequest": True,
                "bulkDataURI": {"enabled": True},
            },
        }
    ],
}


@contextmanager
def serving_ohif(dist: Path, orthanc_http_port: int) -> Iterator[str]:
    """Serve the viewer in `dist` before this Orthanc; yields its address without a slash at the end."""

    class Handler(_Handler):
        folder = dist.resolve()
        archive = f"http://127.0.0.1:{orthanc_http_port}/"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, name="ohif-server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    archive: str

    def do_GET(self) -> None:
        if self.path.startswith(ARCHIVE):
            self._ask_the_archive()
        elif urlsplit(self.path).path == "/app-config.js":
            self._answer(200, "text/javascript", f"window.config = {json.dumps(CONFIG)};".encode())
        else:
            path = self._file()
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            self._answer(200, kind, path.read_bytes(), KEPT)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the test says what went wrong."""

    def _file(self) -> Path:
        """The file of this path, or the application's page: its routes are no files."""
        asked = (self.folder / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        return asked if asked.is_relative_to(self.folder) and asked.is_file() else self.folder / "index.html"

    def _ask_the_archive(self) -> None:
        headers = {name: value for name in SENT_ON if (value := self.headers.get(name))}
        request = Request(self.archive + self.path.removeprefix(ARCHIVE), headers=headers)
        try:
            with urlopen(request, timeout=ARCHIVE_TIMEOUT_S) as answer:
                self._answer(answer.status, answer.headers["Content-Type"], answer.read())
        except HTTPError as refused:
            self._answer(refused.code, "text/plain", refused.read())

    def _answer(self, status: int, kind: str, body: bytes, more: Mapping[str, str] = NO_MORE) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the browser gave up a request it no longer needs
