"""Rules for the unit tests."""

from hypothesis import HealthCheck, settings

# How long an example takes depends on who else uses the machine: no reason to fail. pytest's timeout ends a hang.
settings.register_profile(
    "shared machine", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared machine")
