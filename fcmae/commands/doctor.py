"""`fcmae doctor`: check that this machine computes correctly."""

from dataclasses import dataclass

from fcmae.config.fields import Config


@dataclass
class DoctorConfig(Config):
    """Show versions and engines, check that the engines agree, and time each."""


CONFIG = DoctorConfig
RUN = "fcmae.inspect.diagnosis:doctor"
