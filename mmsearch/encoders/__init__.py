"""Encoders, and the runtimes behind them."""

import sys

# OpenVINO reports its imports and conversions to its makers over the network, unless it finds no
# `openvino_telemetry`: then it falls back to a stub of its own. mmsearch works offline and tells
# nobody what it is used for.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None: "not there"
