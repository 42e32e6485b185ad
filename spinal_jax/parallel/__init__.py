"""Devices and processes: how they are arranged and where arrays lie."""
