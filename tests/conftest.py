"""Settings of all tests."""

from hypothesis import settings

# No deadline: a timing is never an assertion. The same examples every time, so that a failure repeats.
settings.register_profile("taurl", deadline=None, derandomize=True)
settings.load_profile("taurl")
