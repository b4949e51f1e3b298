"""Settings of all tests."""

from hypothesis import settings

# The same examples on every machine, and no limit on the time of one: a busy machine is not a bug.
settings.register_profile("alpro", derandomize=True, deadline=None)
settings.load_profile("alpro")
