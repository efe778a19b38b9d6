"""Studies of a trained model: one question a module, each answered by one command."""
