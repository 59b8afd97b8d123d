"""The version of this package: the only place that states it. The build reads it from here."""

VERSION = "0.1.0"
