"""Load, measurement and comparison. Speed is told here, as ratios from interleaved runs, and never in tests/."""
