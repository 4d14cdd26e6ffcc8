"""The benchmarks' workloads in sizes that take milliseconds, and what the largest would say."""

from __future__ import annotations

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "decode-64-to-256": {"map_size": (10, 12), "out_size": (25, 31)},
    "decode-64-to-256-backward": {"map_size": (5, 6), "out_size": (12, 15)},
    "decode-64-to-256-both": {"map_size": (5, 6), "out_size": (12, 15)},
    "training-step": {"map_size": (7, 6), "batch": 2, "queries": 90},
    "training-forward": {"map_size": (7, 6), "batch": 2, "queries": 90},
    "training-backward": {"map_size": (7, 6), "batch": 2, "queries": 90},
    "gather": {"map_size": (9, 8), "queries": 120},
    "gather-backward": {"map_size": (9, 8), "queries": 120},
    "ensemble": {"queries": 200},
    "ensemble-backward": {"queries": 200},
    "parts": {"map_size": (8, 8), "out_size": (16, 16)},
    "scale-x2": {"map_size": (6, 6), "out_size": (12, 12)},
    "scale-x3.7": {"map_size": (6, 6), "out_size": (22, 22), "window": (3, 4, 8, 8)},
    "scale-x8": {"map_size": (6, 6), "out_size": (48, 48), "window": (20, 20, 8, 8)},
    "scale-x30": {"map_size": (6, 6), "out_size": (180, 180), "window": (80, 80, 8, 8)},
    "batch-1": {"map_size": (7, 6), "queries": 90},
    "batch-4": {"map_size": (7, 6), "queries": 90},
    "encoder": {"map_size": (12, 12)},
    "upscale-photo": {"map_size": (12, 12), "out_size": (48, 48)},
}
SIZE = {  # what a run of its own would say
    "original": {"peak_bytes": 3_000_000_000, "note": "from 4 of its 140 chunks"},
    "folded-fp32": {"peak_bytes": 5_000_000_000},
    "cpu-fp32": {"peak_bytes": 330_000_000},
    "cpu-bf16": {"peak_bytes": 210_000_000},
}
