"""Two saved traces: what changed between them, where, by how much and how surely. No JAX is needed."""
