"""The control plane: a base contract, NATS, and an in-memory twin that can lose, double and reorder."""
