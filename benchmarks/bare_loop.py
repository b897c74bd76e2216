"""The least that a durable C-STORE receiver in Python can do: `python benchmarks/bare_loop.py PORT FOLDER [--sync]`.

For `benchmarks/intake.py` only: it shows what this machine and its disk allow. It takes every association, checks
nothing, reads P-DATA-TF straight into a file and answers; with `--sync` the file (not its name) is durable before.
One thread for each connection.
"""

from __future__ import annotations

import os
import socket
import socketserver
import struct
import sys
from pathlib import Path

from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.presentation import build_context

from dicom_node.net import command as cmd

MAX_PDU = 131072
IS_RESPONSE = cmd.element(cmd.COMMAND_FIELD, struct.pack("<H", cmd.C_STORE_RSP))
NO_DATA_SET = cmd.element(cmd.DATA_SET_TYPE, struct.pack("<H", cmd.NO_DATA_SET))
SUCCESS = cmd.element(cmd.STATUS, struct.pack("<H", 0))


class BareLoop(socketserver.BaseRequestHandler):
    """One association."""

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        folder, sync = self.server.folder, self.server.sync  # type: ignore[attr-defined]
        buffer = memoryview(bytearray(MAX_PDU))
        _, length = self._header()
        self.request.sendall(accepted(self._exactly(length)))
        file, count = -1, 0
        while True:
            kind, length = self._header()
            if kind != cmd.P_DATA:  # a release, or worse
                self._exactly(length)
                self.request.sendall(b"\x06\0\0\0\0\x04\0\0\0\0")
                return
            pdv, context_id, control = cmd.PDV_HEADER.unpack(self._exactly(cmd.PDV_HEADER.size))
            if pdv + 4 != length:
                raise SystemExit("more than one fragment in a PDU")
            left = length - cmd.PDV_HEADER.size
            if control & cmd.COMMAND:  # a command set is one fragment here
                message_id = cmd.elements(self._exactly(left))[cmd.MESSAGE_ID]
                count += 1
                path = folder / f"{self.client_address[1]}-{count}.dcm"
                file = os.open(path.with_suffix(".tmp"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                continue
            got = self.request.recv_into(buffer[:left], left, socket.MSG_WAITALL)
            os.write(file, buffer[:got])
            if control & cmd.LAST:
                if sync:
                    os.fsync(file)
                os.close(file)
                path.with_suffix(".tmp").rename(path)
                told = cmd.command_set([IS_RESPONSE, cmd.element(cmd.RESPONDED_TO, message_id), NO_DATA_SET, SUCCESS])
                self.request.sendall(cmd.pdu_of(context_id, cmd.COMMAND | cmd.LAST, told))

    def _header(self) -> tuple[int, int]:
        kind, length = cmd.PDU_HEADER.unpack(self._exactly(cmd.PDU_HEADER.size))
        return kind, length

    def _exactly(self, count: int) -> bytes:
        return bytes(self.request.recv(count, socket.MSG_WAITALL))


def accepted(request: bytes) -> bytes:
    """The A-ASSOCIATE-AC that takes the first transfer syntax of each context."""
    asked = A_ASSOCIATE_RQ()
    asked.decode(b"\x01\0" + struct.pack(">I", len(request)) + request)
    primitive = asked.to_primitive()
    contexts = []
    for one in primitive.presentation_context_definition_list:
        context = build_context(one.abstract_syntax, one.transfer_syntax[0])
        context.context_id, context.result = one.context_id, 0
        contexts.append(context)
    primitive.presentation_context_definition_results_list = contexts
    primitive.result, primitive.result_source = 0, 1
    primitive.maximum_length_received = MAX_PDU
    answer = A_ASSOCIATE_AC()
    answer.from_primitive(primitive)
    return bytes(answer.encode())


class Server(socketserver.ThreadingTCPServer):
    """Listens until it is ended."""

    allow_reuse_address = True
    daemon_threads = True


def main() -> None:
    with Server(("127.0.0.1", int(sys.argv[1])), BareLoop) as server:
        server.folder, server.sync = Path(sys.argv[2]), "--sync" in sys.argv  # type: ignore[attr-defined]
        server.serve_forever()


if __name__ == "__main__":
    main()
