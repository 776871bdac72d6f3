"""Settings of all tests."""

import os

# Before torch is imported. Models this small lose more by waiting for a second thread than it does for them. Processes
# that tests start take it over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# No deadline: a timing is never an assertion. The same examples every time, so that a failure repeats.
settings.register_profile("taurl", deadline=None, derandomize=True)
settings.load_profile("taurl")
