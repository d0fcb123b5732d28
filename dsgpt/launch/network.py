"""Which address and interface this host uses towards another, and what tells NCCL and gloo which to use. Torch-free."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915
_SETTINGS = (
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "NCCL_IB_DISABLE",
    "NCCL_NET",
    "NCCL_P2P_DISABLE",
)


def settings() -> dict[str, str]:
    """The variables that choose the network of NCCL and gloo, as far as they are set: nodes should agree on them."""
    return {name: os.environ[name] for name in _SETTINGS if name in os.environ}


def route_to(host: str, port: int) -> tuple[str, str]:
    """(own IPv4 address, interface) on the way to `host`; empty where there is none. No packet is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port or 1))
            address = str(probe.getsockname()[0])
            for _, name in socket.if_nameindex():
                try:
                    request = struct.pack("256s", name.encode()[:15])
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                except OSError:
                    continue  # an interface without an IPv4 address
                if socket.inet_ntoa(answer[20:24]) == address:
                    return address, name
            return address, ""
    except OSError:
        return "", ""
