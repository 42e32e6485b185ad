"""What an audit will need, before there are weights or accelerators: memory, work, time, and whether it fits."""
