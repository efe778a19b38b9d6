"""This service beside other model servers, on one machine in one run."""
