"""What every test shares: one thread per process, deterministic hypothesis runs, a cache folder of its own."""

from __future__ import annotations

import os
import tempfile

# Set before torch, BLAS or OpenMP load: workers run side by side, and one thread each also fixes the order of sums.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"

# Measured tables and other caches go to a throw-away folder, in this process and in those it starts.
_cache = tempfile.TemporaryDirectory(prefix="fxopt-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "fxopt",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fxopt")
