"""Memory, work and time of an audit, estimated without weights or accelerators."""
