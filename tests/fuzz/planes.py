"""The planes that are fuzzed, and each one's share of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fuzz.bus_plane import bus_plane
from fuzz.campaign import Plane
from fuzz.flow_plane import flow_plane
from fuzz.frames_plane import frames_plane
from fuzz.hello_plane import hello_plane
from fuzz.http_plane import http_plane

SIZE: Final = 100  # inputs of a batch


@dataclass(frozen=True)
class Fuzzed:
    run: Plane
    weight: int


PLANES: Final = {
    "http": Fuzzed(http_plane, 20),
    "bus": Fuzzed(bus_plane, 18),
    "frames": Fuzzed(frames_plane, 35),
    "flow": Fuzzed(flow_plane, 20),
    "hello": Fuzzed(hello_plane, 7),
}
