"""What all tests share: hypothesis does not fail an example for the time that it took on a busy machine."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
