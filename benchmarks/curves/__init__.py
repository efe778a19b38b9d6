"""Cost curves: what speed, memory and start-up depend on."""
