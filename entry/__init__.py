"""An entry of the model repository: what the service and the offline scripts both know of it."""
