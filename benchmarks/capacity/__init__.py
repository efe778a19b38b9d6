"""How many gateways, GPUs and cores a load needs: measured here, simulated beyond, in tables."""
